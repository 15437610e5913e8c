"""Every snippet and command of the README, run as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has run, with its smallest budget."""
    folder = tmp_path_factory.mktemp("readme")
    run(["d2o", "demo", "--quick"], folder)
    return folder


def run(command: list[str], folder: Path) -> str:
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_the_python_snippets_run(after_the_demo: Path) -> None:
    snippets = blocks("python")
    assert len(snippets) == 2
    for snippet in snippets:
        run([sys.executable, "-c", snippet], after_the_demo)
    assert (after_the_demo / "runs/mine/model.safetensors").is_file()


def test_the_d2o_commands_run(after_the_demo: Path) -> None:
    lines = [line for line in commands() if line.startswith("d2o ")]
    assert [line.split()[1] for line in lines] == ["doctor", "sample", "sample", "anchors", "train", "eval"]
    for line in lines:
        run(shlex.split(line), after_the_demo)
    assert (after_the_demo / "runs/again/eval.json").is_file()


def test_the_other_commands_are_known() -> None:
    """``make demo``, ``make test`` and ``make bench`` would take minutes: make is asked for what it would run."""
    targets = set(re.findall(r"\bmake (\w+)", README))
    assert {"demo", "test", "bench"} <= targets
    for target in targets:
        assert run(["make", "--dry-run", target], ROOT)
    others = [line for line in commands() if not line.startswith(("d2o ", "make "))]
    assert others == ["python -m benchmarks.gpu"]
    run([sys.executable, "-m", "benchmarks.gpu", "--help"], ROOT)


def test_the_tree_names_every_file_and_no_other() -> None:
    tree = README.split("## The tree")[1].split("The way from")[0]
    folders = ("d2o_fast", "d2o_fast/demo", "kernels", "benchmarks", "examples")
    expected = {path.name for folder in folders for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"\b\w+\.py\b", tree)) == expected


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

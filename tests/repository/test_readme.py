"""Every snippet, command and link of the README and the documents, run or followed as it is written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


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


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("python", page.read_text())], ids=lambda p: p.name)
def test_the_python_snippets_run(page: Path, after_the_demo: Path) -> None:
    for snippet in blocks("python", page.read_text(encoding="utf-8")):
        run([sys.executable, "-c", snippet], after_the_demo)


def test_the_loss_takes_eight_lines() -> None:
    (snippet,) = blocks("python")
    assert len([line for line in snippet.splitlines() if line]) == 8


def test_the_d2o_commands_run_with_the_settings_file_shown(after_the_demo: Path) -> None:
    (settings,) = blocks("yaml")
    (name,) = re.findall(r"^# (\S+\.yaml)$", settings, flags=re.MULTILINE)
    (after_the_demo / name).write_text(settings, encoding="utf-8")
    lines = [line for line in commands() if line.startswith("d2o ")]
    assert [line.split()[1] for line in lines] == ["doctor", "sample", "train", "anchors", "eval"]
    for line in lines:
        run(shlex.split(line), after_the_demo)
    assert (after_the_demo / "runs/mine/model.safetensors").is_file()
    assert (after_the_demo / "runs/mine/eval.json").is_file()


def test_the_other_commands_are_known() -> None:
    """``make demo``, ``make test`` and ``make bench`` would take minutes: make says which commands it would run."""
    assert {"demo", "test", "bench"} <= set(re.findall(r"\bmake ([\w-]+)", README))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for target in set(re.findall(r"(?:`|^ *)make ([\w-]+)", text, flags=re.MULTILINE)):
        assert run(["make", "--dry-run", target], ROOT)
    others = [line for line in commands() if not line.startswith("d2o ")]
    assert others == ["make demo", "make test", "source .venv/bin/activate"]
    assert ".venv/bin/d2o demo" in run(["make", "--dry-run", "demo"], ROOT)


def test_the_tree_names_every_room() -> None:
    tree = README.split("## Where to look")[1].split("A room imports")[0]
    rooms = {path.parent.name for path in (ROOT / "d2o_fast").glob("*/__init__.py")}
    top = {"d2o_fast", "kernels", "benchmarks", "examples", "tests"}
    assert set(re.findall(r"^ +(\w+)/ ", tree, flags=re.MULTILINE)) == (rooms | top) - {"d2o_fast"}


def test_the_architecture_page_names_every_file_and_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named: dict[str, set[str]] = {}
    for line in re.findall(r"^\| `(.+?)` \|", page.split("## The files")[1], flags=re.MULTILINE):
        room, _, name = line.rpartition("/")
        named.setdefault(room, set()).add(name)
    files = [*(ROOT / "d2o_fast").glob("*.py"), *(ROOT / "d2o_fast").glob("*/*.py"), *(ROOT / "kernels").glob("*.py")]
    found: dict[str, set[str]] = {}
    for path in {path for path in files if "d2o_fast/kernels" not in path.as_posix()}:
        folder = path.relative_to(ROOT).parent
        if path.name != "__init__.py" or folder.name == "d2o_fast":
            room = folder.relative_to("d2o_fast") if folder.parts[0] == "d2o_fast" else folder
            found.setdefault(room.as_posix().removeprefix("."), set()).add(path.name)
    assert named == found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_the_documents_name_only_files_that_exist() -> None:
    """A file of a room is written with its room (``loss/walk.py``), so that the name can be looked up."""
    for page in PAGES:
        for name in re.findall(r"`((?:\w+/)+\w+\.py)`", page.read_text(encoding="utf-8")):
            assert any((ROOT / folder / name).exists() for folder in ("", "d2o_fast")), f"{page.name}: {name}"

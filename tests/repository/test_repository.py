"""The shape of the repository: what its layout promises to the outside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from paths import ROOT


def run_python(code: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_hugging_faces_kernels_package_stays_importable_from_the_repository_root() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    found = Path(run_python("import kernels; print(kernels.__file__)", ROOT))
    assert "site-packages" in found.parts


def test_our_kernels_are_a_part_of_the_package(tmp_path: Path) -> None:
    link = ROOT / "d2o_fast" / "kernels"
    assert os.readlink(link) == "../kernels"
    name = "import d2o_fast.kernels.linear_logprob as module; print(module.__name__)"
    assert run_python(name, tmp_path) == "d2o_fast.kernels.linear_logprob"


@pytest.mark.slow
def test_the_wheel_holds_every_module_behind_the_links(tmp_path: Path) -> None:
    # From a copy: setuptools leaves a build/ behind, and files of an old one would get into the wheel.
    source = tmp_path / "source"
    shutil.copytree(ROOT / "d2o_fast", source / "d2o_fast", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("kernels", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if name.startswith("d2o_fast/")}
    folders = (Path(folder) for folder, _, _ in os.walk(ROOT / "d2o_fast", followlinks=True))
    expected = {str(path.relative_to(ROOT)) for folder in folders for path in folder.glob("*.py")}
    assert len(expected) > 60
    assert names == {*expected, "d2o_fast/py.typed"}


def test_importing_the_package_loads_neither_transformers_nor_triton(tmp_path: Path) -> None:
    code = "import sys, d2o_fast; print([m for m in ('transformers', 'triton', 'datasets') if m in sys.modules])"
    assert run_python(code, tmp_path) == "[]"

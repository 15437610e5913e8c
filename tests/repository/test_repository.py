"""The shape of the repository: what its layout promises to the outside."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

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


def test_the_wheel_holds_every_module_behind_the_links(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    expected = {
        str(path.relative_to(ROOT))
        for folder in ("d2o_fast", "d2o_fast/demo", "d2o_fast/kernels")
        for path in (ROOT / folder).glob("*.py")
    }
    assert expected
    assert expected <= names
    assert "d2o_fast/py.typed" in names


def test_importing_the_package_loads_neither_transformers_nor_triton(tmp_path: Path) -> None:
    code = "import sys, d2o_fast; print([m for m in ('transformers', 'triton', 'datasets') if m in sys.modules])"
    assert run_python(code, tmp_path) == "[]"

"""Faults that others reported elsewhere: each script of ``tests/faults`` says what is right, and exits with 0."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers import DEADLINE
from paths import ROOT

SCRIPTS = sorted((ROOT / "tests" / "faults").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_fault_is_mended(script: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE)
    verdicts = [line for line in done.stdout.splitlines() if line.startswith(("RIGHT: ", "WRONG: "))]
    assert verdicts, f"it came to no verdict\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, verdicts[-1]

"""Rows whose offsets pass 2^31 elements (tests/support/kernel_offsets.py), interpreted even if there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers import DEADLINE
from paths import ROOT, SUPPORT

CASES = SUPPORT / "kernel_offsets.py"


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout

"""Runs that are killed at random moments come back bit for bit. ``support/kill_table.py`` is the long form."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers import DEADLINE
from paths import SUPPORT


@pytest.mark.slow
def test_killed_at_random_moments() -> None:
    command = [sys.executable, str(SUPPORT / "kill_table.py"), "--runs", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all | 6 / 6 |" in done.stdout

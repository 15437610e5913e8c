"""Memory does not grow with the data: rows and anchors stay on disk until they are read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from made_data import Texts, write_rows
from paths import ROOT, SUPPORT

#: A row kept as Python objects would take 2 kB more in a dry run, 15 kB more in an epoch. The epoch's bound includes
#: decoded shards (4 bytes a token), which are kept up to CACHE_BYTES of ``anchors/shards.py``.
CASES = [("dry_run", 3000, 10000, 1500), ("epoch", 4000, 12000, 5000)]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "small", "large", "bound"), CASES, ids=["dry run", "epoch"])
def test_a_row_more_takes_hardly_any_memory(what: str, small: int, large: int, bound: int) -> None:
    """It runs in a separate process. The peak with few rows includes everything but the rows."""
    command = [sys.executable, str(SUPPORT / "made_data.py"), what, str(small), str(large)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    few, many = (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"what"'))
    assert (few["rows"], many["rows"]) == (small, large)
    assert many["bytes_per_row_more"] < bound


def test_rows_are_the_same_on_every_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / name, 1001)
    lines = (tmp_path / "a").read_text().splitlines()
    assert lines == (tmp_path / "b").read_text().splitlines()
    assert len(lines) == 1001
    assert lines[999] == lines[998]
    assert len(set(lines)) == 1000
    assert Texts(1).text(5, 5) != Texts(2).text(5, 5)

"""The benchmark of memory and rows: what it writes can be read, and its file says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import data
from benchmarks.data import Texts, table, write_rows


def test_rows_are_the_same_on_every_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / name, 1001)
    lines = (tmp_path / "a").read_text().splitlines()
    assert lines == (tmp_path / "b").read_text().splitlines()
    assert len(lines) == 1001
    assert lines[999] == lines[998]
    assert len(set(lines)) == 1000
    for line in lines:
        record = json.loads(line)
        assert all(50 <= len(record[name].split()) <= 100 for name in ("prompt", "rejected"))
    assert Texts(1).text(5, 5) != Texts(2).text(5, 5)


def test_growth_is_what_a_row_more_costs() -> None:
    results = [
        {"what": "dry_run", "rows": 20, "seconds": 2.0, "peak_bytes": 3 << 20},
        {"what": "dry_run", "rows": 40, "seconds": 4.0, "peak_bytes": 4 << 20},
        {"what": "epoch", "rows": 20, "seconds": 2.0, "peak_bytes": 9 << 20, "open_seconds": 1.0, "epoch_seconds": 0.5},
    ]
    cells = [line.split(" | ")[-4:] for line in table(results)[2:]]
    assert cells == [["", "", "3", " |"], ["", "", "4", f"{(1 << 20) / 20:.0f} |"], ["1.0", "40", "9", " |"]]


def test_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["--rows", "200", "--output_dir", str(tmp_path)]) == 0
    text = (tmp_path / "data-cpu.md").read_text()
    assert text.strip() in capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith(("| `d2o sample", "| a store"))]
    assert [row.split(" | ")[1] for row in rows] == ["200", "200"]
    assert "pyarrow" in text
    peaks = [float(row.split(" | ")[6]) for row in rows]
    assert all(100 < peak < 4000 for peak in peaks), "MiB"
    with pytest.raises(RuntimeError, match=r"dry_run with 9 rows ended with 1:\n(.*\n)*.*ended with 2"):
        data.measured("dry_run", tmp_path, 9)

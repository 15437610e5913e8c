"""README's table is what its command makes of the committed results."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.readme import BEGIN, END, main, newest, rewrite, tables
from benchmarks.runner import RESULTS, ROOT

HEAD = {"suite": "peers", "head": "gpt2", "device": "cpu", "dtype": "bf16", "mode": "train", "inputs": "random"}
SIZE = {"N": 96, "H": 768, "V": 50257, "S": 24, "G": 2, "softcap": None, "device_name": "a CPU"}


def row(provider: str, ms: float, *, date: str = "2026-01-01T00:00:00", **changes: object) -> dict:
    fixed = {"provider": provider, "ms": ms, "date": date, "status": "ok", "reason": "", "commit": "c1"}
    return {**HEAD, **SIZE, "memory_bytes": 3 << 20, **fixed, **changes}


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def committed(folder: Path, into: Path) -> Path:
    """A copy of what git knows of ``folder``, all of it where there is no git: a run of one's own changes no test."""
    git = shutil.which("git")
    listed = git and subprocess.run([git, "ls-files", str(folder)], cwd=ROOT, capture_output=True, text=True)
    if not listed or listed.returncode:
        return folder
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, into / name)
    return into / folder.relative_to(ROOT)


def test_the_table_is_that_of_the_newest_committed_results(tmp_path: Path) -> None:
    shown = (ROOT / "README.md").read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
    names = re.findall(r"\(\[rows\]\((\S+)\)\)", shown)
    folder = committed(RESULTS, tmp_path)
    expected = [str(Path("benchmarks/results") / path.relative_to(folder)) for path in newest(folder)]
    assert names == expected, "results are newer than the table: run python -m benchmarks.readme"
    assert shown == tables([ROOT / name for name in names]), "run python -m benchmarks.readme"


def test_ratios_memory_and_who_is_ranked(tmp_path: Path) -> None:
    second = {"mode": "frozen", "N": 48, "inputs": "peaked", "S": 4}
    path = write(
        tmp_path / "rows.jsonl",
        row("ours", 100.0),
        row("naive", 150.0, memory_bytes=5 << 20),
        row("trl-chunked", 80.0),
        row("cce", 10.0, status="out of bound", reason="error of loss 1 > 0.03"),
        row("liger-dpo", 10.0),
        row("ours", 200.0, **second),
        row("naive", 100.0, **second),
        row("trl-chunked", 300.0, **second),
        row("ours", 1.0, dtype="fp32"),
        row("ours", 1.0, mode="score"),
    )
    lines = tables([path]).splitlines()
    assert lines[0].startswith("a CPU, 2026-01-01, commit c1 ([rows](")
    assert "*peaked*" in lines[0]
    assert lines[2] == "| head, tokens | ours, ms | eager | TRL chunked | memory, ours / eager |"
    assert lines[4:] == [
        "| GPT-2, trained, 96 | 100 | 1.50 | **0.80** | 3 / 5 MiB |",
        "| GPT-2, frozen, 48, K = 1, peaked | 200 | **0.50** | 1.50 | 3 / 3 MiB |",
    ]


def test_ours_out_of_bound_is_not_ranked_and_peers_over_it_are_not_shown(tmp_path: Path) -> None:
    wrong = row("ours", 1.0, status="out of bound", reason="error of loss 1 > 0.03")
    assert "| GPT-2, trained, 96 | not ranked |  |" in tables([write(tmp_path / "a.jsonl", wrong, row("naive", 2.0))])


def test_a_second_run_into_the_same_file_counts_alone(tmp_path: Path) -> None:
    old = [row("ours", 100.0), row("naive", 150.0), row("trl-chunked", 100.0)]
    new = [row("ours", 50.0, commit="c2"), row("naive", 100.0, commit="c2")]
    text = tables([write(tmp_path / "rows.jsonl", *old, *new)])
    assert "commit c2 (" in text
    assert "TRL" not in text
    assert "| 50 | 2.00 |" in text


def test_the_newest_run_of_each_place(tmp_path: Path) -> None:
    gpu = {"suite": "gpu", "device": "cuda"}
    write(tmp_path / "a-peers-cpu.jsonl", row("ours", 1.0, date="2026-01-02T00:00:00"))
    cpu = write(tmp_path / "b-peers-cpu.jsonl", row("ours", 1.0, date="2026-02-01T00:00:00", device_name="another"))
    write(tmp_path / "c-peers-cpu-tiny.jsonl", row("ours", 1.0, date="2026-03-01T00:00:00"))
    write(tmp_path / "d-gpu-cpu.jsonl", row("ours", 1.0, date="2026-03-01T00:00:00", suite="gpu"))  # a dry run
    write(tmp_path / "gpu-1" / "rows.jsonl", row("ours", 1.0, device_name="B", **gpu))
    late = write(tmp_path / "gpu-2" / "rows.jsonl", row("ours", 1.0, date="2026-01-02", device_name="B", **gpu))
    other = write(tmp_path / "gpu-3" / "rows.jsonl", row("ours", 1.0, device_name="A", **gpu))
    assert newest(tmp_path) == [cpu, other, late]
    with pytest.raises(ValueError, match="nothing to show"):
        tables([tmp_path / "d-gpu-cpu.jsonl"])


def test_the_command_changes_what_is_between_the_markers(tmp_path: Path) -> None:
    path, readme = write(tmp_path / "rows.jsonl", row("ours", 100.0)), tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        assert main([str(path), "--readme", str(readme)]) == 0
        assert readme.read_text() == f"before\n{BEGIN}\n\n{tables([path])}\n\n{END}\nafter\n"
    readme.write_text(f"{END} and {BEGIN}")
    with pytest.raises(ValueError, match="two markers"):
        rewrite(readme, "text")
    assert readme.read_text() == f"{END} and {BEGIN}"

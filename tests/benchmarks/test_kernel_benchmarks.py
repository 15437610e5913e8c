"""The commands for a GPU, run at tiny shapes: kernels beside their floors, tile configurations, sanitizers."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, kernel_cases, tune
from benchmarks.kernels import Stopwatch, measure, profile, row_of
from benchmarks.shapes import HEADS
from d2o_fast.kernels import filtered_products, linear_logprob, logit_grad
from d2o_fast.kernels.logit_grad import ROW_TILES, RowTile
from helpers import DEADLINE
from paths import ROOT

LATER = float("inf")


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--seconds", str(DEADLINE)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE)


def program(folder: Path, name: str, script: str) -> Path:
    """A substitute for a tool that not every machine has."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def operands() -> kernel_cases.Operands:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return kernel_cases.Operands(kernel_cases.shape_of("gpt2", tiny=True), device, torch.bfloat16)


# ------------------------------------------------------------------------------------------------ kernels and floors


@pytest.mark.slow
def test_every_kernel_has_a_row_with_its_floor(tmp_path: Path) -> None:
    done = run("kernels", "--dry-run", "--head", "gemma-2-2b", "--rounds", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "kernels-cpu-tiny.json"
    results = json.loads(path.read_text())
    rates, rows = results["rates"], results["rows"]
    names = ["linear_logprob", "logit_stats", "logit_grad", "group_loss"]
    names += ["filtered_products, 5%", "filtered_products, all", "vendor logits", "vendor dhidden", "vendor dweight"]
    assert [row["kernel"] for row in rows] == names
    for row in rows:
        assert row["status"] == "ok"
        terms = {
            "memory": row["bytes"] / rates["copy_gb_per_s"] * 1e-6,
            "matrix": row["operations"] / rates["matmul_tflops"] * 1e-9,
            "launches": row["launches"] * rates["launch_seconds"] * 1e3,
        }
        assert row["floor_ms"] == pytest.approx(max(terms.values()))
        assert terms[row["bound"]] == max(terms.values())
        assert row["gap"] == pytest.approx(row["ms"] / row["floor_ms"])
    assert results["about"]["commit"]
    table = path.with_suffix(".md").read_text()
    assert "not a measurement" in table
    assert all(f"| {name} |" in table for name in names)


def test_bytes_and_operations_are_those_counted_by_hand(operands) -> None:
    """H = 40, V = 193; 24 tokens to score, 12 in a chunk; M kept columns."""
    shape, dense = operands.shape, kernel_cases.Gradient(operands)
    assert (shape.H, shape.V, shape.N, shape.n, len(dense.kept)) == (40, 193, 24, 12, 193)
    logits, sparse = kernel_cases.Logits(operands), kernel_cases.Gradient(operands, 0.05)
    M = len(sparse.kept)
    assert 0 < M < 60
    forward = kernel_cases.linear_logprob_work(operands)
    assert (forward.moved, forward.operations) == (2 * (24 + 193) * 40 + 24 * (8 + 4 + 8), 2 * 24 * 40 * 193)
    assert kernel_cases.logit_stats_work(operands, logits).moved == 4 * 12 * 193 + 12 * (8 + 4 + 8)
    assert kernel_cases.logit_grad_work(operands, logits).moved == (4 + 2) * 12 * 193 + 12 * (8 + 8 + 4)
    filtered = kernel_cases.filtered_work(operands, sparse, "filtered")
    assert filtered.operations == 2 * 2 * 12 * 40 * M
    read = 2 * 12 * 193 + 4 * 12 + 2 * M * 40 + 2 * 12 * 40 + 4 * M * 40
    assert filtered.moved == read + 2 * 12 * 40 + 4 * M * 40
    _, dhidden, dweight = kernel_cases.vendor_work(operands, logits, dense)
    assert dhidden.moved == 2 * (12 * 193 + 193 * 40 + 12 * 40)
    assert dweight.moved == 2 * (12 * 193 + 12 * 40) + 2 * 4 * 193 * 40
    assert dhidden.operations == dweight.operations == 2 * 12 * 40 * 193


def test_real_heads_take_a_chunk_that_the_workspace_holds() -> None:
    for head in HEADS:
        shape = kernel_cases.shape_of(head)
        assert shape.N == 12288
        assert shape.n * shape.V * 4 <= 768 << 20
    assert kernel_cases.shape_of("llama-3.1-8b").n == 1536


def test_the_longest_time_is_the_floor() -> None:
    rates = {"copy_gb_per_s": 1000.0, "matmul_tflops": 100.0, "launch_seconds": 1e-6}

    def bound(moved: float, operations: float, launches: int) -> tuple[str, float]:
        work = kernel_cases.Work("k", {}, lambda: None, lambda _: 0.0, moved, operations, launches)
        row = row_of(work, "", [3e-3, 1e-3, 2e-3], rates)
        assert row["gap"] == pytest.approx(2.0 / row["floor_ms"])
        return row["bound"], row["floor_ms"]

    assert bound(1e9, 1e10, 1) == ("memory", pytest.approx(1.0))
    assert bound(1e8, 1e12, 1) == ("matrix", pytest.approx(10.0))
    assert bound(1e3, 1e3, 9) == ("launches", pytest.approx(9e-3))


def test_a_wrong_kernel_gets_no_number(operands) -> None:
    right = kernel_cases.logit_stats_work(operands, kernel_cases.Logits(operands))

    def spoiled(change) -> kernel_cases.Work:
        return dataclasses.replace(right, launch=lambda: tuple(change(result) for result in right.launch()))

    def broken() -> None:
        raise RuntimeError("out of registers")

    works = [right, spoiled(lambda t: t * 1.001), spoiled(lambda t: t * float("nan"))]
    works.append(dataclasses.replace(right, launch=broken))
    reasons, seconds = measure(works, Stopwatch(operands.device), until=LATER, rounds=2)
    assert reasons[0] == ""
    assert "times the bound" in reasons[1]
    assert reasons[2:] == ["its error is inf times the bound", "RuntimeError: out of registers"]
    assert [len(taken) for taken in seconds] == [2, 0, 0, 0]


def test_a_profiler_sees_the_second_launch_alone(operands, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: seen.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: seen.append("stop"))
    right = kernel_cases.logit_stats_work(operands, kernel_cases.Logits(operands))

    def launch() -> object:
        seen.append("launch")
        return right.launch()

    profile([dataclasses.replace(right, launch=launch)])
    assert seen == ["launch", "start", "launch", "stop"]
    with pytest.raises(RuntimeError, match=r"logit_stats: its error is .* times the bound"):
        profile([dataclasses.replace(right, error=lambda result: 2.0)])


# ------------------------------------------------------------------------------------------------ tile configurations


@pytest.mark.slow
def test_tuning_writes_lines_to_paste(tmp_path: Path) -> None:
    done = run("tune", "--dry-run", "--only", "grad", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "tiles-interpreter.json"
    (entry,) = json.loads(path.read_text())["entries"]
    assert (entry["table"], entry["key"]) == ("logit_grad.ROW_TILES", ["interpreter", "grad"])
    assert [one["tile"] for one in entry["tiles"]] == [[4096, 8], [1024, 4]]
    assert all(one["out"] == "" and one["ms"]["gemma-2-2b, logit_grad"] > 0 for one in entry["tiles"])
    text = path.with_suffix(".md").read_text()
    assert "| 1024, 4 |" in text
    if entry["winner"] == [1024, 4]:
        assert '```python\n    ("interpreter", "grad"): RowTile(1024, 4),\n```' in text
    else:
        assert "Nothing to paste" in text


def test_lines_to_paste_are_those_of_the_source() -> None:
    sources = {
        module.__name__.split(".")[-1]: inspect.getsource(module)
        for module in (linear_logprob, filtered_products, logit_grad)
    }
    for name, table in tune.tables().items():
        module, variable = name.split(".")
        body = sources[module].split(f"\n{variable}: ")[1].split("\n}\n")[0].splitlines()
        for key, tile in table.items():
            if "interpreter" not in key:  # the source makes some of these in a loop
                assert tune.literal(key, tile) in body, name
    assert tune.literal("sm_90", linear_logprob.Tile(128, 256, 64, 8, 4, 24)).endswith("Tile(128, 256, 64, 8, 4, 24),")


def test_every_entry_names_a_table_that_its_launcher_reads() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = tune.entries(device)
    assert set(tune.ENTRIES.split(", ")) - {entry.name for entry in plan} <= {"forward capped"}
    for entry in plan:
        if "forward" in entry.name or entry.name == "stats":  # the others behave alike in a dry run
            table, key, works = entry.at(tune.operands(entry, "gpt2", device))
            first = works[0].launch()
            with tune.using(table, key, None), pytest.raises(AttributeError):
                works[0].launch()
            assert torch.equal(first[0], works[0].launch()[0])


def stats_entry(device: torch.device, *candidates: RowTile) -> tune.Entry:
    entry = next(entry for entry in tune.entries(device) if entry.name == "stats")
    return dataclasses.replace(entry, candidates=candidates, heads=("gpt2", "gemma-2-2b"))


@pytest.mark.slow
def test_a_tile_that_cannot_be_is_left_out_and_the_table_stays(operands) -> None:
    device, before = operands.device, dict(ROW_TILES)
    impossible, good = RowTile(3000, 8), RowTile(512, 4)
    found = tune.tune(stats_entry(device, impossible, good), Stopwatch(device), LATER, rounds=1)
    assert before == ROW_TILES
    assert found.out.keys() == {impossible}
    assert found.out[impossible]
    assert list(found.ms) == ["gpt2, logit_stats", "gemma-2-2b, logit_stats"]
    assert all(column.keys() == {found.present, good} for column in found.ms.values())


@pytest.mark.gpu
def test_a_tile_that_spills_is_left_out(device) -> None:
    """The kernel keeps 512 running numbers per thread."""
    greedy = RowTile(32768, 4)
    found = tune.tune(stats_entry(device, greedy), Stopwatch(device), LATER, rounds=1)
    assert "spills" in found.out[greedy]
    assert found.present not in found.out


def test_out_of_time_only_the_present_tile_is_measured(operands) -> None:
    found = tune.tune(stats_entry(operands.device, RowTile(512, 4)), Stopwatch(operands.device), 0.0, rounds=1)
    assert list(found.out.values()) == ["not reached in time"]
    assert found.winner() == found.present
    assert list(found.ms) == ["gpt2, logit_stats"]


@pytest.mark.parametrize(
    ("ms", "winner"),
    [
        ({"a": {"present": 1.0, "other": 0.9}}, "other"),
        ({"a": {"present": 1.0, "other": 0.995}}, "present"),  # may be noise
        ({"a": {"present": 1.0, "other": 0.9}, "b": {"present": 1.0, "other": 1.2}}, "present"),
        ({"a": {"present": 10.0, "other": 8.0}, "b": {"present": 0.1, "other": 0.11}}, "other"),  # ratios, not sums
        ({"a": {"present": 1.0, "other": 0.5}, "b": {"present": 1.0}}, "present"),  # it did not run everywhere
        ({"a": {"other": 2.0, "third": 1.0}}, "third"),  # the present one spills, or is wrong
        ({}, "present"),
    ],
)
def test_the_winner_is_the_fastest_over_all_heads(ms, winner) -> None:
    assert tune.Found("module.TABLE", "sm_90", "present", {}, ms).winner() == winner


# ------------------------------------------------------------------------------------------------ sanitizers


@pytest.mark.slow
def test_memcheck_runs_the_marked_tests_and_a_finding_fails_the_command(tmp_path: Path, monkeypatch) -> None:
    """The substitute runs one of the given tests (one, to save time); as racecheck it reports a finding."""
    script = """
tool=$2; while [ "${1##*python*}" ]; do shift; done
[ $PYTORCH_NO_CUDA_MEMORY_CACHING = 1 ] || exit 1
if [ $tool = memcheck ]; then "$@"; code=$?; echo "========= ERROR SUMMARY: 0 errors"; exit $code; fi
echo "1 passed in 1 s"; echo "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"; exit 86"""
    program(tmp_path, "compute-sanitizer", script)
    out = tmp_path / "out"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k test_rows_with_a_target_outside_the_vocabulary")
    assert gpu.main(["--dry-run", "--sanitize", "--out", str(out)]) == 1
    found = json.loads((out / "results.json").read_text())["about"]["sanitizer"]
    assert found["memcheck"]["clean"], found
    assert found["memcheck"]["summary"].startswith("ERROR SUMMARY: 0 errors; 1 passed")
    assert not found["racecheck"]["clean"]
    assert "2 hazards displayed (1 error, 1 warning); 1 passed" in found["racecheck"]["summary"]
    assert "code 86 (see racecheck.log)" in found["racecheck"]["summary"]
    table = (out / "table.md").read_text()
    assert "| memcheck | yes |" in table
    assert "| racecheck | **no** |" in table
    assert sorted(path.name for path in out.iterdir()) == ["memcheck.log", "racecheck.log", "results.json", "table.md"]


CLEAN = 'echo "3 passed in 1 s"; echo "= ERROR SUMMARY: 0 errors"; echo "RACECHECK SUMMARY: 0 hazards displayed (0 e)"'


@pytest.mark.parametrize(
    ("script", "clean", "said"),
    [
        (CLEAN, True, "0 errors; 3 passed in 1 s; code 0"),
        (f"{CLEAN}; exit 1", False, "code 1"),
        (CLEAN.replace("0 errors", "1 error").replace("0 hazards", "4 hazards"), False, "ERROR SUMMARY: 1 error; 3"),
        (CLEAN.replace("3 passed", "no tests ran"), False, "no test passed"),
        ('echo "3 passed in 1 s"', False, "no summary"),
        (f"{CLEAN}; exec sleep 60", False, "stopped after 0 s"),
    ],
    ids=["clean", "a failed test", "findings", "no test", "no summary", "out of time"],
)
def test_clean_takes_a_summary_of_nothing_and_passing_tests(tmp_path: Path, script, clean, said) -> None:
    seconds = 0.4 if "sleep" in script else 60.0
    found = gpu.sanitize(tmp_path, str(program(tmp_path, "compute-sanitizer", script)), seconds)
    assert found["memcheck"]["clean"] == found["racecheck"]["clean"] == clean
    assert said in found["memcheck"]["summary"]


def test_without_a_sanitizer_the_command_says_so(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--dry-run", "--sanitize", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "compute-sanitizer is not on the PATH" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

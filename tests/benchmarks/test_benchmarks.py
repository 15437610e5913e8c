"""The benchmarks run for real at tiny shapes, do not rank wrong providers, and name missing ones."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, runner, timing
from benchmarks.loss_report import markdown, ranking, roofline, wrong
from benchmarks.measure import peak_memory, run_case
from benchmarks.providers import PROVIDERS, Functions, Missing, Provider, group_loss, ours
from benchmarks.shapes import Case, Problem, equal_lengths, exact_results, make_problem, mixed_lengths, relative_error
from benchmarks.suites import EVERYONE, SUITES, cases_of
from d2o_fast.loss.reference import d2o_loss, naive_d2o_loss, sequence_logps
from helpers import DEADLINE
from paths import ROOT

CASE = Case("test", "tiny", equal_lengths(2, 3), 24, 301, "fp32", measure=("errors",))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ignore(event: dict) -> None:
    pass


def test_exact_results_prompt_by_prompt_are_those_of_the_whole_batch() -> None:
    problem = make_problem(dataclasses.replace(CASE, lengths=mixed_lengths(4, 0), softcap=3.0))
    hidden, weight = (t.double().requires_grad_() for t in (problem.hidden, problem.weight))
    refs = problem.ref_logps.double()
    out = naive_d2o_loss(hidden, weight, problem.targets, problem.layout, refs, softcap=3.0)
    out.loss.backward()
    exact = exact_results(problem, "train")
    for found, whole in ((exact.loss, out.loss), (exact.dhidden, hidden.grad), (exact.dweight, weight.grad)):
        torch.testing.assert_close(found, whole.detach())
    assert exact_results(problem, "frozen").dweight is None


def test_the_loss_on_top_of_token_log_probabilities_is_the_reference() -> None:
    problem = make_problem(dataclasses.replace(CASE, lengths=mixed_lengths(5, 1)))
    logps = torch.randn(problem.layout.num_tokens, dtype=torch.float64).requires_grad_()
    problem.ref_logps.normal_()
    same = d2o_loss(sequence_logps(logps, problem.layout), problem.ref_logps, problem.layout).loss
    loss = group_loss(logps, problem)
    torch.testing.assert_close(loss, same.float())
    torch.testing.assert_close(*(torch.autograd.grad(value, logps)[0] for value in (loss, same)))


@pytest.mark.parametrize(("inputs", "low", "high"), [("random", 4.9, 5.8), ("peaked", 0.1, 3.0)])
def test_peaked_inputs_have_a_trained_models_entropy(inputs: str, low: float, high: float) -> None:
    problem = make_problem(dataclasses.replace(CASE, H=256, inputs=inputs))
    assert low < problem.entropy < high  # log 301 = 5.7 is uniform
    loss = exact_results(problem, "train").loss
    assert loss is not None
    assert 0.2 < loss.item() < 2.0  # references near the policy: no gate sigmoid(-z) is saturated


def test_relative_error_takes_no_nan() -> None:
    exact = torch.ones(4, dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, 1.0, 1.0, float("nan")]), exact) == (float("inf"), float("inf"))
    assert relative_error(torch.tensor([1.0, 1.0, 1.0, 3.0]), exact) == (2.0, 1.0)


def spoiled(change: str) -> Provider:
    """Ours with one thing wrong."""

    def make(problem: Problem) -> Functions:
        loss = ours(problem).loss
        assert loss is not None

        def wrong(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            if change == "gradient":
                hidden.register_hook(lambda grad: grad * 1.001)
            if change == "head":
                weight = weight.detach()
            value = loss(hidden, weight)
            return value * {"loss": 1.001, "nan": float("nan")}.get(change, 1.0)

        return Functions(wrong, None)

    return Provider(f"wrong {change}", make)


def test_the_timing_loop_runs_everybody_in_every_round() -> None:
    ran: list[str] = []

    def call(name: str, last: int = 99) -> float | None:
        ran.append(name)
        return float(ran.count(name)) if ran.count(name) <= last else None

    calls = {name: partial(call, name, last) for name, last in (("a", 99), ("b", 99), ("twice", 2))}
    seconds = timing.interleaved(calls, rounds=12)
    assert seconds == {"a": [*range(1, 13)], "b": [*range(1, 13)], "twice": [1, 2]}
    assert all(set(ran[i : i + 3]) == set(calls) for i in (0, 3, 6))
    assert {tuple(ran[i : i + 2]) for i in range(9, 27, 2)} == {("a", "b"), ("b", "a")}, "the order changes"
    assert [len(taken) for taken in timing.interleaved({"a": lambda: 1.0}, 6, until=0.0).values()] == [3]
    assert timing.quartiles([0.003, 0.001, 0.002]) == pytest.approx({"ms": 2, "ms_q1": 1.5, "ms_q3": 2.5, "rounds": 3})
    assert timing.quartiles([]) == {}


def test_the_gate_keeps_wrong_results_out_of_the_ranking() -> None:
    case = dataclasses.replace(CASE, measure=("errors", "time"))
    providers = [PROVIDERS["ours"], *(spoiled(change) for change in ("gradient", "loss", "nan", "head"))]
    rows = {row["provider"]: row for row in run_case(case, providers, ignore, seconds=0)}
    assert rows["ours"]["status"] == "ok"
    assert rows["wrong gradient"]["status"] == "out of bound"
    assert "dhidden" in rows["wrong gradient"]["reason"]
    assert rows["wrong loss"]["status"] == rows["wrong nan"]["status"] == "out of bound"
    assert rows["wrong head"]["status"] == "failed"
    assert "dweight was not returned" in rows["wrong head"]["reason"]
    assert [row["provider"] for row in ranking(list(rows.values()))] == ["ours"]
    assert wrong(list(rows.values())) == []
    assert wrong([{**rows["wrong loss"], "provider": "ours"}, {**rows["ours"], "status": "not run"}]) == ["ours"]
    assert wrong([{**rows["wrong head"], "provider": "ours-staged"}]) == ["ours-staged"]
    assert rows["wrong gradient"]["ms"] > 0  # reported, though not ranked
    table = "\n".join(markdown(list(rows.values()), "gate"))
    assert "**out of bound**: error of dhidden" in table
    assert "| 1. ours" in table
    assert "| 2. " not in table


@pytest.mark.parametrize("mode", ["train", "frozen", "score"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_provider_takes_part_or_says_why_not(dtype: str, mode: str) -> None:
    names = [name for name in EVERYONE if name != "naive-compiled"] + ["ours-staged"]
    rows = run_case(dataclasses.replace(CASE, dtype=dtype, mode=mode), [PROVIDERS[n] for n in names], ignore)
    assert [row["provider"] for row in rows] == names
    for row in rows:
        assert row["status"] in ("ok", "missing"), (row["provider"], row["reason"])
        assert row["status"] == "ok" or row["reason"]
    taking_part = {row["provider"] for row in rows if row["status"] == "ok"}
    assert {"ours", "ours-two-pass", "ours-staged", "naive"} <= taking_part
    table = "\n".join(markdown(rows, "everyone"))
    assert all(name in table for name in names)


def test_a_missing_provider_stands_in_the_table_with_its_reason() -> None:
    def make(problem: Problem) -> Functions:
        raise Missing("not installed: No module named 'fast'")

    rows = run_case(CASE, [PROVIDERS["naive"], Provider("fast", make)], ignore)
    assert [row["status"] for row in rows] == ["ok", "missing"]
    assert "Missing: fast: not installed: No module named 'fast'." in "\n".join(markdown(rows, "missing"))


def test_peak_memory_sees_what_a_step_holds_and_nothing_else() -> None:
    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        held = torch.ones(64 << 18)  # 64 MiB
        return (hidden.sum() + weight.sum()) * held[0]

    measured = peak_memory(Functions(loss, None), make_problem(CASE), "train")
    if measured["memory_bytes"] is None:
        assert "cannot be set back" in measured["memory_reason"]
    else:
        assert 63 < measured["memory_bytes"] / 2**20 < 68


CRASHING_WORKER = """
import json, os, sys
from benchmarks import providers, runner
def make(problem):
    return providers.Functions(lambda hidden, weight: os._exit(3), None)
providers.PROVIDERS["crash"] = providers.Provider("crash", make)
runner.work(json.load(sys.stdin), sys.stdout)
"""


@pytest.mark.slow
def test_a_provider_that_kills_its_process_loses_its_own_rows_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "COMMAND", [sys.executable, "-c", CRASHING_WORKER])
    cases = [dataclasses.replace(CASE, head=head, providers=("naive", "crash", "ours")) for head in ("a", "b")]
    kept: list[dict] = []
    with (tmp_path / "log").open("w") as log:
        rows = runner.run_cases(cases, DEADLINE, kept.append, log)
    assert kept == rows
    assert sorted((row["head"], row["provider"], row["status"]) for row in rows) == [
        ("a", "crash", "failed"),
        ("a", "naive", "ok"),
        ("a", "ours", "ok"),
        ("b", "crash", "failed"),
        ("b", "naive", "ok"),
        ("b", "ours", "ok"),
    ]
    assert all("ended with code 3" in row["reason"] for row in rows if row["provider"] == "crash")


@pytest.mark.slow
def test_cases_that_the_time_does_not_reach_are_named(tmp_path: Path) -> None:
    case = dataclasses.replace(CASE, providers=("naive", "ours"))
    with (tmp_path / "log").open("w") as log:
        rows = runner.run_cases([case], -1.0, ignore, log)
    assert [(row["provider"], row["status"]) for row in rows] == [("naive", "not run"), ("ours", "not run")]


def test_cases_survive_the_way_to_their_worker() -> None:
    for suite in SUITES:
        for case in cases_of(suite, "cpu") + cases_of(suite, "cpu", tiny=True):
            assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
            assert set(case.providers) <= set(PROVIDERS)
    assert all(case.N % 2 and case.H % 2 and case.V % 2 for case in cases_of("errors", "cpu"))
    assert {case.N for case in cases_of("memory", "cpu")} == {3072, 12288}
    assert {case.N for case in cases_of("cpu-loss", "cpu")} == {1536}


@pytest.mark.slow
def test_the_commands_write_rows_tables_and_a_plot(tmp_path: Path) -> None:
    commands = {
        "cpu": ["-m", "benchmarks", "--dry-run", "--suite", "cpu-loss", "--suite", "memory"],
        "gpu": ["-m", "benchmarks.gpu", "--dry-run", "--skip-tests"],
    }
    running = {
        name: subprocess.Popen(
            [sys.executable, *command, "--out", str(tmp_path / name), "--seconds", str(DEADLINE)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, command in commands.items()
    }
    printed = {name: process.communicate(timeout=DEADLINE)[0] for name, process in running.items()}
    for name, process in running.items():
        assert process.returncode == 0, printed[name]

    files = sorted(path.name.split("-", 3)[3] for path in (tmp_path / "cpu").iterdir())
    suites = ("cpu-loss", "memory")
    assert files == [f"{suite}-cpu-tiny.{kind}" for suite in suites for kind in ("jsonl", "md")]
    for suite in suites:
        (path,) = (tmp_path / "cpu").glob(f"*-{suite}-cpu-tiny.jsonl")
        rows = read_rows(path)
        assert {row["status"] for row in rows} == {"ok"}, [row["reason"] for row in rows]
        assert all(row["commit"] and row["versions"]["torch"] and row["device_name"] and row["date"] for row in rows)

    out = tmp_path / "gpu"
    results = json.loads((out / "results.json").read_text())
    assert results["rows"] == read_rows(out / "rows.jsonl")
    assert {row["status"] for row in results["rows"] if row["suite"] == "errors"} == {"ok"}
    timed = [row for row in results["rows"] if row["suite"] == "gpu" and row["provider"] == "ours"]
    assert len(timed) == len(cases_of("gpu", "cpu", tiny=True))
    assert all(row["status"] == "ok" and row["ms"] > 0 and row["over_floor"] > 0 for row in timed)
    assert results["about"]["step"] == results["about"]["kernels"] == "done", (out / "worker.log").read_text()
    table = (out / "table.md").read_text()
    assert table.startswith("# The fused D2O loss: a dry run, not a measurement")
    assert "| shared |" in table
    assert "| logit_grad |" in table
    assert {row["provider"] for row in results["step"]["rows"]} == {"shared", "unshared", "padded"}
    assert all(row["status"] == "ok" for row in results["kernels"]["rows"])
    assert len(list(out.iterdir())) <= 8
    if results["about"]["plot"] == "roofline.png":
        assert (out / "roofline.png").stat().st_size > 10_000
    else:
        assert "matplotlib is not installed" in results["about"]["plot"]


def test_a_plot_of_nothing_says_so(tmp_path: Path) -> None:
    assert roofline([], tmp_path / "plot.png") is not None
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "dry_run", "passed"),
    [
        ("pass", False, True),
        ("assert False", False, False),
        ("pytest.skip()", False, False),
        ("pytest.skip()", True, True),
    ],
    ids=["passes", "fails", "nothing ran on a GPU", "nothing ran in a dry run"],
)
def test_the_gpu_commands_exit_status_tells_of_its_tests(
    body: str, dry_run: bool, passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository has a single test; the other stages succeed."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(f"import pytest\n@pytest.mark.gpu\ndef test_one():\n    {body}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a CUDA device\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "run_cases", lambda *arguments: [{"status": "ok", "provider": "ours"}])
    monkeypatch.setattr(gpu, "run_stage", lambda *arguments: ("done", {}, ""))
    monkeypatch.setattr(gpu, "markdown", lambda *arguments: [])
    assert gpu.run_all(tmp_path, "cpu", dry_run, False, 1.0) == (0 if passed else 1)


@pytest.mark.parametrize(
    ("statuses", "stage", "code"),
    [(["ok"], "done", 0), (["ok", "out of bound"], "done", 1), ([], "done", 1), (["ok"], "ended with code 1", 1)],
)
def test_the_gpu_commands_exit_status_tells_of_its_stages(
    statuses: list[str], stage: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"provider": "ours", "status": status} for status in statuses]
    monkeypatch.setattr(gpu, "run_cases", lambda *arguments: rows)
    monkeypatch.setattr(gpu, "run_stage", lambda *arguments: (stage, {}, ""))
    monkeypatch.setattr(gpu, "markdown", lambda *arguments: [])
    assert gpu.run_all(tmp_path, "cpu", True, True, 1.0) == code


@pytest.mark.slow
def test_the_gpu_command_refuses_to_pretend() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, env=hidden, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no CUDA device here; --dry-run" in done.stderr

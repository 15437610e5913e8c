"""The benchmark of a whole step: its providers compute the same thing, and its files hold the measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step
from benchmarks.step import PROVIDERS, Shape, Workload, measure, step_table
from d2o_fast.forward.batch import pack


@pytest.mark.parametrize("ragged", [False, True])
def test_every_provider_takes_the_same_step(ragged: bool) -> None:
    work = Workload(Shape(P=12, R=8, K=2, G=2, ragged=ragged), "cpu", tiny=True)
    gradients: dict[str, list[torch.Tensor]] = {}
    zero_grad = work.optimizer.zero_grad
    results = {}
    for name in PROVIDERS:
        work.optimizer.zero_grad = lambda: None  # type: ignore[method-assign, assignment]
        results[name] = work.step(name)
        gradients[name] = [p.grad.clone() for p in work.model.parameters()]
        zero_grad()
    for name in ("shared", "unshared"):
        assert results[name] == pytest.approx(results["padded"], rel=1e-4)
        for mine, true in zip(gradients[name], gradients["padded"], strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-5)


def test_tokens_are_those_that_are_read() -> None:
    work = Workload(Shape(P=12, R=8, K=2, G=2, ragged=True), "cpu", tiny=True)
    padded = pack(work.examples, 0)
    assert work.tokens("padded") == padded.input_ids.numel()
    assert work.tokens("unshared") == padded.num_tokens < padded.input_ids.numel()
    arguments, index = step.separate_batch(padded, work.examples)
    assert arguments["input_ids"].shape == (1, padded.num_tokens)
    assert torch.equal(arguments["input_ids"][0][index], padded.input_ids.flatten()[padded.predict_index])
    prompts = sum(len(example.prompt_ids) for example in work.examples)
    assert work.tokens("shared") == prompts + padded.layout.num_tokens


def test_a_step_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(work: Workload, provider: str) -> tuple[float, float]:
        return (1.0, 2.0) if provider == "padded" else (1.0, 2.1)

    monkeypatch.setattr(Workload, "step", wrong)
    rows = measure(Shape(P=4, R=4, K=1, G=1, ragged=False), "cpu", True, rounds=1)
    assert [row["status"][:12] for row in rows] == ["out of bound", "out of bound", "ok"]
    assert ["ms" in row for row in rows] == [False, False, True]
    assert sum("**out of bound" in line for line in step_table(rows)) == 2


@pytest.mark.slow
def test_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one = [Shape(P=8, R=4, K=1, G=1, ragged=False)]
    monkeypatch.setattr(step, "shapes", lambda *args: one)
    assert step.main(["--dry-run", "--out", str(tmp_path)]) == 0
    content: dict[str, Any] = json.loads((tmp_path / "step-cpu-tiny.json").read_text())
    assert [row["provider"] for row in content["rows"]] == list(PROVIDERS)
    assert all(row["ms"] > 0 and row["rounds"] == 2 for row in content["rows"])
    assert content["about"]["versions"]["torch"] == torch.__version__
    text = (tmp_path / "step-cpu-tiny.md").read_text()
    assert "a dry run, not a measurement" in text
    assert f"| {24 / 16:.2f} |" in text  # (8 + 4) * 2 tokens padded, 8 + 2 * 4 shared
    assert text.strip() in capsys.readouterr().out

"""The sampler benchmarks: a sampler that does not draw from the softmax is not timed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import samplers
from benchmarks.samplers import QUICK, gate, generate_loop, measure, ours, random_model, rates, word_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model()


def changed(sampler: samplers.Sampler, what: str) -> samplers.Sampler:
    def sample(prompts: Sequence[Sequence[int]], num: int, longest: int, seed: int) -> samplers.Draws:
        draws = sampler(prompts, num, longest, seed)
        if what == "one is missing":
            draws[-1].pop()
        if what == "one is cut":
            draws[0][0] = [5]
        if what == "one goes on":
            draws[0][0] = [0, 5, 5, 5]
        if what == "a prompt is missing":
            draws.pop()
        return draws

    return sample


def test_a_sampler_that_draws_from_something_else_is_not_timed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ours(model)
    assert gate(right, model, QUICK, 300) is None
    for what, message in (
        ("one is missing", "2 responses to prompt 1 instead of 3"),
        ("one is cut", "a response of 1 tokens that neither EOS nor its length ended"),
        ("one goes on", "a response of 4 tokens that neither"),
        ("a prompt is missing", "responses to 1 prompts instead of 2"),
    ):
        assert message in str(gate(changed(right, what), model, QUICK, 300))
    generate = type(model).generate

    def top_k(self: Any, *args: Any, **kwargs: Any) -> Any:  # generate's default
        return generate(self, *args, **{**kwargs, "top_k": 15})

    loop = generate_loop(model, together=True)
    assert gate(loop, model, QUICK, 300) is None
    monkeypatch.setattr(type(model), "generate", top_k)
    wrong = gate(loop, model, QUICK, 300)
    assert wrong is not None
    assert "standard deviations off the softmax (300 draws)" in wrong
    monkeypatch.undo()
    rows = measure(
        model, {"wrong": changed(right, "one is cut"), "right": right, "none": "no such\nthing"}, QUICK, 2, 300
    )
    assert [len(row["seconds"]) for row in rows] == [0, 2, 0]
    lines = rates(rows, QUICK)
    assert "| wrong | **not measured**: a response of 1 tokens" in lines[2]
    assert "| none | **not measured**: no such thing |" in lines[4]


def test_words_are_tokens() -> None:
    tokenizer = word_tokenizer()
    ids = [*range(1, samplers.V), 0]
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


def test_every_sampler_runs_and_the_file_says_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samplers.main(["--dry-run", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "samplers-cpu-tiny.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert text.startswith("# Samplers on a CPU: a dry run, not a measurement\n")
    assert ", commit " in text
    assert "transformers 5" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 4
    assert all(float(row[1].split()[0]) > 0 for row in rows)
    assert rows[1][3] == "1.00 |"


def test_without_a_server_the_line_says_why(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def none(*args: Any) -> Any:
        raise RuntimeError("transformers serve cannot be started: not here")
        yield

    monkeypatch.setattr(samplers, "transformers_serve", none)
    with samplers.samplers(model, word_tokenizer(), None) as found:
        assert [value for value in found.values() if isinstance(value, str)] == [
            "transformers serve cannot be started: not here"
        ]

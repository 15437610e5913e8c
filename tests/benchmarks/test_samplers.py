"""The sampler benchmarks: a sampler that draws from something else is not timed, and a lost anchor is seen."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sampler_faults, samplers
from benchmarks.samplers import QUICK, gate, generate_loop, measure, ours, random_model, table, word_tokenizer


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

    def top_k(self: Any, *args: Any, **kwargs: Any) -> Any:  # what generate does where nobody asks for something else
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
    lines = table(rows, QUICK)
    assert "| wrong | **not measured**: a response of 1 tokens" in lines[2]
    assert "| none | **not measured**: no such thing |" in lines[4]


def test_words_are_tokens() -> None:
    tokenizer = word_tokenizer()
    ids = [*range(1, samplers.V), 0]
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


def test_every_sampler_runs_and_the_file_says_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samplers.main(["--quick", "--output_dir", str(tmp_path)]) == 0
    text = (tmp_path / "samplers-cpu.md").read_text()
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


def test_faults_lose_nothing_and_a_lost_anchor_would_be_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sampler_faults.main(["--quick", "--output_dir", str(tmp_path)]) == 0
    text = (tmp_path / "sampler-faults.md").read_text()
    assert text.strip() in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == [
        "no server yet: connection refused",
        "500",
        "500 for good from the sixth request on",
    ]
    assert [row[3:] for row in rows] == [["15", "0", "0", "yes"]] * 3
    assert rows[1][1:3] == ["4", "asked again 4 times, same seed"]
    assert "an error that names row and fault" in rows[2][2]
    row = {"held": 15, "lost": 0, "added": 0}
    assert sampler_faults.whole(row)
    for worse in ({"held": 14}, {"lost": 1}, {"added": 1}):
        assert not sampler_faults.whole({**row, **worse})


def test_what_is_made_up_or_held_twice_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The comparison itself, on stores whose texts are not what the proxy sent."""

    class Stores(sampler_faults.Stores):
        def __init__(self, held: list[str]) -> None:
            self.url, self.folder, self.vllm, self.held = "http://nowhere", tmp_path, False, held

        def make(self, name: str, proxy: Any, timeout: float = 30.0) -> Any:
            for seed, texts in enumerate((["a", "b"], ["c"], [])):
                proxy.log.append(
                    {"body": {"max_tokens": sampler_faults.LONGEST, "seed": seed}, "texts": texts, "fault": None}
                )
            proxy.log.append(proxy.log[0])

        def texts(self, store: Any) -> list[str]:
            return self.held

    fault = sampler_faults.Fault("none", "none", ())
    for held, lost, added in ((["a", "b", "c"], 0, 0), (["a", "a", "c"], 1, 1), (["a", "b", "c", "canned"], 0, 1)):
        row = sampler_faults.try_fault(Stores(held), fault, ["a", "b", "c"])
        assert (row["lost"], row["added"], row["same"]) == (lost, added, held == ["a", "b", "c"])

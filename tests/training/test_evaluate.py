"""Judges are found or refused clearly, and the shares they give are counted over the model's own responses."""

from __future__ import annotations

import types

import pytest
import torch

from d2o_fast.config import D2OConfig, load_function
from d2o_fast.data.reading import rows_from
from d2o_fast.data.row import prompt_text
from d2o_fast.data.tokens import tokenize_rows
from d2o_fast.errors import D2OError
from d2o_fast.training.evaluate import judge_model
from tiny import tiny_model, tiny_rows, tiny_tokenizer

CUT = {"max_length": 32, "max_completion_length": 28, "truncation_mode": "keep_end"}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def _judge(model, judge, records=None, tokenizer=None, **settings):
    settings = {"max_length": 64, "max_completion_length": 8, "sampling_batch_size": 3, **settings}
    rows = rows_from(tiny_rows(8) if records is None else records)
    return judge_model(model, tokenizer or tiny_tokenizer(), rows, judge, D2OConfig(**settings))


def test_load_judge_returns_the_function() -> None:
    assert load_function("d2o_fast.training.evaluate:prompt_text") is prompt_text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("d2o_fast.training.evaluate", "of the form 'package.module:function'"),
        (":judge", "of the form"),
        ("no_such_package.module:judge", "module 'no_such_package.module' cannot be imported"),
        (
            "d2o_fast.training.evaluate:no_such",
            "expected a function 'no_such' in d2o_fast.training.evaluate, found nothing",
        ),
        ("d2o_fast.training.evaluate:__doc__", "found a str"),
    ],
)
def test_load_judge_says_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(D2OError, match=message):
        load_function(name)


def test_an_error_inside_the_judges_module_is_not_hidden(tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_judge.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        load_function("broken_judge:judge")


def test_shares_are_counted_over_all_responses(model) -> None:
    def judge(prompt: str, response: str) -> str:
        return "long" if len(response) > 12 else "short"

    metrics, samples = _judge(model, judge, judge_num_generations=5)
    assert len(samples) == 8 * 5
    long = sum(len(sample["response"]) > 12 for sample in samples)
    assert 0 < long < 40
    assert metrics == {"judge/long": long / 40, "judge/short": (40 - long) / 40}
    assert samples[0].keys() == {"prompt", "response", "label"}
    assert [sample["prompt"] for sample in samples[::5]] == [row["prompt"] for row in tiny_rows(8)]


def test_declared_labels_are_reported_as_zero(model) -> None:
    def judge(prompt: str, response: str) -> str:
        return "b"

    judge.labels = ("a", "b")  # type: ignore[attr-defined]
    metrics, _ = _judge(model, judge)
    assert metrics == {"judge/a": 0.0, "judge/b": 1.0}


def test_scores_are_averaged(model) -> None:
    metrics, samples = _judge(model, lambda prompt, response: float(len(response)))
    mean = sum(len(sample["response"]) for sample in samples) / len(samples)
    assert metrics == {"judge/score": pytest.approx(mean)}
    assert mean > 0
    assert samples[0].keys() == {"prompt", "response", "score"}


@pytest.mark.parametrize(
    ("verdicts", "message"), [([None], "returned None"), (["good", 1.0], "labels for some responses and scores")]
)
def test_a_judge_that_returns_something_else_is_refused(model, verdicts, message) -> None:
    answers = iter(verdicts * 8)
    with pytest.raises(D2OError, match=message):
        _judge(model, lambda prompt, response: next(answers))


def test_each_prompt_is_judged_once_and_only_so_many(model) -> None:
    twice = [row for row in tiny_rows(6) for _ in range(2)]
    _, samples = _judge(model, lambda p, r: "x", records=twice, judge_max_prompts=4)
    assert [sample["prompt"] for sample in samples] == [row["prompt"] for row in tiny_rows(4)]


def test_responses_hold_no_special_tokens_and_no_prompt(model) -> None:
    _, samples = _judge(model, lambda p, r: "x", judge_num_generations=4)
    assert not any("</s>" in sample["response"] or "<pad>" in sample["response"] for sample in samples)
    assert not any(sample["response"].startswith("how to") for sample in samples)


def test_same_seed_same_responses_and_the_model_stays_as_it_was() -> None:
    model = tiny_model().train()
    before = torch.get_rng_state()
    _, first = _judge(model, lambda p, r: "x")
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    _, again = _judge(model, lambda p, r: "x")
    _, other = _judge(model, lambda p, r: "x", sampling_seed=1)
    assert first == again
    assert first != other


def test_batches_do_not_repeat_each_others_draws(model) -> None:
    # Two prompts that are one and the same to the model: they differ in what is cut off.
    records = [{"prompt": f"{word} how to open the lock? how to open the lock?", "rejected": "no"} for word in "ab"]
    ids = [example.prompt_ids for example in tokenize_rows(rows_from(records), tiny_tokenizer(), D2OConfig(**CUT))]
    assert ids[0] == ids[1]
    _, samples = _judge(model, lambda p, r: "x", records=records, sampling_batch_size=1, judge_num_generations=6, **CUT)
    assert [s["response"] for s in samples[:6]] != [s["response"] for s in samples[6:]]


def test_no_prompts_is_an_error(model) -> None:
    with pytest.raises(D2OError, match="eval_dataset_name or eval_fraction"):
        judge_model(model, tiny_tokenizer(), [], lambda p, r: "x", D2OConfig())


def test_judges_see_messages_as_text() -> None:
    def row(prompt):
        return types.SimpleNamespace(prompt=prompt)

    assert prompt_text(row("plain")) == "plain"
    assert prompt_text(row([{"role": "user", "content": "hi"}])) == "hi"
    system = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert prompt_text(row(system)) == "system: be kind\nuser: hi"


def test_chat_prompts_are_judged() -> None:
    records = [
        {
            "prompt": [{"role": "user", "content": "how to open the lock?"}],
            "rejected": [{"role": "assistant", "content": "go away"}],
        }
    ]
    seen = []
    _judge(
        tiny_model(chat=True),
        lambda prompt, response: seen.append(prompt) or "x",  # type: ignore[func-returns-value]
        records=records,
        tokenizer=tiny_tokenizer(chat=True),
    )
    assert seen == ["how to open the lock?"]

"""Judges are found or refused clearly, and the shares they give are counted over the model's own responses."""

from __future__ import annotations

import math
import operator
import re
import sys
import types

import numpy as np
import pytest
import torch

from d2o_fast.config import D2OConfig
from d2o_fast.data.reading import rows_from
from d2o_fast.data.row import prompt_text
from d2o_fast.data.tokens import tokenize_rows
from d2o_fast.errors import D2OError, DataError
from d2o_fast.functions import load_function
from d2o_fast.training.evaluate import judge_model, load_judge
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
    assert load_function("operator:concat") is operator.concat
    assert load_judge(D2OConfig(judge="operator:concat")) is operator.concat
    assert load_judge(D2OConfig()) is None


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


MODULES = {
    "def judge(prompt, response): return 1 / 0\n": "",
    "1 / 0\n": "raises ZeroDivisionError: division by zero (FILE, line 1)",
    "import sys\n\nsys.exit()\n": "raises SystemExit (FILE, line 3)",
    "def judge(:\n": "raises SyntaxError: invalid syntax (",
    "import no_such\n": "cannot be imported (ModuleNotFoundError: No module named 'no_such' (FILE, line 1",
    "def judges(prompt, response): pass\n": "did you mean 'some_judge:judges'?",
    "def judge(prompt): pass\n": "must take (prompt, response), two texts: too many positional arguments",
    "def judge(prompt, response, *, strict): pass\n": "must take (prompt, response), two texts: missing a required",
    "class judge:\n    pass\n": "must take (prompt, response)",
    "async def judge(prompt, response): pass\n": "is an async function; it must return its answer itself",
    "async def judge(prompt, response): yield 1\n": "is an async function; it must return its answer itself",
    "def judge(prompt, response): yield 1\n": "is a generator function; it must return its answer itself",
    "class J:\n    async def __call__(self, p, r): pass\njudge = J()\n": "is an async function",
    "class judge:\n    def __init__(self, p, r): pass\n": "is a class; it must be a function, or an object of the",
    "judge = 5\n": "expected a function 'judge' in some_judge, found a int",
    "def judge(p, r): pass\njudge.labels = 'ab'\n": "attribute labels is 'ab'; it must be a list of texts",
    "def judge(p, r): pass\njudge.labels = [1]\n": "attribute labels is [1]; it must be a list of texts",
    "def __getattr__(name): raise OSError('no')\n": "raises OSError: no (FILE, line 1)",
}


@pytest.mark.parametrize(("text", "message"), MODULES.items())
def test_a_judge_is_tried_before_it_judges(text, message, tmp_path, monkeypatch) -> None:
    path = tmp_path / "some_judge.py"
    path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "some_judge", raising=False)
    if not message:
        assert callable(load_judge(D2OConfig(judge="some_judge:judge")))
        return
    with pytest.raises(D2OError) as error:
        load_judge(D2OConfig(judge="some_judge:judge"))
    assert message.replace("FILE", str(path)) in str(error.value)
    assert "judge" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "raised", [KeyError("a key"), SystemExit(), RecursionError("too deep"), ValueError("x" * 5000)]
)
def test_a_judge_that_raises_is_named_with_the_row(model, raised) -> None:
    calls = []

    def judge(prompt: str, response: str) -> str:
        calls.append(prompt)
        if len(calls) == 3:
            raise raised
        return "good"

    with pytest.raises(DataError) as error:
        _judge(model, judge)
    assert error.value.__cause__ is raised
    assert (error.value.source, error.value.row) == ("train_dataset", 3)
    text = str(error.value)
    assert re.search(rf"row 3: judge '{__name__}:test_.*judge' raises {type(raised).__name__}", text)
    assert f"{__file__}, line " in text
    assert repr(calls[-1])[1:-1] in text
    assert "\n" not in text
    assert len(text) < 1000


def test_a_judge_may_raise_what_has_no_text(model) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def judge(prompt: str, response: str) -> str:
        raise Mute

    with pytest.raises(DataError, match="raises Mute"):
        _judge(model, judge)


@pytest.mark.parametrize("score", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(True), np.True_])
def test_a_score_may_be_a_number_of_numpy_or_torch(model, score) -> None:
    assert _judge(model, lambda p, r: score)[0] == {"judge/score": float(score)}


def test_half_a_character_in_a_label_is_escaped(model) -> None:
    assert _judge(model, lambda p, r: "a\ud800")[0] == {"judge/a\\ud800": 1.0}


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
    ("verdicts", "message"),
    [
        ([None], r"row 1: judge '.*' returned None for '.*' after the prompt 'how to open the lock\?'"),
        (["good", 1.0], "row 2: .* labels for some responses and scores"),
        ([1.0, math.nan], "row 2: .* returned nan"),
        ([1.0, 10**400], "row 2: .* returned 1000"),
        ([torch.ones(2)], "row 1: .* returned tensor"),
        ([{"score": 1}], "row 1: .* returned {'score': 1}"),
    ],
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

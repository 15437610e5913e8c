"""A run that collapses says so once, in words; one that works says nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from d2o_fast import D2OConfig
from d2o_fast.training.watch import DROP, FALLING_LOGS, Watch
from tiny import tiny_run


def watch(beta: float = 0.1) -> Watch:
    return Watch(D2OConfig(beta=beta), anchor_tokens=20.0)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def logs(found: Watch, chosen: list[float], rejected: list[float]) -> None:
    for step, (first, second) in enumerate(zip(chosen, rejected, strict=True), start=1):
        found.log(step, {"rewards/chosen": first, "rewards/rejected": second})


def test_rewards_that_fall_together_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    falling = [-0.01 * step for step in range(3 * FALLING_LOGS)]
    logs(watch(), falling, falling)
    (said,) = warnings(caplog)
    assert f"have both fallen over {FALLING_LOGS} log lines" in said
    assert "Lower learning_rate or alpha, raise beta or anchor_weight" in said


def test_a_good_run_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    steps = range(3 * FALLING_LOGS)
    logs(watch(), [0.002 * step * (-1) ** step for step in steps], [-0.05 * step for step in steps])
    logs(watch(), [-0.3] * 100, [-0.02 * step for step in range(100)])  # they fell, and stay there
    assert warnings(caplog) == []


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_anchors_that_become_unlikely_are_named(beta: float, caplog: pytest.LogCaptureFixture) -> None:
    reward = -1.5 * DROP * beta * 20.0  # 1.5 nats a token
    logs(watch(beta), [0.0, *[reward] * 40], [0.0] * 41)
    (said,) = warnings(caplog)
    assert "the anchors' tokens are 1." in said
    assert "nats less likely than at the start on average" in said


@pytest.mark.parametrize(
    ("responses", "word"),
    [
        ([""] * 6 + ["fine"] * 2, "are empty"),
        ([" \n"] * 8, "are empty"),
        (["no no no " * 12 + str(i) for i in range(8)], "repeat themselves"),
        (["ha" * 60 + str(i) for i in range(8)], "repeat themselves"),
        (["I cannot help with that"] * 8, "are the same text"),
        ([f"answer {i}: take {i} eggs, beat them and wait {i * 7} minutes for the oven" for i in range(8)], None),
        (["", "", "", "yes", "no", "maybe", "never", "often"], None),
        ([""] * 3, None),  # too few to tell
    ],
    ids=["empty", "blank", "words", "letters", "same", "fine", "few empty", "three"],
)
def test_responses_that_are_garbage_are_named(
    responses: list[str], word: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    found = watch()
    samples = [{"prompt": f"p{i}", "response": text, "score": 1.0} for i, text in enumerate(responses)]
    for step in (1, 2):
        found.responses(step, samples)
    said = warnings(caplog)
    assert len(said) == (word is not None)
    assert all(text.startswith("step 1: ") and str(word) in text for text in said)


def test_draws_for_the_same_prompt_may_be_equal(caplog: pytest.LogCaptureFixture) -> None:
    watch().responses(1, [{"prompt": f"p{i % 2}", "response": "yes", "score": 1.0} for i in range(8)])
    assert warnings(caplog) == []
    watch().responses(1, [{"prompt": f"p{i % 4}", "response": "yes", "score": 1.0} for i in range(8)])
    assert "are the same text" in warnings(caplog)[0]


def test_a_run_that_collapses_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"learning_rate": 0.1, "max_steps": 40, "alpha": 1.0, "beta": 0.001, "eval_steps": 0}
    tiny_run(tmp_path / "run", **settings).train()
    assert any("nats less likely than at the start" in text for text in warnings(caplog))


def test_an_evaluation_that_overflows_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    found = watch()
    for step in (3, 6):
        found.evaluation(step, {"eval_loss": float("nan"), "eval_rewards/chosen": 0.1})
    (said,) = warnings(caplog)
    assert said.startswith("step 3: the evaluation's eval_loss is not finite")

"""Warns once, in words, of a run that collapses: the loss can fall while every answer turns into garbage."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from d2o_fast.config import D2OConfig

logger = logging.getLogger("d2o_fast")

FALLING_LOGS = 30  #: log lines in a row in which both smoothed rewards fall
DROP = 1.0  #: nats per token that the anchors may lose: each token is then e times less likely than it was
SHARE = 0.5  #: of the responses at an evaluation that may be empty, equal to another's, or repeat themselves
_ADVICE = (
    "Lower learning_rate or alpha, raise beta or anchor_weight, or draw anchors more often (refresh_every); look at "
    "responses with a judge"
)


class Watch:
    """Reads the metrics of each log line and the responses of each evaluation.

    Args:
        anchor_tokens: mean length of the anchors, in tokens.
    """

    def __init__(self, config: D2OConfig, anchor_tokens: float) -> None:
        self.beta, self.anchor_tokens = config.beta, max(1.0, anchor_tokens)
        self.smooth: tuple[float, float] | None = None  # rewards of anchors and negatives
        self.falling = 0
        self.said: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Looks at the training metrics of one log line."""
        rewards = metrics["rewards/chosen"], metrics["rewards/rejected"]
        if not all(map(math.isfinite, rewards)):  # every step was left out
            return
        before, keep = self.smooth or rewards, 0.9
        self.smooth = keep * before[0] + (1 - keep) * rewards[0], keep * before[1] + (1 - keep) * rewards[1]
        falls = self.smooth[0] < before[0] and self.smooth[1] < before[1]
        self.falling = self.falling + 1 if falls else 0
        if self.falling >= FALLING_LOGS and self.smooth[0] < 0:
            self._say(
                "falling",
                f"step {step}: the rewards of the anchors and of the negatives have both fallen over {self.falling} "
                "log lines: the model loses its own answers together with the rejected ones",
            )
        drop = -self.smooth[0] / self.beta / self.anchor_tokens if self.beta else 0.0
        if drop > DROP:
            self._say(
                "drop",
                f"step {step}: the anchors' tokens are {drop:.1f} nats less likely than at the start on average: the "
                "model is far from where it began",
            )

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Looks at the metrics of an evaluation."""
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            self._say(
                "evaluation", f"step {step}: the evaluation's {', '.join(bad)} is not finite, with finite weights"
            )

    def responses(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Looks at the responses that a judge saw at an evaluation."""
        texts = [str(sample["response"]).strip() for sample in samples]
        if len(texts) < 4:
            return
        prompts = len({sample["prompt"] for sample in samples})
        shares = {
            "are empty": sum(not text for text in texts) / len(texts),
            "repeat themselves": sum(map(_repeats, texts)) / len(texts),
            "are the same text": 1 - len(set(texts)) / prompts,  # draws for one prompt may be equal
        }
        kind, share = max(shares.items(), key=lambda item: item[1])
        if share > SHARE:
            self._say("garbage", f"step {step}: {share:.0%} of the {len(texts)} responses drawn {kind}")

    def _say(self, kind: str, text: str) -> None:
        if kind not in self.said:
            self.said.add(kind)
            logger.warning("%s. %s", text, _ADVICE)


def _repeats(text: str) -> bool:
    """Whether more than half of the places of a long text begin 12 characters that occur before."""
    pieces = [text[i : i + 12] for i in range(len(text) - 11)]
    return len(pieces) >= 48 and len(set(pieces)) < len(pieces) / 2

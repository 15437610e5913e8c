"""Chooses which draws become anchors: drops empty, truncated, overlapping, duplicate and low-scored ones.

All filters are off by default: anchors represent the model's own distribution, and each filter bends it. A dropped draw
is counted under a reason and never replaced. A prompt may lose all its draws; then it has no anchors.

K anchors of one prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from d2o_fast.anchors.scorers import load_scorer
from d2o_fast.config import DEFAULTS, D2OConfig, having
from d2o_fast.data.row import Example, Row, prompt_text
from d2o_fast.errors import DataError, shown
from d2o_fast.functions import is_finite, pair_text

#: Why a draw was dropped, in the order of the checks. "surplus" draws come after the K first or K best.
REASONS = ("empty", "truncated", "overlap", "duplicate", "score", "surplus")


@dataclass(frozen=True)
class KeptDraws:
    """The draws of one prompt, filtered: up to K anchors as token ids, and a reason for each dropped draw."""

    anchors: list[list[int]]
    dropped: list[str]


class AnchorFilter:
    """The filters that ``config`` sets.

    Args:
        stops: the tokens that end a response.
        device: the device of a classifier.

    Raises:
        D2OError: ``config.anchor_score`` names no usable scorer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: D2OConfig, stops: Sequence[int], device: torch.device
    ) -> None:
        self.tokenizer, self.config, self.stops = tokenizer, config, set(stops)
        self.scorer = None if config.anchor_score is None else load_scorer(config.anchor_score, device)

    def __call__(
        self, rows: Sequence[Row], examples: Sequence[Example], draws: Sequence[Sequence[list[int]]]
    ) -> list[KeptDraws]:
        """The kept ``draws`` of each row, in the order of drawing.

        Raises:
            DataError: a score is not a finite number.
        """
        reasons = [self._reasons(example, of_row) for example, of_row in zip(examples, draws, strict=True)]
        indices = [(r, d) for r, of_row in enumerate(reasons) for d, reason in enumerate(of_row) if reason is None]
        scores = self._scores(rows, draws, indices)
        least = self.config.min_anchor_score
        for (r, d), score in scores.items():
            if least is not None and score < least:
                reasons[r][d] = "score"
        filtered = []
        for r, (of_row, why) in enumerate(zip(draws, reasons, strict=True)):
            left = [d for d, reason in enumerate(why) if reason is None]
            left.sort(key=lambda d: -scores.get((r, d), 0.0))  # ties keep their order
            for d in left[self.config.num_generations :]:
                why[d] = "surplus"
            anchors = [ids for ids, reason in zip(of_row, why, strict=True) if reason is None]
            filtered.append(KeptDraws(anchors, [reason for reason in why if reason is not None]))
        return filtered

    def _reasons(self, example: Example, draws: Sequence[list[int]]) -> list[str | None]:
        config, seen, reasons = self.config, set[tuple[int, ...]](), list[str | None]()
        for ids in draws:
            reason = None
            if "empty" in config.drop_anchors and len(ids) == 1 and ids[0] in self.stops:
                reason = "empty"
            elif "truncated" in config.drop_anchors and ids[-1] not in self.stops:
                reason = "truncated"
            elif (
                config.max_anchor_overlap is not None
                and token_overlap(ids, example.rejected_ids, self.stops) > config.max_anchor_overlap
            ):
                reason = "overlap"
            elif "duplicate" in config.drop_anchors and tuple(ids) in seen:
                reason = "duplicate"
            seen.add(tuple(ids))
            reasons.append(reason)
        return reasons

    def _scores(
        self, rows: Sequence[Row], draws: Sequence[Sequence[list[int]]], indices: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int], float]:
        if self.scorer is None:
            return {}
        pairs = []
        for r, d in indices:
            pairs.append((rows[r], str(self.tokenizer.decode(draws[r][d], skip_special_tokens=True))))
        found = self.scorer(pairs)
        for (row, response), score in zip(pairs, found, strict=True):
            if not is_finite(score) or isinstance(score, bool):
                pair = pair_text(prompt_text(row), response)
                what = f"anchor_score '{self.config.anchor_score}' gives {shown(score)} to {pair}"
                raise DataError(row.source, row.index, "anchors", what, "It must be a finite number, higher for better")
        return dict(zip(indices, map(float, found), strict=True))


def token_overlap(anchor: Sequence[int], negative: Sequence[int], ends: set[int]) -> float:
    """Tokens in common over tokens in either, from 0 to 1. Repeats count; ``ends`` do not."""
    a, b = (Counter(token for token in ids if token not in ends) for ids in (anchor, negative))
    either = (a | b).total()
    return (a & b).total() / either if either else 1.0


# --- Texts -------------------------------------------------------------------------------------------------------


def settings_text(config: D2OConfig) -> str:
    """The settings of the active filters as text; empty if no filter is active."""
    found = {name: getattr(config, name) for name in having("filter")}
    texts = {name: ", ".join(value) if isinstance(value, list) else value for name, value in found.items()}
    return "; ".join(f"{name} {text}" for name, text in texts.items() if found[name] != DEFAULTS[name])


def counts_text(dropped: Iterable[str]) -> str:
    """The count of each reason as ``3 duplicate, 1 empty``, in the order of ``REASONS``; empty without reasons."""
    counts = Counter(dropped)
    return ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts[reason])

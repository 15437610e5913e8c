"""Which of the drawn responses become anchors: duplicates, empty ones, what a score calls bad, and the best of n.

Everything is off by default: anchors stand for the model's own distribution, and each filter bends it. What is dropped
is counted under a reason and never replaced. A prompt may lose all its draws; then it has no anchors.

K anchors of one prompt.
"""

from __future__ import annotations

import inspect
import math
import numbers
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from d2o_fast.config import DEFAULTS, D2OConfig, having
from d2o_fast.data.reading import Row
from d2o_fast.data.tokens import shortened
from d2o_fast.errors import D2OError, DataError
from d2o_fast.forward.batch import Example
from d2o_fast.training.evaluate import load_judge, prompt_text

#: Why a draw was dropped, in the order in which it is asked; "surplus" are those beyond the K first or K best.
REASONS = ("empty", "truncated", "overlap", "duplicate", "score", "surplus")
SCORE_BATCH = 16  #: texts that a classifier reads at a time


@dataclass(frozen=True)
class Filtered:
    """What became of the draws of one prompt: up to K anchors as token ids, and a reason for each of the others."""

    anchors: list[list[int]]
    dropped: list[str]


class AnchorFilter:
    """The filters that ``config`` asks for.

    Args:
        stops: the tokens that end a response.
        device: where a classifier scores.

    Raises:
        D2OError: ``config.anchor_score`` names nothing that can score.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: D2OConfig, stops: Sequence[int], device: torch.device
    ) -> None:
        self.tokenizer, self.config, self.stops = tokenizer, config, set(stops)
        self.scorer = None if config.anchor_score is None else load_scorer(config.anchor_score, device)

    def __call__(
        self, rows: Sequence[Row], examples: Sequence[Example], draws: Sequence[Sequence[list[int]]]
    ) -> list[Filtered]:
        """What is kept of each row's ``draws``, in the order in which it was drawn.

        Raises:
            DataError: a score that is not a finite number.
        """
        reasons = [self._reasons(example, of_row) for example, of_row in zip(examples, draws, strict=True)]
        places = [(r, d) for r, of_row in enumerate(reasons) for d, reason in enumerate(of_row) if reason is None]
        scores = self._scores(rows, draws, places)
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
            filtered.append(Filtered(anchors, [reason for reason in why if reason is not None]))
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
        self, rows: Sequence[Row], draws: Sequence[Sequence[list[int]]], places: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int], float]:
        if self.scorer is None:
            return {}
        pairs = []
        for r, d in places:
            pairs.append((rows[r], str(self.tokenizer.decode(draws[r][d], skip_special_tokens=True))))
        found = self.scorer(pairs)
        for (row, response), score in zip(pairs, found, strict=True):
            number = isinstance(score, numbers.Real) and not isinstance(score, bool)
            if not number or not math.isfinite(score):  # type: ignore[arg-type]
                what = f"anchor_score '{self.config.anchor_score}' gives {score!r} to {shortened(response)!r}"
                raise DataError(row.source, row.index, "anchors", what, "It must be a finite number, higher for better")
        return dict(zip(places, map(float, found), strict=True))


def token_overlap(anchor: Sequence[int], negative: Sequence[int], ends: set[int]) -> float:
    """Tokens in common over tokens in either, as multisets and without those that end a response: from 0 to 1."""
    a, b = (Counter(token for token in ids if token not in ends) for ids in (anchor, negative))
    either = (a | b).total()
    return (a & b).total() / either if either else 1.0


# --- Scores ------------------------------------------------------------------------------------------------------

Pair = tuple[Row, str]  #: a row and the text of a response to its prompt


class FunctionScorer:
    """``score(prompt, response) -> float`` of the user's; the prompt as a judge sees it (``prompt_text``)."""

    def __init__(self, name: str) -> None:
        self.name, self.function = name, load_judge(name, "anchor_score")

    def __call__(self, pairs: Sequence[Pair]) -> list[Any]:
        return [self.function(prompt_text(row), response) for row, response in pairs]

    def source(self) -> str | None:
        """The text of the module that defines the function; None where there is none (a builtin, an extension)."""
        module = inspect.getmodule(self.function)
        try:
            return None if module is None else inspect.getsource(module)
        except (OSError, TypeError):
            return None


class ClassifierScorer:
    """The single output of a sequence classifier: a reward model, or what else gives higher numbers to better texts.

    Where its own tokenizer has a chat template, prompt and response go through it as messages (a prompt that is a
    string as the user's); otherwise as two texts.

    Raises:
        D2OError: it cannot be loaded, has no trained head, or not exactly one output.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, path = name, os.path.expanduser(name)
        what = f"anchor_score '{name}'"
        if name.startswith((".", "/", "~")) and not Path(path).is_dir():
            raise D2OError(f"{what} is not a folder; a function is named like 'package.module:function'")
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path, dtype="auto", output_loading_info=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, ImportError) as error:
            raise D2OError(
                f"{what} cannot be loaded as a sequence classifier with its tokenizer: {error}. A function is named "
                "like 'package.module:function'"
            ) from error
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:4])
            raise D2OError(f"{what} holds no trained classifier (missing: {missing}): its scores would be random")
        if model.config.num_labels != 1:
            labels = ", ".join(map(str, model.config.id2label.values()))
            raise D2OError(
                f"{what} has {model.config.num_labels} outputs ({labels}), and a score is one number. Name a function "
                "'package.module:function' that calls it and returns the one that is meant"
            )
        self.model: Any = model.to(device).eval()
        pad = model.config.get_text_config().pad_token_id
        # A decoder reads its score at the last token that is no padding by its own configuration. Where that and the
        # tokenizer's differ, texts go one by one, without padding.
        self.batch = SCORE_BATCH if pad is not None and pad == self.tokenizer.pad_token_id else 1
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self.longest = min(self.tokenizer.model_max_length, longest)

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(pairs), self.batch):
            encoded = [self._encode(row, response) for row, response in pairs[start : start + self.batch]]
            batch = self.tokenizer.pad(encoded, padding_side="right", return_tensors="pt", verbose=False)
            with torch.no_grad():
                logits = self.model(**batch.to(self.model.device)).logits
            scores += logits.float().flatten().tolist()
        return scores

    def _encode(self, row: Row, response: str) -> Any:
        if self.tokenizer.chat_template is None:
            encoded = self.tokenizer(prompt_text(row), response)
        else:
            messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
            text = self._rendered(row, [*messages, {"role": "assistant", "content": response}])
            encoded = self.tokenizer(text, add_special_tokens=False)
        count = len(encoded["input_ids"])
        if count > self.longest:
            found = f"prompt and response are {count} tokens to anchor_score '{self.name}', which reads {self.longest}"
            raise DataError(row.source, row.index, "anchors", found, "Lower max_length, or use another scorer")
        return encoded

    def _rendered(self, row: Row, messages: list[dict[str, Any]]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template raises what its author chose
            found = f"the chat template of anchor_score '{self.name}' refuses these messages ({shortened(str(error))})"
            raise DataError(row.source, row.index, "prompt", found, "Check the roles and their order") from error


Scorer = FunctionScorer | ClassifierScorer


def load_scorer(name: str, device: torch.device) -> Scorer:
    """What ``anchor_score`` names: ``"package.module:function"``, or the folder or hub name of a sequence classifier.

    Raises:
        D2OError: neither can be loaded, or it is not fit to score.
    """
    is_function = ":" in name and not Path(os.path.expanduser(name)).is_dir()
    return FunctionScorer(name) if is_function else ClassifierScorer(name, device)


# --- What is said of it ------------------------------------------------------------------------------------------


def settings_text(config: D2OConfig) -> str:
    """The filters that are on, by their settings; empty if none is."""
    found = {name: getattr(config, name) for name in having("filter")}
    texts = {name: ", ".join(value) if isinstance(value, list) else value for name, value in found.items()}
    return "; ".join(f"{name} {text}" for name, text in texts.items() if found[name] != DEFAULTS[name])


def counts_text(dropped: Iterable[str]) -> str:
    """Reasons, or how often each occurs, as ``3 duplicate, 1 empty`` in the order of ``REASONS``; empty if none."""
    counts = Counter(dropped)
    return ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts[reason])

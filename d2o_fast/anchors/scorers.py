"""Quality scores of anchors, by a function or a sequence classifier."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from d2o_fast.data.row import Row, prompt_text
from d2o_fast.errors import D2OError, DataError, shortened
from d2o_fast.functions import call_function, load_function
from d2o_fast.model.loading import STRICT
from d2o_fast.model.whole import (
    loading,
    read_config,
    refuse_incomplete,
    refuse_not_finite,
    refuse_odd_files,
    weight_files,
)

SCORE_BATCH = 16  #: texts that a classifier reads at a time


Pair = tuple[Row, str]  #: a row and the text of a response to its prompt


class FunctionScorer:
    """The user's ``score(prompt, response) -> float``. The prompt is the text that a judge gets (``prompt_text``)."""

    def __init__(self, name: str) -> None:
        self.name, self.function = name, load_function(name, "anchor_score")

    def __call__(self, pairs: Sequence[Pair]) -> list[Any]:
        what = f"anchor_score '{self.name}'"
        return [
            call_function(self.function, what, prompt_text(row), response, row.source, row.index)
            for row, response in pairs
        ]

    def source(self) -> str | None:
        """The text of the module that defines the function; None if it has no text (a builtin, an extension)."""
        module = inspect.getmodule(self.function)
        try:
            return None if module is None else inspect.getsource(module)
        except (OSError, TypeError):
            return None


class ClassifierScorer:
    """The single output of a sequence classifier, e.g. a reward model. Higher must mean better.

    If its tokenizer has a chat template, prompt and response become messages (a string is the user's message).
    Otherwise they are a pair of texts.

    Raises:
        D2OError: the classifier cannot be loaded, has no trained head, or does not have exactly one output.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, what = name, f"anchor_score '{name}'"
        if name.startswith((".", "/")) and not Path(name).is_dir():
            raise D2OError(f"{what} is not a folder; a function is named like 'package.module:function'")
        failed = "cannot be loaded as a sequence classifier with its tokenizer"
        if Path(name).is_dir():
            refuse_odd_files(Path(name), what)
            read_config(Path(name), what)
            weight_files(Path(name), what)
        with loading(what, "A function is named like 'package.module:function'", failed):
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                name, dtype="auto", output_loading_info=True, **STRICT
            )
            model, info = loaded
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:4])
            raise D2OError(f"{what} holds no trained classifier (missing: {missing}): its scores would be random")
        refuse_incomplete(info, what)
        refuse_not_finite(model, what)
        if model.config.num_labels != 1:
            labels = ", ".join(map(str, model.config.id2label.values()))
            raise D2OError(
                f"{what} has {model.config.num_labels} outputs ({labels}), and a score is one number. Name a function "
                "'package.module:function' that calls it and returns the one that is meant"
            )
        self.model: Any = model.to(device).eval()
        pad = model.config.get_text_config().pad_token_id
        # A decoder takes its score at the last token that its own configuration does not call padding. If the
        # tokenizer pads with another token, texts are scored one by one, without padding.
        self.batch = SCORE_BATCH if pad is not None and pad == self.tokenizer.pad_token_id else 1
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self.longest = min(self.tokenizer.model_max_length, longest)

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(pairs), self.batch):
            encoded = [self._encode(row, response) for row, response in pairs[start : start + self.batch]]
            batch = self.tokenizer.pad(encoded, padding_side="right", return_tensors="pt", verbose=False)
            try:
                with torch.no_grad():
                    logits = self.model(**batch.to(self.model.device)).logits
            except (RuntimeError, ValueError, IndexError) as error:  # a token or a position that it does not know
                row = pairs[start][0]
                found = f"anchor_score '{self.name}' cannot read it ({shortened(str(error), 200, one_line=True)})"
                raise DataError(row.source, row.index, "anchors", found, "Use another scorer") from error
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
        except Exception as error:  # a template may raise anything
            found = f"the chat template of anchor_score '{self.name}' refuses these messages ({shortened(str(error))})"
            raise DataError(row.source, row.index, "prompt", found, "Check the roles and their order") from error


QualityScorer = FunctionScorer | ClassifierScorer


def load_scorer(name: str, device: torch.device) -> QualityScorer:
    """The scorer ``name``: ``"package.module:function"``, or the folder or hub name of a sequence classifier.

    Raises:
        D2OError: the scorer cannot be loaded, or cannot score.
    """
    is_function = ":" in name and not Path(name).is_dir()
    return FunctionScorer(name) if is_function else ClassifierScorer(name, device)

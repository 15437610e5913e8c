"""The token ids and the positions that a model knows, checked before it reads anything.

On a GPU an id or a position without a row is an assertion on the device, after which the process can do nothing more.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Example, Row
from d2o_fast.errors import D2OError, DataError
from d2o_fast.model.parts import base_of, vocabulary_size

logger = logging.getLogger("d2o_fast")

_TABLE = re.compile(r"(^|[._])(wpe|embed_positions|position_embeddings?|positions_embed)(\.|$)")
_said: set[str] = set()


def most_positions(model: nn.Module) -> int | None:
    """The rows of the model's table of positions; None if it computes them for any length."""
    base = base_of(model)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        # OPT and its like have one or two rows in front.
        if limit is not None and _TABLE.search(name) and tensor.dim() == 2 and 0 <= tensor.shape[0] - limit <= 2:
            return int(limit)
    return None


def check_positions(model: nn.Module, config: D2OConfig) -> None:
    """Refuses rows that are longer than the model's table of positions, and says once that rotary ones are untrained.

    Refuses rotary factors that depend on the longest row of a batch, too: a score would depend on its neighbours, and
    a reference scored beside other prompts would not match the policy.

    Raises:
        D2OError: ``max_length`` allows such rows.
    """
    settings, kind = base_of(model).config.get_text_config(), type(base_of(model)).__name__
    most = most_positions(model)
    if most is not None and config.max_length > most:
        raise D2OError(
            f"max_length is {config.max_length}, but {kind} has {most} positions. Set max_length to {most} or less"
        )
    parameters = getattr(settings, "rope_parameters", None) or {}
    for found in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if found.get("rope_type") not in ("dynamic", "longrope"):
            continue
        limit = (
            found.get("original_max_position_embeddings")
            or getattr(settings, "original_max_position_embeddings", None)
            or settings.max_position_embeddings
        )
        if config.max_length > limit:
            raise D2OError(
                f"max_length is {config.max_length}, but past {limit} tokens {kind} changes the position embeddings "
                f"of a whole batch (rope_type '{found['rope_type']}'), so that a response's log-probability would "
                f"depend on the prompts beside it. Set max_length to {limit} or less"
            )
    trained = vars(settings).get("max_position_embeddings")  # a property of XLNet's says -1
    if isinstance(trained, int) and trained < 1:
        raise D2OError(f"the configuration of {kind} is damaged: max_position_embeddings is {trained}")
    if parameters and isinstance(trained, int) and config.max_length > trained:
        _say(
            f"max_length is {config.max_length}, but {kind} was made for {trained} positions "
            "(max_position_embeddings); rows beyond may be read badly"
        )


def leave_balancing_out(model: nn.Module) -> None:
    """Trains a mixture of experts without the term that balances its experts, and says so once.

    Transformers would compute the term even while responses are drawn, where it fails.
    """
    settings = base_of(model).config.get_text_config()
    if getattr(settings, "output_router_logits", False):
        settings.output_router_logits = False
        _say(
            f"{type(base_of(model)).__name__} asks for a term that balances its experts (output_router_logits); D2O's "
            "loss has no such term, and it is left out"
        )


def _say(text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.warning(text)


class KnownIds:
    """Checks that the model has a row for every token id, before anything is drawn.

    Raises:
        D2OError: the tokenizer's end-of-sequence token has no row.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, config: D2OConfig) -> None:
        self.size, self.positions = vocabulary_size(model), most_positions(model)
        self.tokenizer, self.config = tokenizer, config
        self.draws = config.max_completion_length
        if tokenizer.eos_token_id >= self.size:
            raise D2OError(
                f"the tokenizer's eos_token {tokenizer.eos_token!r} has the id {tokenizer.eos_token_id}, but the model "
                f"knows {self.size} tokens. {_RESIZE}"
            )

    def check(self, row: Row, example: Example) -> None:
        """Refuses a row with an unknown id, or with a prompt that leaves too few positions for a drawn response.

        Raises:
            DataError: names the row, the token and the remedy.
        """
        fields = ["prompt", "rejected", *(f"anchors[{i}]" for i in range(len(example.anchor_ids)))]
        for field, ids in zip(fields, (example.prompt_ids, *example.responses()), strict=True):
            self.check_ids(row, field, ids)
        length = len(example.prompt_ids) + self.draws
        if self.positions is not None and row.anchors is None and length > self.positions:
            found = f"{len(example.prompt_ids)} tokens, and a response drawn after them may have {self.draws} more"
            most = f"the model has {self.positions} positions"
            fix = "Shorten it, lower max_completion_length, or set truncation_mode to keep_end"
            raise DataError(row.source, row.index, "prompt", f"{found}, but {most}", fix)

    def check_ids(self, row: Row, field: str, ids: Sequence[int]) -> None:
        """Refuses ``ids`` of a row's field if the model has no row for one of them.

        Raises:
            DataError: names the row, the token and the remedy.
        """
        largest = max(ids)
        if largest >= self.size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            found = f"the token {token!r} has the id {largest}, but the model knows {self.size} tokens"
            raise DataError(row.source, row.index, field, found, _RESIZE)


_RESIZE = "Use the model's own tokenizer, or save the model after resize_token_embeddings"

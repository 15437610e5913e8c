"""From prompts with their responses to one batch: rows for the transformer, packed response tokens for the head.

Either one row for each response, with its prompt before it (``pack``), or a single row that holds each prompt once
(``pack_shared``, for models that ``forward/sharing.py`` found able to read it). The head sees the same N tokens either way.

Shapes: S responses, T tokens of a row, N response tokens, G prompts, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from d2o_fast.data.row import Example
from d2o_fast.forward.shared_row import Item, SharedSequence, slices_index, take_rows
from d2o_fast.loss.layout import ResponseLayout, on_device


@dataclass(frozen=True)
class PackedBatch:
    """G prompts with all their responses: a row each, padded on the right, or all in one row, each prompt once."""

    input_ids: torch.Tensor  #: (rows, T) int64
    predict_index: torch.Tensor  #: (N,) int64 into the rows' positions: the one that predicts each response token
    targets: torch.Tensor  #: (N,) int64, the response tokens
    layout: ResponseLayout
    ref_logps: torch.Tensor  #: (S,) fp32; empty if the examples are unscored
    num_tokens: int  #: as ``Example.num_tokens`` counts
    position_ids: torch.Tensor | None = None  #: (1, T) int64 of a shared row
    row: SharedSequence | None = None  #: where prompts and responses lie in a shared row

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on ``device``; from pinned memory, without waiting."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            input_ids=on_device(self.input_ids, device),
            predict_index=on_device(self.predict_index, device),
            targets=on_device(self.targets, device),
            ref_logps=on_device(self.ref_logps, device),
            position_ids=None if self.position_ids is None else on_device(self.position_ids, device),
        )


def pack(examples: Sequence[Example], pad_token_id: int, min_anchors: int = 1) -> PackedBatch:
    """One row ``prompt + response`` for every response, and where its response tokens are predicted.

    Padding on the right needs no attention mask: causal attention never looks at it from a real token.

    Args:
        min_anchors: fewest anchors of an example; 0 where responses are scored and no loss is computed.

    Raises:
        ValueError: no example, an empty prompt or response, an example with fewer anchors, scores for some of them
            only.
    """
    rows = [(example.prompt_ids, response) for example in examples for response in example.responses()]
    common = _common(examples, min_anchors)
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    predict_index: list[int] = []
    for s, (prompt, response) in enumerate(rows):
        input_ids[s, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        first = s * width + len(prompt) - 1
        predict_index.extend(range(first, first + len(response)))
    return PackedBatch(input_ids=input_ids, predict_index=torch.tensor(predict_index), **common)


def pack_shared(examples: Sequence[Example], watch: bool = False, min_anchors: int = 1) -> PackedBatch:
    """All prompts and then all responses as one row (``forward/shared_row.py``).

    Args:
        watch: the row notes every attention call.
        min_anchors: as ``pack``.

    Raises:
        ValueError: as ``pack``.
    """
    common = _common(examples, min_anchors)
    row = SharedSequence(
        tuple(len(example.prompt_ids) for example in examples),
        tuple(tuple(len(response) for response in example.responses()) for example in examples),
        seen=[] if watch else None,
    )
    tokens = [token for example in examples for token in example.prompt_ids]
    return PackedBatch(
        input_ids=torch.cat([torch.tensor(tokens), common["targets"]])[None],
        predict_index=slices_index(row.predicting()),
        position_ids=row.position_ids()[None],
        row=row,
        **common,
    )


def _common(examples: Sequence[Example], min_anchors: int) -> dict[str, Any]:
    lengths = [[len(response) for response in example.responses()] for example in examples]
    layout = ResponseLayout.from_lengths(lengths, min_anchors=min_anchors)
    if any(not example.prompt_ids for example in examples):
        raise ValueError("an empty prompt has no position that predicts the first response token")
    ref_logps = [logp for example in examples for logp in example.ref_logps]
    for g, example in enumerate(examples if ref_logps else ()):
        found, wanted = len(example.ref_logps), len(example.responses())
        if found != wanted:
            raise ValueError(f"prompt {g} has {found} reference log-probabilities for {wanted} responses")
    return {
        "targets": torch.tensor([token for e in examples for response in e.responses() for token in response]),
        "layout": layout,
        "ref_logps": torch.tensor(ref_logps, dtype=torch.float32),
        "num_tokens": sum(example.num_tokens() for example in examples),
    }


def row_tokens(examples: Sequence[Example], shared: bool) -> int:
    """Tokens that the transformer reads for a batch of ``examples``, padding included."""
    lengths = [len(response) for example in examples for response in example.responses()]
    if shared:
        return sum(len(example.prompt_ids) for example in examples) + sum(lengths)
    width = max(len(example.prompt_ids) + max(map(len, example.responses())) for example in examples)
    return len(lengths) * width


def step_batches(examples: Sequence[Example], size: int, budget: int | None, shared: bool) -> list[Sequence[Example]]:
    """A step's prompts in the pieces that go through the model one after the other.

    Args:
        size: prompts in each, if there is no budget.
        budget: most tokens read at once (``row_tokens``); a prompt that alone has more goes alone.
    """
    if budget is None:
        return [examples[start : start + size] for start in range(0, len(examples), size)]

    def cost(batch: Sequence[Example]) -> int:
        return row_tokens(batch, shared)

    return [*micro_batches(examples, lambda example: cost([example]), cost, budget)]


def shared_arguments(row: SharedSequence, device: torch.device) -> dict[str, Any]:
    """What a decoder is called with beside ``input_ids`` and ``position_ids`` of a shared row.

    transformers hands a four-dimensional mask on as it is. This one says nothing and only keeps it from making masks
    of its own, and from reading positions back from the device to see whether they are packed.
    """
    return {"attention_mask": torch.zeros((1, 1, 1, 1), device=device), "use_cache": False, "shared_row": row}


def response_hidden(decoder: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """(N, H): the hidden state that predicts each response token; under autocast in its dtype, as for any head."""
    if batch.row is None:
        hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, batch.predict_index)
    else:
        arguments = shared_arguments(batch.row, batch.input_ids.device)
        output = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, **arguments)
        hidden = take_rows(output.last_hidden_state[0], batch.predict_index, batch.row.predicting())
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def micro_batches(
    items: Sequence[Item], length: Callable[[Item], int], cost: Callable[[Sequence[Item]], int], budget: int
) -> list[list[Item]]:
    """``items`` in as few batches of neighbours in length as ``budget`` allows, and these as even as they can be.

    A function of its arguments alone. Each batch costs at most ``budget``, unless it is a single item.
    """
    ordered = sorted(items, key=length, reverse=True)
    batches = _fill(ordered, cost, budget)
    # The smallest limit that needs no more batches: the last one is then not a small rest.
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(_fill(ordered, cost, middle)) > len(batches):
            low = middle + 1
        else:
            high = middle
    return _fill(ordered, cost, high)


def _fill(items: Sequence[Item], cost: Callable[[Sequence[Item]], int], limit: int) -> list[list[Item]]:
    batches: list[list[Item]] = []
    for item in items:
        if batches and cost([*batches[-1], item]) <= limit:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches

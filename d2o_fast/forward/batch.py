"""Prompts with their responses as one batch: rows for the transformer, packed response tokens for the head.

``pack`` makes one row for each response, with its prompt before it. ``pack_shared`` makes a single row that holds each
prompt once, for models that pass the check in ``forward/sharing.py``. The head sees the same N tokens either way.

Shapes: S responses, T tokens of a row, N response tokens, G prompts, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from d2o_fast.data.row import Example
from d2o_fast.forward.shared_sequence import Item, SharedSequence, slices_index, take_rows
from d2o_fast.loss.layout import ResponseLayout, on_device


@dataclass(frozen=True)
class PackedBatch:
    """G prompts with all their responses: one row per response, padded on the right, or one row for all."""

    input_ids: torch.Tensor  #: (rows, T) int64
    predict_index: torch.Tensor  #: (N,) int64: flat position in the rows that predicts each response token
    targets: torch.Tensor  #: (N,) int64, the response tokens
    layout: ResponseLayout
    ref_logps: torch.Tensor  #: (S,) fp32; empty if the examples are unscored
    num_tokens: int  #: sum of ``Example.num_tokens``
    position_ids: torch.Tensor | None = None  #: (1, T) int64 of a shared row
    shared: SharedSequence | None = None  #: positions of prompts and responses in a shared row

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on ``device``, copied from pinned memory without waiting."""
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
    """One row ``prompt + response`` for every response.

    Padding on the right needs no attention mask: under causal attention no real token sees it.

    Args:
        min_anchors: fewest anchors of an example; 0 if responses are scored and no loss is computed.

    Raises:
        ValueError: no example, an empty prompt or response, an example with fewer anchors, scores for only some
            responses.
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
    """All prompts and then all responses as one row (``forward/shared_sequence.py``).

    Args:
        watch: whether the row records its attention calls.
        min_anchors: as ``pack``.

    Raises:
        ValueError: as ``pack``.
    """
    common = _common(examples, min_anchors)
    sequence = SharedSequence(
        tuple(len(example.prompt_ids) for example in examples),
        tuple(tuple(len(response) for response in example.responses()) for example in examples),
        seen=[] if watch else None,
    )
    tokens = [token for example in examples for token in example.prompt_ids]
    return PackedBatch(
        input_ids=torch.cat([torch.tensor(tokens), common["targets"]])[None],
        predict_index=slices_index(sequence.predicting()),
        position_ids=sequence.position_ids()[None],
        shared=sequence,
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
    """Splits a step's prompts into the batches that go through the model one by one.

    Args:
        size: prompts of a batch, if there is no budget.
        budget: most ``row_tokens`` of a batch; a prompt that exceeds it alone is a batch of its own.
    """
    if budget is None:
        return [examples[start : start + size] for start in range(0, len(examples), size)]

    def cost(batch: Sequence[Example]) -> int:
        return row_tokens(batch, shared)

    return [*micro_batches(examples, lambda example: cost([example]), cost, budget)]


def shared_arguments(sequence: SharedSequence, device: torch.device) -> dict[str, Any]:
    """The arguments of a decoder for a shared row, besides ``input_ids`` and ``position_ids``.

    transformers passes a four-dimensional mask on unchanged. This dummy mask hides nothing. It keeps transformers from
    building its own masks, and from reading positions back from the device to detect packing.
    """
    return {"attention_mask": torch.zeros((1, 1, 1, 1), device=device), "use_cache": False, "shared_sequence": sequence}


def response_hidden(decoder: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """(N, H): the hidden state that predicts each response token; under autocast, in autocast's dtype."""
    if batch.shared is None:
        hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, batch.predict_index)
    else:
        arguments = shared_arguments(batch.shared, batch.input_ids.device)
        output = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, **arguments)
        hidden = take_rows(output.last_hidden_state[0], batch.predict_index, batch.shared.predicting())
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def micro_batches(
    items: Sequence[Item], length: Callable[[Item], int], cost: Callable[[Sequence[Item]], int], budget: int
) -> list[list[Item]]:
    """Splits ``items``, sorted by length, into as few batches as ``budget`` allows, with costs as even as possible.

    The result depends on the arguments alone. A batch costs at most ``budget``, unless it is a single item.
    """
    ordered = sorted(items, key=length, reverse=True)
    batches = _fill(ordered, cost, budget)
    # Find the smallest limit that needs no more batches, so that the last batch is not a small rest.
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

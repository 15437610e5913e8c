"""From prompts with their responses to one batch: rows for the transformer, packed response tokens for the head.

Shapes: S responses (rows), T tokens of the longest row, N response tokens, G prompts, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from d2o_fast.layout import ResponseLayout


@dataclass(frozen=True)
class Example:
    """One prompt as token ids: what people rejected, and what the model wrote itself."""

    prompt_ids: list[int]
    rejected_ids: list[int]  #: the negative, ending in EOS unless it was cut
    anchor_ids: list[list[int]]  #: K anchors
    ref_logps: list[
        float
    ]  #: K + 1 sums in nats: log ref+ of the negative, then log ref- of each anchor; [] if unscored

    def responses(self) -> list[list[int]]:
        """The negative first, then the anchors: the order of ``ResponseLayout``."""
        return [self.rejected_ids, *self.anchor_ids]

    def num_tokens(self) -> int:
        """Tokens that the transformer reads: the prompt before each response."""
        return sum(len(self.prompt_ids) + len(response) for response in self.responses())


@dataclass(frozen=True)
class PackedBatch:
    """G prompts with all their responses, one row each, padded on the right."""

    input_ids: torch.Tensor  #: (S, T) int64
    predict_index: torch.Tensor  #: (N,) int64 into the S * T positions: the one that predicts each response token
    targets: torch.Tensor  #: (N,) int64, the response tokens
    layout: ResponseLayout
    ref_logps: torch.Tensor  #: (S,) fp32; empty if the examples are unscored
    num_tokens: int  #: tokens without padding

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on ``device``; from pinned memory, without waiting."""
        if device.type == "cpu":
            return self
        names = ("input_ids", "predict_index", "targets", "ref_logps")
        tensors = {name: getattr(self, name) for name in names}
        if device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def pack(examples: Sequence[Example], pad_token_id: int) -> PackedBatch:
    """One row ``prompt + response`` for every response, and where its response tokens are predicted.

    Padding on the right needs no attention mask: causal attention never looks at it from a real token.

    Raises:
        ValueError: no example, an empty prompt or response, an example without anchors, scores for some of them only.
    """
    rows = [(example.prompt_ids, response) for example in examples for response in example.responses()]
    layout = ResponseLayout.from_lengths([[len(response) for response in e.responses()] for e in examples])
    if any(not prompt for prompt, _ in rows):
        raise ValueError("an empty prompt has no position that predicts the first response token")
    ref_logps = [logp for example in examples for logp in example.ref_logps]
    if len(ref_logps) not in (0, len(rows)):
        raise ValueError(f"{len(ref_logps)} reference log-probabilities for {len(rows)} responses")
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    predict_index: list[int] = []
    targets: list[int] = []
    for s, (prompt, response) in enumerate(rows):
        input_ids[s, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        first = s * width + len(prompt) - 1
        predict_index.extend(range(first, first + len(response)))
        targets.extend(response)
    return PackedBatch(
        input_ids=input_ids,
        predict_index=torch.tensor(predict_index),
        targets=torch.tensor(targets),
        layout=layout,
        ref_logps=torch.tensor(ref_logps, dtype=torch.float32),
        num_tokens=sum(example.num_tokens() for example in examples),
    )


def response_hidden(decoder: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """(N, H): the hidden state that predicts each response token; under autocast in its dtype, as for any head."""
    hidden = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, batch.predict_index)
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden

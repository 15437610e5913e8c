"""Log-probabilities of responses under a model, per token or summed over the response.

K anchors of one prompt; N response tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Example
from d2o_fast.forward.batch import PackedBatch, pack, pack_shared, response_hidden, row_tokens
from d2o_fast.loss.ops import linear_logprob
from d2o_fast.loss.reference import sequence_logps
from d2o_fast.model.parts import autocast, evaluating, head_of

SCORE_TOKENS = 16384  #: tokens that one scoring batch may hold, padding included, unless a single prompt has more


def reference_logps(
    decoder: nn.Module, model: nn.Module, examples: Sequence[Example], config: D2OConfig, pad: int, shared: bool = False
) -> list[list[float]]:
    """Log-probabilities of each example's responses, the negative's first: fp32 sums in nats.

    Batches hold whole prompts and at most ``SCORE_TOKENS`` tokens, so memory does not grow with the number of examples.
    The split into batches and ``shared`` change a score only by rounding.
    """
    device = next(model.parameters()).device
    scores: list[list[float]] = []
    for batch_examples in _batches(examples, shared):
        packed = pack_shared(batch_examples, min_anchors=0) if shared else pack(batch_examples, pad, min_anchors=0)
        batch = packed.to(device)
        values = sequence_logps(token_logps(decoder, model, batch, config), batch.layout).tolist()
        for example in batch_examples:
            count = 1 + len(example.anchor_ids)
            scores.append(values[:count])
            values = values[count:]
    return scores


def token_logps(decoder: nn.Module, model: nn.Module, batch: PackedBatch, config: D2OConfig) -> torch.Tensor:
    """fp32 log-probability in nats of each response token of a batch on the model's device, shape (N,)."""
    head = head_of(model)
    with torch.no_grad(), evaluating(model), autocast(config, batch.targets.device):
        hidden = response_hidden(decoder, batch)
        return linear_logprob(hidden, head.weight, batch.targets, **head.options())


def _batches(examples: Sequence[Example], shared: bool = False) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in examples:
        if batch and row_tokens([*batch, example], shared) > SCORE_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch

"""Several prompts and all their responses as one row, each prompt once.

    [ p_0 | p_1 | ... | r_00 .. r_0K | r_10 .. r_1K | ... ]

Prompts come first, so that both parts of the attention (``forward/attention.py``) read contiguous slices of the row.
Every length is known on the host. The offsets that kernels need are copied to the device without waiting for it.

Shapes: T tokens of a row, TP prompt tokens of a row, G prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch

from d2o_fast.loss.layout import on_device
from d2o_fast.loss.matmul import wide_dtype

Item = TypeVar("Item")
Slice = tuple[int, int]


class Spans:
    """Segments of queries and the keys that each segment reads, in the form of FlashAttention's varlen calls.

    ``cu_q``, ``cu_k``: offsets into the query and key rows, one more than there are segments; ``max_q``, ``max_k``: the
    longest segment of each. No segment may be empty: FlashAttention's log-sum-exp of an empty one is infinite.
    """

    def __init__(self, lengths_q: Sequence[int], lengths_k: Sequence[int]) -> None:
        if min(lengths_q) < 1 or min(lengths_k) < 1:
            raise ValueError(f"an empty segment among {list(lengths_q)} (queries) or {list(lengths_k)} (keys)")
        self.cu_q: tuple[int, ...] = tuple(accumulate(lengths_q, initial=0))
        self.cu_k: tuple[int, ...] = tuple(accumulate(lengths_k, initial=0))
        self.max_q, self.max_k = max(lengths_q), max(lengths_k)
        self._tensors: dict[tuple[str, torch.device], torch.Tensor] = {}

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """``cu_q`` or ``cu_k`` as int32 on ``device``, copied once and without waiting."""
        if (name, device) not in self._tensors:
            self._tensors[name, device] = on_device(torch.tensor(getattr(self, name), dtype=torch.int32), device)
        return self._tensors[name, device]

    @cached_property
    def runs(self) -> list[tuple[int, int, int, int, int]]:
        """Runs of neighbours with equal lengths: (segments, first query, query length, first key, key length)."""
        found: list[tuple[int, int, int, int, int]] = []
        for (q0, q1), (k0, k1) in zip(pairwise(self.cu_q), pairwise(self.cu_k), strict=True):
            if found and found[-1][2] == q1 - q0 and found[-1][4] == k1 - k0:
                count, first_q, length_q, first_k, length_k = found[-1]
                found[-1] = (count + 1, first_q, length_q, first_k, length_k)
            else:
                found.append((1, q0, q1 - q0, k0, k1 - k0))
        return found


@dataclass(frozen=True)
class SharedSequence:
    """The positions of prompts and their responses in one row.

    Args:
        prompts: tokens of each prompt, (G,).
        responses: tokens of each response of each prompt, in the row's order.
        seen: a list that every attention call appends to, for the check in ``forward/sharing.py``; None for no record.

    Raises:
        ValueError: an empty prompt or response, or a prompt without responses.
    """

    prompts: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    seen: list[Any] | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.responses) or not all(self.responses):
            raise ValueError(f"{len(self.prompts)} prompts with {[len(r) for r in self.responses]} responses")

    @cached_property
    def num_prompt_tokens(self) -> int:
        """TP: the number of prompt tokens, which come first in the row."""
        return sum(self.prompts)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt + response."""
        return max(prompt + max(responses) for prompt, responses in zip(self.prompts, self.responses, strict=True))

    @cached_property
    def own(self) -> Spans:
        """Every prompt and every response on itself."""
        lengths = [*self.prompts, *(length for responses in self.responses for length in responses)]
        return Spans(lengths, lengths)

    @cached_property
    def cross(self) -> Spans:
        """All responses of a prompt (queries from TP on) on their prompt (the first TP keys)."""
        return Spans([sum(responses) for responses in self.responses], self.prompts)

    @cached_property
    def segments(self) -> list[tuple[Slice, Slice | None]]:
        """(slice of a prompt or response, slice of a response's prompt or None), in the row's order."""
        prompts = list(pairwise(accumulate(self.prompts, initial=0)))
        found: list[tuple[Slice, Slice | None]] = [(prompt, None) for prompt in prompts]
        start = self.num_prompt_tokens
        for prompt, responses in zip(prompts, self.responses, strict=True):
            for length in responses:
                found.append(((start, start + length), prompt))
                start += length
        return found

    def gathered(self, window: int | None) -> tuple[list[Slice], Spans]:
        """(slices of the row that make up the keys, segments over them), with separate keys for each segment.

        A segment's keys are the end of its prompt, then itself. A query sees the last ``window`` positions up to its
        own (all if None), so the last ``window - 1`` tokens of the prompt suffice.
        """
        if window not in self._cache:
            pieces: list[Slice] = []
            lengths_q, lengths_k = [], []
            for (start, end), prompt in self.segments:
                before = 0
                if prompt is not None and window != 1:
                    first = prompt[0] if window is None else max(prompt[0], prompt[1] - window + 1)
                    before = prompt[1] - first
                    pieces.append((first, prompt[1]))
                pieces.append((start, end))
                lengths_q.append(end - start)
                lengths_k.append(before + end - start)
            self._cache[window] = pieces, Spans(lengths_q, lengths_k)
        return self._cache[window]

    def position_ids(self) -> torch.Tensor:
        """(T,) int64; a response continues the positions of its prompt."""
        starts = [0 if prompt is None else prompt[1] - prompt[0] for _, prompt in self.segments]
        parts = [torch.arange(start, start + b - a) for start, ((a, b), _) in zip(starts, self.segments, strict=True)]
        return torch.cat(parts)

    def predicting(self) -> list[Slice]:
        """Slices of the row that predict the response tokens, in order.

        The last prompt token predicts the first token of every response, so its slice repeats.
        """
        pieces: list[Slice] = []
        for (start, end), prompt in self.segments:
            if prompt is not None:
                pieces.append((prompt[1] - 1, prompt[1]))
                if end - start > 1:
                    pieces.append((start, end - 1))
        return pieces


def slices_index(pieces: Sequence[Slice]) -> torch.Tensor:
    """The rows in ``pieces`` as one int64 index."""
    return torch.cat([torch.arange(start, end) for start, end in pieces])


class _TakeRows(torch.autograd.Function):
    """``x[index]``, whose rows may repeat. dx[i] is the sum of the gradients of all copies of row i, in fixed order.

    Autograd's own backward of an index adds with atomics on CUDA, in a different order on every run.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, pieces: Sequence[Slice]) -> torch.Tensor:
        ctx.shape, ctx.pieces = x.shape, pieces
        return x.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total, at = grad.new_zeros(ctx.shape, dtype=wide_dtype(grad.dtype)), 0
        for start, end in ctx.pieces:
            total[start:end] += grad[at : at + end - start]
            at += end - start
        return total.to(grad.dtype), None, None


def take_rows(x: torch.Tensor, index: torch.Tensor, pieces: Sequence[Slice]) -> torch.Tensor:
    """The rows of ``x`` (T, ...) in ``pieces``. ``index`` is their ``slices_index`` on the device of ``x``."""
    return _TakeRows.apply(x, index, pieces)

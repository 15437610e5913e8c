"""The interface of an engine: it computes log-probabilities and gradients of chunks of tokens.

Shapes: N response tokens, n tokens of a chunk, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from d2o_fast.loss.matmul import wide_dtype


@dataclass(frozen=True)
class Head:
    """A language model's head; ``linear_logprob`` gives the formula of its logits."""

    weight: torch.Tensor  #: (V, H)
    bias: torch.Tensor | None  #: (V,)
    softcap: float | None
    logit_scale: float

    def options(self) -> dict[str, Any]:
        """The head's keyword arguments of ``fused_d2o_loss`` and ``linear_logprob``."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


class Needs(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool


class Totals:
    """The gradients that are summed over tokens: dWeight (V, H) and dBias (V,); None if not needed.

    Sums over several chunks are wide. If there is only one chunk, they have the parameter's dtype.
    """

    def __init__(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.fresh = True  # nothing is summed yet: the memory is uninitialised

    @classmethod
    def of(cls, head: Head, needs: Needs, one_chunk: bool) -> Totals:
        def total(parameter: torch.Tensor | None, needed: bool) -> torch.Tensor | None:
            if parameter is None or not needed:
                return None
            dtype = parameter.dtype if one_chunk else wide_dtype(parameter.dtype)
            return torch.empty(parameter.shape, dtype=dtype, device=parameter.device)

        return cls(total(head.weight, needs.weight), total(head.bias, needs.bias))

    def like(self) -> Totals:
        return Totals(*(None if total is None else torch.empty_like(total) for total in (self.weight, self.bias)))

    def add_scaled(self, other: Totals, factor: torch.Tensor | float) -> None:
        """``self += factor * other``, or ``self *= factor`` if ``other`` is ``self``."""
        for into, value in ((self.weight, other.weight), (self.bias, other.bias)):
            if into is None or value is None:
                continue
            if into is value:
                into.mul_(factor)
            elif self.fresh:
                torch.mul(value, factor, out=into)
            elif isinstance(factor, torch.Tensor):
                into.addcmul_(value, factor)
            else:
                into.add_(value, alpha=factor)
        self.fresh = False

    def zero_if_fresh(self) -> None:
        for total in (self.weight, self.bias):
            if self.fresh and total is not None:
                total.zero_()
        self.fresh = False


class Engine(ABC):
    """Computes chunks of one batch of N tokens with at most ``workspace_bytes`` of wide logits in memory.

    Raises:
        ValueError: the workspace cannot hold the logits of one token.
    """

    name: ClassVar[str]

    def __init__(
        self,
        hidden: torch.Tensor,
        head: Head,
        targets: torch.Tensor,
        workspace_bytes: int,
        grad_filter_eps: float | None = None,
    ) -> None:
        self.hidden, self.head, self.targets, self.grad_filter_eps = hidden, head, targets, grad_filter_eps
        self.workspace_bytes = workspace_bytes
        self.wide = wide_dtype(hidden.dtype)
        self.N, (self.V, self.H) = hidden.shape[0], head.weight.shape
        row_bytes = self.V * self.wide.itemsize
        self.max_rows = workspace_bytes // row_bytes
        if self.max_rows < 1:
            raise ValueError(
                f"workspace_bytes is {workspace_bytes}; the fp32 logits of one token already take {row_bytes}"
            )
        self.kept_logits: torch.Tensor | None = None  #: of ``forward``'s last chunk
        self._memory: dict[str, torch.Tensor] = {}
        #: Columns of E that grad_filter_eps kept, times the tokens of their chunk. Created on the device: a copy from
        #: the host would wait for it.
        self.kept = torch.zeros((), dtype=torch.int64, device=hidden.device)

    def scratch(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialised memory of ``shape``, wide if ``dtype`` is None.

        The same name gives the same memory, so the next call invalidates the last result. It is allocated once:
        fresh pages cost a CPU more than the passes over a block.
        """
        size, memory = math.prod(shape), self._memory.pop(name, None)
        if memory is None or memory.numel() < size:
            memory = None  # free the smaller one first
            memory = torch.empty(size, dtype=dtype or self.wide, device=self.hidden.device)
        self._memory[name] = memory
        return memory[:size].view(shape)

    def fits_without_accumulator(self, needs: Needs) -> bool:
        """Whether the whole batch can be one chunk.

        One chunk's dWeight is rounded once, from the product's own fp32 sum. It needs no fp32 accumulator of the
        weight's size, so its logits may use that room.
        """
        weight = self.head.weight
        accumulator = weight.numel() * self.wide.itemsize if needs.weight and weight.dtype != self.wide else 0
        fits = self.N * self.V * self.wide.itemsize <= self.workspace_bytes + accumulator
        return fits and self.grad_filter_eps is None  # the filter adds to dWeight in fp32

    @staticmethod
    @abstractmethod
    def group_loss(*tensors: Any, **numbers: Any) -> tuple[torch.Tensor, ...]:
        """The results of whole prompts and the derivative by each response's logp; see ``loss/torch_engine.py``."""

    @abstractmethod
    def score(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(logps (N,), stats (2, N)) of all tokens, wide; no tensor of N times V is kept.

        ``stats`` are each row's maximum and the logarithm of its sum of exp(logit - maximum). Their sum is the
        log-sum-exp. Two parts keep digits that the sum loses if logits are far from zero.
        """

    @abstractmethod
    def forward(self, start: int, end: int) -> torch.Tensor:
        """logps (n,) of tokens start..end, at most ``max_rows``. Keeps their logits for ``backward``."""

    @abstractmethod
    def backward(self, coef: torch.Tensor, dhidden: torch.Tensor | None, totals: Totals) -> None:
        """Computes the gradient of ``forward``'s last chunk for ``coef`` (n,), its dL/dlogp.

        Fills ``dhidden`` (n, H), wide or in the operand dtype, and adds to ``totals``. Overwrites the kept logits.
        """

    @abstractmethod
    def gradient(
        self, stats: torch.Tensor, coef: torch.Tensor, needs: Needs
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(dhidden (N, H), dweight (V, H), dbias (V,)) for ``score``'s stats and ``coef`` (N,), the dL/dlogp.

        Computes the logits again. Each gradient has its tensor's dtype, or is None if it is not needed.
        """


def split(start: int, end: int, max_rows: int) -> Iterator[tuple[int, int]]:
    """Splits start..end into the fewest ranges of at most ``max_rows``; their sizes differ by at most one row."""
    count = -(-(end - start) // max_rows)
    for i in range(count):
        yield start + (end - start) * i // count, start + (end - start) * (i + 1) // count

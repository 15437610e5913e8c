"""The Triton path: the vendor's product computes a chunk's logits, kernels compute their statistics and gradient.

Shapes: N response tokens, n tokens of a chunk, V vocabulary, H hidden.

The logits (n, V) are fp32. The gradient overwrites them in the operand dtype and enters the vendor's products. Scoring
holds no logits: one kernel computes the product, the log-sum-exp and the target's logit.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch

from d2o_fast.kernels.filtered_products import filtered_products
from d2o_fast.kernels.group_loss import group_loss
from d2o_fast.kernels.linear_logprob import linear_logprob_forward
from d2o_fast.kernels.logit_grad import logit_grad_, logit_stats
from d2o_fast.loss.engine import Engine, Needs, Totals, split
from d2o_fast.loss.matmul import product_


class TritonEngine(Engine):
    name: ClassVar[str] = "triton"
    group_loss = staticmethod(group_loss)

    @property
    def options(self) -> tuple[torch.Tensor | None, float | None, float]:
        """The kernels' last arguments."""
        return self.head.bias, self.head.softcap, self.head.logit_scale

    @functools.cached_property
    def weight(self) -> torch.Tensor:
        """(V, H) in the operand dtype. An fp32 master weight beside 16-bit hidden states is copied once."""
        return self.head.weight.to(self.hidden.dtype)

    def score(self) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_logprob_forward(self.hidden, self.head.weight, self.targets, *self.options)

    def forward(self, start: int, end: int) -> torch.Tensor:
        self.kept_logits = None  # frees a smaller chunk before its memory is replaced
        self.chunk, self.kept_logits = slice(start, end), self._logits(start, end)
        logps, self.kept_stats = logit_stats(self.kept_logits, self.targets[start:end], *self.options)
        return logps

    def backward(self, coef: torch.Tensor, dhidden: torch.Tensor | None, totals: Totals) -> None:
        assert self.kept_logits is not None
        self._gradient(self.kept_logits, self.chunk, self.kept_stats, coef, dhidden, totals)

    def gradient(
        self, stats: torch.Tensor, coef: torch.Tensor, needs: Needs
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        hidden, (weight, bias) = self.hidden, (self.head.weight, self.head.bias)
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else None
        totals = Totals.of(self.head, needs, one_chunk=self.max_rows >= self.N)
        for start, end in split(0, self.N, self.max_rows):
            chunk = slice(start, end)
            into = None if dhidden is None else dhidden[chunk]
            self._gradient(self._logits(start, end), chunk, stats[:, chunk], coef[chunk], into, totals)
        totals.zero_if_fresh()
        dweight = None if totals.weight is None else totals.weight.to(weight.dtype)
        return dhidden, dweight, None if totals.bias is None or bias is None else totals.bias.to(bias.dtype)

    def _logits(self, start: int, end: int) -> torch.Tensor:
        """Raw products (n, V), fp32, in the engine's only buffer."""
        buffer = self.scratch("logits", (end - start, self.V))
        return product_(buffer, self.hidden[start:end], self.weight.T)

    def _gradient(
        self,
        logits: torch.Tensor,
        rows: slice,
        stats: torch.Tensor,
        coef: torch.Tensor,
        dhidden: torch.Tensor | None,
        totals: Totals,
    ) -> None:
        hidden = self.hidden[rows]
        grad = logit_grad_(logits, self.targets[rows], stats, coef, *self.options, hidden.dtype)
        if totals.bias is not None:
            columns = grad.sum(0, dtype=self.wide)
            totals.bias.copy_(columns if totals.fresh else totals.bias + columns)
        if self.grad_filter_eps is not None:
            self._filtered(grad, coef, hidden, dhidden, totals)
        else:
            if dhidden is not None:
                product_(dhidden, grad, self.weight)
            if totals.weight is not None:
                product_(totals.weight, grad.T, hidden, add=not totals.fresh)
        totals.fresh = False

    def _filtered(
        self, grad: torch.Tensor, coef: torch.Tensor, hidden: torch.Tensor, dhidden: torch.Tensor | None, totals: Totals
    ) -> None:
        assert self.grad_filter_eps is not None
        kept = filtered_products(
            grad, coef, self.grad_filter_eps, self.weight, hidden, dhidden, totals.weight, totals.fresh
        )
        self.kept = self.kept + kept.long() * hidden.shape[0]

"""The torch path: chunks of tokens in plain torch, block by block of the vocabulary. Made for a CPU; runs anywhere.

Shapes: n tokens of a chunk, V vocabulary, v a block of it, H hidden, S responses, G prompts. *Wide*: fp32, or fp64.

A chunk's logits are transposed, (V, n): a block of the vocabulary is one piece of memory, small enough to stay in a
CPU's cache from the product through all the passes over it. The forward replaces each logit by exp(logit - m), m the
row's maximum up to its block, so that the backward needs no second exponential: with m_b that of block b

    softmax = exp(logit - m_b) * exp(m_b - m) / sum        sum = that of exp(logit - m) over the row
    E.T     = softmax * -coef, plus coef at the target; times the slope of scale and softcap

With a softcap the slope needs the logits themselves, which are then kept instead.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from d2o_fast.loss.engine import Engine, Needs, Totals, split
from d2o_fast.loss.matmul import multiplies_bf16, product_
from d2o_fast.loss.reference import Margin

BLOCK_BYTES = 12 << 20  #: of a block's logits, and of its widened weight, whichever has more
MAX_TILE = 1024  #: tokens that pass by a block of the weight together where no logits are kept
LOWEST = -torch.finfo(torch.float32).max  # finite: a running maximum that starts here meets -inf without making a NaN


def group_loss(
    token_logps: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_groups: torch.Tensor,
    ref_logps: torch.Tensor,
    *,
    num_prompts: int,
    **margin: float,
) -> tuple[torch.Tensor, ...]:
    """(logps (S,), chosen (G,), rejected (G,), margins (G,), losses (G,), response_coef (S,)) of packed prompts.

    ``losses`` are divided by ``num_prompts`` already; ``response_coef`` is the derivative of their sum by each
    response's log-probability. The few numbers here are taken in fp64: z is a difference of large sums.

    Args:
        token_logps: (n,) wide.
        cu_seqlens: (S+1,) int32 and ``cu_groups`` (G+1,) int32, on the device.
        ref_logps: (S,).
        margin: the fields of a ``Margin``.
    """
    first, S = cu_groups[:-1].long(), cu_seqlens.shape[0] - 1
    K, (alpha, beta, anchor_weight, negative_weight, gate) = cu_groups.diff() - 1, Margin(**margin)
    logps = _segment_sums(token_logps.double(), cu_seqlens)
    log_ratio = logps - ref_logps.double()
    negatives = log_ratio.index_select(0, first)
    is_anchor = torch.ones_like(log_ratio, dtype=torch.bool).index_fill_(0, first, False)
    anchors = _segment_sums(log_ratio.where(is_anchor, 0.0), cu_groups) / K.clamp(min=1)
    chosen, rejected = beta * anchors, alpha * negatives
    margins = chosen - rejected
    sigmoid = gate * torch.sigmoid(-margins)
    ungated = negative_weight * negatives - anchor_weight * anchors
    losses = (gate * F.softplus(-margins) + ungated if gate else ungated) / num_prompts
    anchor_coef = -(beta * sigmoid + anchor_weight) / (K.clamp(min=1) * num_prompts)
    response_coef = anchor_coef.repeat_interleave(K + 1, output_size=S)
    response_coef.index_copy_(0, first, (alpha * sigmoid + negative_weight) / num_prompts)
    results = (logps, chosen, rejected, margins, losses, response_coef)
    return tuple(value.to(token_logps.dtype) for value in results)


def _segment_sums(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    # unsafe: the check of the offsets would wait for the device, and a ResponseLayout has made it.
    return torch.segment_reduce(values, "sum", offsets=offsets.long(), unsafe=True)


class TorchEngine(Engine):
    name: ClassVar[str] = "torch"
    group_loss = staticmethod(group_loss)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @functools.cached_property
    def bias(self) -> torch.Tensor | None:
        """(V, 1), wide."""
        return None if self.head.bias is None else self.head.bias.to(self.wide)[:, None]

    @functools.cached_property
    def multiplies_bf16(self) -> bool:
        """Whether hidden states and weight are bf16, and multiplied as such: E rounded to bf16 can meet them."""
        both = self.hidden.dtype == self.head.weight.dtype == torch.bfloat16
        return both and multiplies_bf16(self.device)

    # --- Scores, and the gradient of given stats: every token passes by one block of the weight -----------------------

    def score(self) -> tuple[torch.Tensor, torch.Tensor]:
        tiles = [_Statistics(self, a, b) for a, b in split(0, self.N, min(self.max_rows, MAX_TILE))]
        if not tiles:
            empty = torch.empty(2, 0, dtype=self.wide, device=self.device)
            return empty[0], empty
        for first, last in self._blocks(min(self.max_rows, MAX_TILE)):
            weight = self._weight_block(first, last)
            for tile in tiles:
                tile.add(self._logits(weight, tile.hidden, first, last), first)
        stats = [torch.stack([tile.maximum, tile.sum.log()]) for tile in tiles]
        return torch.cat([tile.logps() for tile in tiles]), torch.cat(stats, 1)

    def gradient(
        self, stats: torch.Tensor, coef: torch.Tensor, needs: Needs
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """A block of dWeight is whole after one visit, so nothing of the weight's size is held beside it."""
        weight, bias = self.head.weight, self.head.bias
        dhidden = torch.zeros(self.N, self.H, dtype=self.wide, device=self.device) if needs.hidden else None
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs.weight else None
        dbias = torch.empty_like(bias) if bias is not None and needs.bias else None
        tiles = list(split(0, self.N, min(self.max_rows, MAX_TILE)))
        operand = self._operand(0, self.N)
        wide = operand if operand.dtype == self.wide or not needs.weight else self.hidden.to(self.wide)
        for first, last in self._blocks(min(self.max_rows, MAX_TILE)):
            block = self._weight_block(first, last)
            block_dweight = self.scratch("dweight", (last - first, self.H)) if needs.weight else None
            block_dbias = torch.zeros(last - first, dtype=self.wide, device=self.device)
            for a, b in tiles:
                logits = self._logits(block, operand[a:b], first, last)
                out = self.scratch("softmax", logits.shape) if self.head.softcap else logits
                softmax = torch.sub(logits, stats[0, a:b], out=out).sub_(stats[1, a:b]).exp_()
                grad = self._finish(softmax.mul_(-coef[a:b]), logits, first, last, self.targets[a:b], coef[a:b])
                if dhidden is not None:
                    product_(dhidden[a:b], grad.T, block, add=True)
                if block_dweight is not None:
                    product_(block_dweight, grad, wide[a:b], add=a > 0)
                if dbias is not None:
                    block_dbias += grad.sum(1)
            if dweight is not None and block_dweight is not None:
                dweight[first:last] = block_dweight if tiles else 0.0
            if dbias is not None:
                dbias[first:last] = block_dbias
        return None if dhidden is None else dhidden.to(self.hidden.dtype), dweight, dbias

    # --- A chunk whose logits are kept -----------------------------------------------------------------------------

    def forward(self, start: int, end: int) -> torch.Tensor:
        n = end - start
        self.kept_logits = None  # or the smaller chunk before would outlive its memory's replacement
        self.kept_logits = self.scratch("chunk", (self.V, n))
        self.kept_maxima: list[torch.Tensor] = []
        statistics = _Statistics(self, start, end)
        for first, last in self._blocks(n):
            out = self.kept_logits[first:last]
            logits = self._logits(self._weight_block(first, last), statistics.hidden, first, last, out)
            self.kept_maxima.append(statistics.add(logits, first, in_place=not self.head.softcap))
        self.chunk = start, end
        self.kept_maximum, self.kept_sum = statistics.maximum, statistics.sum
        return statistics.logps()

    def backward(self, coef: torch.Tensor, dhidden: torch.Tensor | None, totals: Totals) -> None:
        """Block by block, logits become E.T, which meets the hidden states while it is in cache. It meets the weight
        there too, or is kept and meets it at the end."""
        start, end = self.chunk
        keeps = dhidden is not None and self._keeps_e(dhidden)
        into = None if dhidden is None or keeps else dhidden.to(self.wide).zero_()  # dhidden itself, if it is wide
        hidden = self.hidden[start:end]
        if totals.weight is not None and (totals.weight.dtype == self.wide or not self.multiplies_bf16):
            hidden = hidden.to(self.wide)
        for i, (first, last) in enumerate(self._blocks(end - start)):
            grad = self._block_of_e(i, first, last, coef, keeps)
            if totals.bias is not None:
                dbias, columns = totals.bias[first:last], grad.sum(1)
                dbias.copy_(columns if totals.fresh else dbias + columns)
            if totals.weight is not None:
                self._add_dweight(totals.weight[first:last], grad, hidden, totals.fresh)
            if into is not None:
                product_(into, grad.T, self._weight_block(first, last), add=True)
        if dhidden is not None:
            if into is None:
                product_(dhidden, self._kept_e().T, self.head.weight)
            else:
                dhidden.copy_(into)
        totals.fresh = False

    def _keeps_e(self, dhidden: torch.Tensor) -> bool:
        """Whether one product of all of E with the weight as it is fills ``dhidden``: no copy of the weight, no sum
        beside it. E is rounded to bf16 for it where bf16 is multiplied. A staged prompt's wide sum rules it out."""
        unwidened = self.multiplies_bf16 or self.hidden.dtype == self.head.weight.dtype == self.wide
        return unwidened and dhidden.dtype == self.hidden.dtype

    def _kept_e(self) -> torch.Tensor:
        """(V, n) E.T in the memory of the kept logits; a row of bf16 takes the left half of its row."""
        assert self.kept_logits is not None
        n = self.kept_logits.shape[1]
        return self.kept_logits.view(torch.bfloat16)[:, :n] if self.multiplies_bf16 else self.kept_logits

    def _block_of_e(self, i: int, first: int, last: int, coef: torch.Tensor, keeps: bool) -> torch.Tensor:
        """(v, n) wide block ``i`` of E.T from the kept logits, in their place unless they are still read; if E is kept,
        it is there as well."""
        assert self.kept_logits is not None
        kept = self.kept_logits[first:last]
        apart = self.head.softcap or (keeps and self.multiplies_bf16)
        out = self.scratch("softmax", kept.shape) if apart else kept
        if self.head.softcap:
            softmax = torch.sub(kept, self.kept_maximum, out=out).exp_().mul_(-coef / self.kept_sum)
        else:
            # Not exp(m_b - lse): lse is rounded at the size of the logits, and all of a row's softmax with it.
            factor = (self.kept_maxima[i] - self.kept_maximum).exp_().div_(self.kept_sum).mul_(-coef)
            softmax = torch.mul(kept, factor, out=out)
        grad = self._finish(softmax, kept, first, last, self.targets[slice(*self.chunk)], coef)
        if keeps and apart:
            self._kept_e()[first:last].copy_(grad)
        return grad

    def _add_dweight(self, dweight: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor, fresh: bool) -> None:
        """A block's dWeight: added up over chunks, wide; or of the only chunk, rounded to the weight's own dtype."""
        if dweight.dtype == self.wide:
            product_(dweight, grad, hidden, add=not fresh)
        elif hidden.dtype == self.wide:
            dweight.copy_(grad @ hidden)
        else:
            # Not the kept E: oneDNN reads past an odd n of its strided rows, and NaN * 0 is NaN (LOG.md).
            product_(dweight, self.scratch("bf16", grad.shape, torch.bfloat16).copy_(grad), hidden)

    # --- Parts -----------------------------------------------------------------------------------------------------

    def _blocks(self, n: int) -> Iterator[tuple[int, int]]:
        """Ranges of the vocabulary whose logits for n tokens stay in cache."""
        step = max(64, BLOCK_BYTES // (max(n, self.H) * self.wide.itemsize) // 64 * 64)
        for first in range(0, self.V, step):
            yield first, min(first + step, self.V)

    def _operand(self, start: int, end: int) -> torch.Tensor:
        """Hidden states as the products take them: widened on a CPU."""
        hidden = self.hidden[start:end]
        return hidden.to(self.wide) if self.device.type == "cpu" else hidden

    def _weight_block(self, first: int, last: int) -> torch.Tensor:
        """Rows of the weight, rounded to the operand dtype; widened on a CPU."""
        block = self.head.weight[first:last]
        if block.dtype != self.hidden.dtype:
            block = self.scratch("weight, rounded", block.shape, self.hidden.dtype).copy_(block)
        if block.dtype != self.wide and self.device.type == "cpu":
            block = self.scratch("weight", block.shape).copy_(block)
        return block

    def _logits(
        self, weight: torch.Tensor, hidden: torch.Tensor, first: int, last: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(v, n) logits of the vocabulary's rows first..last."""
        if out is None:
            out = self.scratch("logits", (last - first, hidden.shape[0]))
        logits = product_(out, weight, hidden.T)
        if self.bias is not None:
            logits.add_(self.bias[first:last])
        if self.head.logit_scale != 1.0:
            logits.mul_(self.head.logit_scale)
        if self.head.softcap:
            logits.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return logits

    def _finish(
        self,
        grad: torch.Tensor,
        logits: torch.Tensor,
        first: int,
        last: int,
        targets: torch.Tensor,
        coef: torch.Tensor,
    ) -> torch.Tensor:
        """``grad`` (v, n) = softmax * -coef becomes the block of E.T; ``logits`` are read with a softcap alone."""
        rows, inside = _rows_in(targets, first, last)
        grad.scatter_add_(0, rows, coef.where(inside, 0.0)[None])
        if self.head.softcap:
            grad.addcmul_(grad, (logits / self.head.softcap).square_(), value=-1.0)
        if self.head.logit_scale != 1.0:
            grad.mul_(self.head.logit_scale)
        if self.bias is not None:  # a masked token: not even a row whose softmax is NaN gives it a gradient
            grad.masked_fill_(self.bias[first:last] == -float("inf"), 0.0)
        return grad


class _Statistics:
    """Running maximum, sum of exponentials and target's logit of n tokens, over blocks of the vocabulary."""

    def __init__(self, engine: TorchEngine, start: int, end: int) -> None:
        self.engine, self.hidden, self.targets = engine, engine._operand(start, end), engine.targets[start:end]
        options: dict[str, Any] = {"dtype": engine.wide, "device": engine.device}
        self.maximum = torch.full((end - start,), LOWEST, **options)
        self.sum = torch.zeros(end - start, **options)
        self.target = torch.full((end - start,), float("nan"), **options)  # of a target outside [0, V)

    def add(self, logits: torch.Tensor, first: int, in_place: bool = True) -> torch.Tensor:
        """Logits (v, n) from row ``first`` on, overwritten by exp(logit - maximum) if ``in_place``; the maximum."""
        rows, inside = _rows_in(self.targets, first, first + logits.shape[0])
        self.target = logits.gather(0, rows).squeeze(0).where(inside, self.target)
        maximum = torch.maximum(self.maximum, logits.amax(0))
        out = logits if in_place else self.engine.scratch("softmax", logits.shape)
        exponentials = torch.sub(logits, maximum, out=out).exp_()
        self.sum.mul_((self.maximum - maximum).exp_()).add_(exponentials.sum(0))
        self.maximum = maximum
        return maximum

    def logps(self) -> torch.Tensor:
        """(n,); (target - maximum) first: exact where the target is the likeliest token."""
        return (self.target - self.maximum) - self.sum.log()


def _rows_in(targets: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(row of each target in the block first..last as (1, n), any row where it is not there; whether it is)."""
    inside = (targets >= first) & (targets < last)
    return (targets - first).where(inside, 0).long()[None], inside

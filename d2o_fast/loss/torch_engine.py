"""The torch path: chunks of tokens in plain torch, block by block of the vocabulary. Made for a CPU; runs anywhere.

Shapes: n tokens of a chunk, V vocabulary, v a block of it, H hidden, S responses, G prompts. *Wide*: fp32, or fp64.

    x = logit_scale * (product + bias),   logit = softcap * tanh(x / softcap)       (logit = x without a softcap)

A chunk's logits lie transposed, (V, n): a block of the vocabulary is one piece of memory, small enough to stay in a
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

BLOCK_BYTES = 12 << 20  #: of a block's logits, and of its widened weight, whichever has more
MAX_TILE = 1024  #: tokens that pass by a block of the weight together where no logits are kept
LOWEST = -torch.finfo(torch.float32).max  # finite: a running maximum that starts here meets -inf without making a NaN


def group_loss(
    token_logps: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_groups: torch.Tensor,
    ref_logps: torch.Tensor,
    alpha: float,
    beta: float,
    anchor_weight: float,
    num_prompts: int,
    negative_weight: float = 0.0,
    gate: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    """(logps (S,), chosen (G,), rejected (G,), margins (G,), losses (G,), response_coef (S,)) of packed prompts.

    The margin loss of ``reference.Margin``, whose fields the numbers are. ``losses`` are divided by ``num_prompts``
    already; ``response_coef`` is the derivative of their sum by each response's log-probability. The few numbers here
    are taken in fp64: z is a difference of large sums.

    Args:
        token_logps: (n,) wide.
        cu_seqlens: (S+1,) int32 and ``cu_groups`` (G+1,) int32, on the device.
        ref_logps: (S,).
    """
    first, S = cu_groups[:-1].long(), cu_seqlens.shape[0] - 1
    K = cu_groups.diff() - 1
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
    def rounds(self) -> bool:
        """Whether E is rounded to bf16: it then serves products with the weight as it is."""
        both = self.hidden.dtype == self.head.weight.dtype == torch.bfloat16
        return both and multiplies_bf16(self.device)

    @functools.cached_property
    def direct(self) -> bool:
        """Whether E meets the weight without a copy of it: in one product, over all of the vocabulary."""
        return self.rounds or self.hidden.dtype == self.head.weight.dtype == self.wide

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
        assert self.kept_logits is not None
        start, end = self.chunk
        n, hidden, targets = end - start, self.hidden[start:end], self.targets[start:end]
        if self.grad_filter_eps is not None:
            filtered = _FilteredGradient(self, hidden, coef, dhidden, totals)
        direct = self.direct and dhidden is not None and dhidden.dtype == self.hidden.dtype
        one_chunk = totals.weight is not None and totals.weight.dtype != self.wide
        rounds = self.rounds and (direct or one_chunk)
        into = None
        if dhidden is not None and not direct:
            into = dhidden.zero_() if dhidden.dtype == self.wide else torch.zeros_like(dhidden, dtype=self.wide)
        wide = hidden.to(self.wide) if totals.weight is not None else hidden
        for i, (first, last) in enumerate(self._blocks(n)):
            kept = self.kept_logits[first:last]
            out = self.scratch("softmax", kept.shape) if self.head.softcap or rounds else kept
            if self.head.softcap:
                softmax = torch.sub(kept, self.kept_maximum, out=out).exp_().mul_(-coef / self.kept_sum)
            else:
                # Not exp(m_b - lse): lse is rounded at the size of the logits, and all of a row's softmax with it.
                factor = (self.kept_maxima[i] - self.kept_maximum).exp_().div_(self.kept_sum).mul_(-coef)
                softmax = torch.mul(kept, factor, out=out)
            grad = self._finish(softmax, kept, first, last, targets, coef)
            if totals.bias is not None:
                _add(totals.bias[first:last], grad.sum(1), totals.fresh)
            if self.grad_filter_eps is not None:
                filtered.add(grad, first)
                continue
            if rounds:
                # Not over the logits where it serves dWeight: oneDNN reads past an odd n, and NaN * 0 is NaN (LOG.md).
                grad_16 = self.scratch("bf16", kept.shape, torch.bfloat16).copy_(grad) if one_chunk else grad
                if direct:
                    kept.view(torch.bfloat16)[:, :n].copy_(grad_16)
            elif direct and grad.data_ptr() != kept.data_ptr():
                kept.copy_(grad)
            if totals.weight is not None:
                dweight = totals.weight[first:last]
                if dweight.dtype == self.wide:
                    product_(dweight, grad, wide, add=not totals.fresh)
                elif rounds:
                    product_(dweight, grad_16, hidden)
                else:
                    dweight.copy_(grad @ wide)
            if into is not None:
                product_(into, grad.T, self._weight_block(first, last), add=True)
        if self.grad_filter_eps is not None:
            filtered.finish()
        elif direct and dhidden is not None:
            whole = self.kept_logits.view(torch.bfloat16)[:, :n] if rounds else self.kept_logits
            product_(dhidden, whole.T, self.head.weight)
        elif dhidden is not None and into is not None and into is not dhidden:
            dhidden.copy_(into)
        totals.fresh = False

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


class _FilteredGradient:
    """The products of a chunk without the columns of E in which nothing exceeds grad_filter_eps.

    A column is a row of E.T here. Those that are kept are gathered until they fill a block, and then multiplied.
    """

    def __init__(
        self,
        engine: TorchEngine,
        hidden: torch.Tensor,
        coef: torch.Tensor,
        dhidden: torch.Tensor | None,
        totals: Totals,
    ) -> None:
        assert engine.grad_filter_eps is not None
        if engine.device.type != "cpu":
            raise ValueError("grad_filter_eps on a GPU needs the Triton kernels; leave backend='torch' out")
        self.engine, self.hidden, self.dhidden, self.totals = engine, hidden, dhidden, totals
        self.wide_hidden, self.bound = hidden.to(engine.wide), engine.grad_filter_eps * coef.abs()
        self.sum = None if dhidden is None else torch.zeros_like(dhidden, dtype=engine.wide)
        self.block = next(last - first for first, last in engine._blocks(hidden.shape[0]))
        self.parts: list[torch.Tensor] = []
        self.columns: list[torch.Tensor] = []
        self.waiting = 0
        if totals.weight is not None and totals.fresh:
            totals.weight.zero_()

    def add(self, grad: torch.Tensor, first: int) -> None:
        """E.T (v, n) of the columns from ``first`` on."""
        small = (grad.abs() <= self.bound).all(1)  # NaN is not small
        rows = small.logical_not_().nonzero().squeeze(1)
        if rows.numel() == 0:
            return
        self.parts.append(grad.index_select(0, rows))
        self.columns.append(rows + first)
        self.waiting += rows.numel()
        self.engine.kept = self.engine.kept + rows.numel() * grad.shape[1]
        if self.waiting >= self.block:
            self._multiply()

    def finish(self) -> None:
        if self.waiting:
            self._multiply()
        if self.dhidden is not None and self.sum is not None:
            self.dhidden.copy_(self.sum)

    def _multiply(self) -> None:
        grad, columns = torch.cat(self.parts), torch.cat(self.columns)
        self.parts, self.columns, self.waiting = [], [], 0
        if self.sum is not None:
            weight = self.engine.head.weight.index_select(0, columns).to(self.hidden.dtype)
            product_(self.sum, grad.T, weight.to(self.engine.wide), add=True)
        if self.totals.weight is not None:
            part = product_(torch.empty(len(columns), self.engine.H, dtype=self.engine.wide), grad, self.wide_hidden)
            self.totals.weight.index_add_(0, columns, part.to(self.totals.weight.dtype))


def _rows_in(targets: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(row of each target in the block first..last as (1, n), any row where it is not there; whether it is)."""
    inside = (targets >= first) & (targets < last)
    return (targets - first).where(inside, 0).long()[None], inside


def _add(into: torch.Tensor, value: torch.Tensor, fresh: bool) -> None:
    into.copy_(value if fresh else into + value)

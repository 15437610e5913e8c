"""The torch path: chunks of tokens in plain torch, by blocks of the vocabulary. It is made for a CPU and runs anywhere.

Shapes: n tokens of a chunk, V vocabulary, v a block of it, H hidden, S responses, G prompts. *Wide*: fp32, or fp64.

A chunk's logits are transposed, (V, n). A block of the vocabulary is then contiguous, and small enough to stay in a
CPU's cache from the product through all passes over it. The forward replaces each logit by exp(logit - m_b), so the
backward needs no second exponential. With m_b a token's maximum over blocks 0..b and m its maximum over all blocks,

    softmax = exp(logit - m_b) * exp(m_b - m) / sum        sum = sum of the token's exp(logit - m)
    E.T     = softmax * -coef, plus coef at the target; times the slope of scale and softcap

With a softcap the slope needs the logits, so they are kept instead.
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

BLOCK_BYTES = 12 << 20  #: the larger of a block's logits and its widened weight
MAX_TILE = 1024  #: most tokens that meet a block of the weight together if no logits are kept
LOWEST = -torch.finfo(torch.float32).max  # finite: a running maximum that starts here and meets -inf gives no NaN


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

    ``losses`` are divided by ``num_prompts``. ``response_coef`` is the derivative of their sum by each response's
    log-probability. Sums and loss are computed in fp64, because z is a difference of large sums.

    Args:
        token_logps: (n,) wide.
        cu_seqlens, cu_groups: (S+1,) and (G+1,) int32, on the device.
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
    # unsafe: a check of the offsets would wait for the device. ResponseLayout has checked them.
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
        """Whether hidden states and weight are bf16 and the device multiplies bf16, so that E may be rounded to it."""
        both = self.hidden.dtype == self.head.weight.dtype == torch.bfloat16
        return both and multiplies_bf16(self.device)

    # --- Scores, and the gradient for given stats: all tokens meet one block of the weight before the next ------------

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
        """See ``Engine.gradient``. A block of dWeight is complete after one visit, so dWeight needs no accumulator."""
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
        self.kept_logits = None  # frees a smaller chunk before its memory is replaced
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
        """See ``Engine.backward``. Turns the logits into E.T block by block.

        A block is multiplied by the hidden states while it is in cache. It is multiplied by the weight there too, or
        kept and multiplied at the end.
        """
        start, end = self.chunk
        keeps = dhidden is not None and self._keeps_e(dhidden)
        into = None if dhidden is None or keeps else dhidden.to(self.wide).zero_()  # dhidden itself if it is wide
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
        """Whether one product of all of E with the unwidened weight fills ``dhidden``.

        This saves the weight's copy and a wide sum. If bf16 is multiplied, E is rounded to bf16. A wide ``dhidden``
        beside a narrower ``hidden``, as for a staged prompt, rules it out.
        """
        unwidened = self.multiplies_bf16 or self.hidden.dtype == self.head.weight.dtype == self.wide
        return unwidened and dhidden.dtype == self.hidden.dtype

    def _kept_e(self) -> torch.Tensor:
        """(V, n) E.T in the memory of the kept logits; a bf16 row fills the left half of its row."""
        assert self.kept_logits is not None
        n = self.kept_logits.shape[1]
        return self.kept_logits.view(torch.bfloat16)[:, :n] if self.multiplies_bf16 else self.kept_logits

    def _block_of_e(self, i: int, first: int, last: int, coef: torch.Tensor, keeps: bool) -> torch.Tensor:
        """Block ``i`` of E.T, (v, n) wide, from the kept logits.

        Overwrites the logits if neither a softcap nor a bf16 copy needs their memory. If ``keeps``, ``_kept_e`` holds
        the block too.
        """
        assert self.kept_logits is not None
        kept = self.kept_logits[first:last]
        apart = self.head.softcap or (keeps and self.multiplies_bf16)
        out = self.scratch("softmax", kept.shape) if apart else kept
        if self.head.softcap:
            softmax = torch.sub(kept, self.kept_maximum, out=out).exp_().mul_(-coef / self.kept_sum)
        else:
            # Not exp(m_b - lse): lse is rounded at the size of the logits, and its error scales the whole softmax.
            factor = (self.kept_maxima[i] - self.kept_maximum).exp_().div_(self.kept_sum).mul_(-coef)
            softmax = torch.mul(kept, factor, out=out)
        grad = self._finish(softmax, kept, first, last, self.targets[slice(*self.chunk)], coef)
        if keeps and apart:
            self._kept_e()[first:last].copy_(grad)
        return grad

    def _add_dweight(self, dweight: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor, fresh: bool) -> None:
        """Adds to a block's wide dWeight, or assigns the only chunk's, rounded to the weight's dtype."""
        if dweight.dtype == self.wide:
            product_(dweight, grad, hidden, add=not fresh)
        elif hidden.dtype == self.wide:
            dweight.copy_(grad @ hidden)
        else:
            # Not the kept E: oneDNN reads past an odd n of its strided rows, and NaN * 0 is NaN (benchmarks/LOG.md).
            product_(dweight, self.scratch("bf16", grad.shape, torch.bfloat16).copy_(grad), hidden)

    # --- Parts -----------------------------------------------------------------------------------------------------

    def _blocks(self, n: int) -> Iterator[tuple[int, int]]:
        """Ranges of the vocabulary whose logits for n tokens stay in cache."""
        step = max(64, BLOCK_BYTES // (max(n, self.H) * self.wide.itemsize) // 64 * 64)
        for first in range(0, self.V, step):
            yield first, min(first + step, self.V)

    def _operand(self, start: int, end: int) -> torch.Tensor:
        """Hidden states as operands of the products: widened on a CPU."""
        hidden = self.hidden[start:end]
        return hidden.to(self.wide) if self.device.type == "cpu" else hidden

    def _weight_block(self, first: int, last: int) -> torch.Tensor:
        """Rows first..last of the weight, rounded to the operand dtype, then widened on a CPU."""
        block = self.head.weight[first:last]
        if block.dtype != self.hidden.dtype:
            block = self.scratch("weight, rounded", block.shape, self.hidden.dtype).copy_(block)
        if block.dtype != self.wide and self.device.type == "cpu":
            block = self.scratch("weight", block.shape).copy_(block)
        return block

    def _logits(
        self, weight: torch.Tensor, hidden: torch.Tensor, first: int, last: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(v, n) logits of tokens first..last of the vocabulary."""
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
        """Turns ``grad`` (v, n) = softmax * -coef into E.T in place. Reads ``logits`` only if there is a softcap."""
        rows, inside = _rows_in(targets, first, last)
        grad.scatter_add_(0, rows, coef.where(inside, 0.0)[None])
        if self.head.softcap:
            grad.addcmul_(grad, (logits / self.head.softcap).square_(), value=-1.0)
        if self.head.logit_scale != 1.0:
            grad.mul_(self.head.logit_scale)
        if self.bias is not None:  # a masked token has no gradient, even if its row's softmax is NaN
            grad.masked_fill_(self.bias[first:last] == -float("inf"), 0.0)
        return grad


class _Statistics:
    """The running maximum, sum of exponentials and target's logit of n tokens over blocks of the vocabulary."""

    def __init__(self, engine: TorchEngine, start: int, end: int) -> None:
        self.engine, self.hidden, self.targets = engine, engine._operand(start, end), engine.targets[start:end]
        options: dict[str, Any] = {"dtype": engine.wide, "device": engine.device}
        self.maximum = torch.full((end - start,), LOWEST, **options)
        self.sum = torch.zeros(end - start, **options)
        self.target = torch.full((end - start,), float("nan"), **options)  # stays NaN for a target outside [0, V)

    def add(self, logits: torch.Tensor, first: int, in_place: bool = True) -> torch.Tensor:
        """Adds logits (v, n) from row ``first`` on; returns the maximum. ``in_place`` makes them their exponentials."""
        rows, inside = _rows_in(self.targets, first, first + logits.shape[0])
        self.target = logits.gather(0, rows).squeeze(0).where(inside, self.target)
        maximum = torch.maximum(self.maximum, logits.amax(0))
        out = logits if in_place else self.engine.scratch("softmax", logits.shape)
        exponentials = torch.sub(logits, maximum, out=out).exp_()
        self.sum.mul_((self.maximum - maximum).exp_()).add_(exponentials.sum(0))
        self.maximum = maximum
        return maximum

    def logps(self) -> torch.Tensor:
        """(n,). (target - maximum) comes first: it is exact if the target is the likeliest token."""
        return (self.target - self.maximum) - self.sum.log()


def _rows_in(targets: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(each target's row in the block first..last, (1, n), row 0 if it is outside; whether it is inside, (n,))."""
    inside = (targets >= first) & (targets < last)
    return (targets - first).where(inside, 0).long()[None], inside

"""Attention over a row that holds every prompt once (``SharedSequence``), with FlashAttention kernels.

A response's queries see its prompt and, causally, itself. Both parts are plain varlen attention on contiguous slices.
The softmax over both sets of keys is merged from the softmax over each (o the output, l the log-sum-exp of the scores):

    own    q = k = v = row                  every prompt and response on itself, causal   -> o_1, l_1
    cross  q = row[TP:], k = v = row[:TP]   responses on their prompt, not causal         -> o_2, l_2
    l = log(e^l_1 + e^l_2),  o = e^(l_1 - l) o_1 + e^(l_2 - l) o_2

The backward of each part needs the probabilities e^(score - l) over *all* keys and D = sum_d(dO * O) of the whole
output. FlashAttention's backward recomputes both from its output and log-sum-exp arguments. So it runs once for each
part with the merged ones, and the gradients of the parts add up. (Autograd through the merge would be wrong: the
kernels' log-sum-exp passes no gradient on.)

This split is not used under a sliding window that binds, nor under a softcap that the kernel lacks. Each segment then
gets its own copy of its keys.

Shapes: T tokens of the row, TP prompt tokens, A attention heads, B key/value heads (A is a multiple of B), D channels
of a head. Queries are (T, A, D), keys and values (T, B, D), log-sum-exps (A, T).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from d2o_fast.forward.flash import Kernel
from d2o_fast.forward.shared_sequence import SharedSequence, Spans, slices_index, take_rows
from d2o_fast.loss.layout import on_device
from d2o_fast.loss.matmul import wide_dtype


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: SharedSequence,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, str]:
    """Attention of every token on its prompt and, causally, on its own segment; differentiable once.

    Args:
        q: (T, A, D); k, v: (T, B, D), all of one dtype.
        scale: factor on the scores.
        window: number of positions that a query sees, its own included; None for all.
        softcap: scores become ``softcap * tanh(score / softcap)``.

    Returns:
        (T, A, D), and the name of the path that ran.
    """
    if window is not None and window >= sequence.longest:
        window = None
    if kernel is None or (softcap and not kernel.softcaps) or (window and not kernel.windows):
        with torch.autocast(q.device.type, enabled=False):  # the operands already have their dtype
            return _by_segment(q, k, v, sequence, scale, window, softcap), "segment by segment"
    if window is None:
        return _Split.apply(q, k, v, sequence, scale, softcap, kernel), kernel.name
    keys, values, spans = _gather(k, v, sequence, window)
    return VarlenAttention.apply(q, keys, values, spans, scale, window, softcap, kernel), f"{kernel.name}, windowed"


class _Split(torch.autograd.Function):
    """The two parts in the module's docstring, merged."""

    @staticmethod
    def forward(ctx, q, k, v, sequence, scale, softcap, kernel):  # type: ignore[no-untyped-def]
        n = sequence.num_prompt_tokens
        out, lse = kernel.forward(q, k, v, sequence.own, True, scale, None, softcap)
        cross, cross_lse = kernel.forward(q[n:], k[:n], v[:n], sequence.cross, False, scale, None, softcap)
        # o = o_1 + (o_2 - o_1) e^(l_2 - l), and e^(l_2 - l) = sigmoid(l_2 - l_1)
        share = torch.sigmoid(cross_lse - lse[:, n:]).T.unsqueeze(-1)
        own = out[n:].to(share.dtype)
        out[n:] = own + (cross.to(share.dtype) - own) * share
        lse[:, n:] = torch.logaddexp(lse[:, n:], cross_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.sequence, ctx.scale, ctx.softcap, ctx.kernel = sequence, scale, softcap, kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensors
        sequence, n, kernel = ctx.sequence, ctx.sequence.num_prompt_tokens, ctx.kernel
        grad = grad.contiguous()
        dq, dk, dv = kernel.backward(grad, q, k, v, out, lse, sequence.own, True, ctx.scale, None, ctx.softcap)
        dq_cross, dk_cross, dv_cross = kernel.backward(
            grad[n:],
            q[n:],
            k[:n],
            v[:n],
            out[n:],
            lse[:, n:].contiguous(),
            sequence.cross,
            False,
            ctx.scale,
            None,
            ctx.softcap,
        )
        dq[n:] += dq_cross
        dk[:n] += dk_cross
        dv[:n] += dv_cross
        return dq, dk, dv, None, None, None, None


class VarlenAttention(torch.autograd.Function):
    """Causal attention of each segment on its own keys, aligned at the ends, in one call."""

    @staticmethod
    def forward(ctx, q, k, v, spans, scale, window, softcap, kernel):  # type: ignore[no-untyped-def]
        out, lse = kernel.forward(q, k, v, spans, True, scale, window, softcap)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options, ctx.kernel = (spans, True, scale, window, softcap), kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        dq, dk, dv = ctx.kernel.backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options)
        return dq, dk, dv, None, None, None, None, None


def _gather(k: Tensor, v: Tensor, sequence: SharedSequence, window: int | None) -> tuple[Tensor, Tensor, Spans]:
    pieces, spans = sequence.gathered(window)
    key = ("index", window, k.device)
    if key not in sequence._cache:
        sequence._cache[key] = on_device(slices_index(pieces), k.device)
    index = sequence._cache[key]
    return take_rows(k, index, pieces), take_rows(v, index, pieces), spans


def _by_segment(
    q: Tensor, k: Tensor, v: Tensor, sequence: SharedSequence, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Computes each segment with its own keys and a mask. Exact for any window, softcap, dtype and device."""
    k, v, spans = _gather(k, v, sequence, window)
    outs = []
    for (q0, q1), (k0, k1) in zip(pairwise(spans.cu_q), pairwise(spans.cu_k), strict=True):
        mask = _mask(sequence, q1 - q0, k1 - k0, window, q.device)
        queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        if softcap:
            out = _capped(queries, keys, values, mask, scale, softcap)
        else:
            grouped = queries.shape[1] != keys.shape[1]
            out = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=grouped)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _mask(sequence: SharedSequence, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    # (queries, keys) bool; the last query is aligned with the last key
    name = ("mask", queries, keys, window, device)
    if name not in sequence._cache:
        distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
        sequence._cache[name] = (distance >= 0) & (distance < (window or math.inf))
    return sequence._cache[name]


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    # (1, A, queries, D) on (1, B, keys, D): the A // B query heads of one key head together
    wide = wide_dtype(q.dtype)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(wide)
    scores = grouped @ k.to(wide).transpose(2, 3).unsqueeze(2) * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v.to(wide).unsqueeze(2)).flatten(1, 2).to(q.dtype)

"""Attention over a row that holds every prompt once (``packing.SharedRow``), with FlashAttention kernels.

A response's queries see its prompt and, causally, itself. Both are plain varlen attention on contiguous slices, and a
softmax over two sets of keys is made of the softmaxes over each (o the output, l the log-sum-exp of the scores):

    own    q = k = v = row           every prompt and response on itself, causal          -> o_1, l_1
    cross  q = row[TP:], k = v = row[:TP]      a prompt's responses on it, all of it      -> o_2, l_2
    l = log(e^l_1 + e^l_2),  o = e^(l_1 - l) o_1 + e^(l_2 - l) o_2

The backward of each part needs the probabilities e^(score - l) over *all* keys and D = sum_d(dO * O) of the whole
output; FlashAttention's backward recomputes both from the output and log-sum-exp that it is given. So it is called once
for each part with the merged ones, and the parts' gradients add up. (A merge left to autograd is wrong: the kernels
return a log-sum-exp that passes no gradient on.)

A sliding window that binds, or a softcap, cannot be split so by every kernel: there each segment gets keys of its own.

Shapes: T tokens of the row, TP prompt tokens, A attention heads, B key/value heads (A is a multiple of B), D channels
of a head. Queries are (T, A, D), keys and values (T, B, D), log-sum-exps (A, T).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Protocol

import torch
from torch.nn import functional as F

from d2o_fast.packing import SharedRow, Spans, on_device, slices_index, take_rows

Tensor = torch.Tensor
aten = torch.ops.aten


class Kernel(Protocol):
    """Varlen attention that returns its log-sum-exp, and a backward that takes output and log-sum-exp as arguments.

    Causal means aligned at the ends: a segment's last query sees its last key. ``window``: keys that a query sees, its
    own position among them; None for all.
    """

    name: str
    windows: bool  #: whether it can do windows
    softcaps: bool  #: whether it can do softcaps

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: Spans,
        causal: bool,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spans: Spans,
        causal: bool,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class CpuFlash:
    """torch's FlashAttention for CPUs, which has no varlen form: one call for each run of equally long segments."""

    name, windows, softcaps = "torch's flash attention on the CPU", False, False

    def forward(self, q, k, v, spans, causal, scale, window, softcap):  # type: ignore[no-untyped-def]
        outs, lses = [], []
        for run in spans.runs:
            (queries,), (keys, values) = _queries(run, q), _keys(run, k, v)
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, 0.0, causal, scale=scale)
            outs.append(out)
            lses.append(lse.transpose(0, 1).flatten(1))
        return _one_row(outs), torch.cat(lses, dim=1)

    def backward(self, grad, q, k, v, out, lse, spans, causal, scale, window, softcap):  # type: ignore[no-untyped-def]
        gradients: tuple[list[Tensor], ...] = ([], [], [])
        for run in spans.runs:
            count, first, length, _, _ = run
            grads, queries, outs = _queries(run, grad, q, out)
            keys, values = _keys(run, k, v)
            lses = lse[:, first : first + count * length].unflatten(1, (count, length)).transpose(0, 1)
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grads, queries, keys, values, outs, lses.contiguous(), 0.0, causal, scale=scale
            )
            for parts, part in zip(gradients, found, strict=True):
                parts.append(part)
        return tuple(_one_row(parts) for parts in gradients)


def _queries(run: tuple[int, int, int, int, int], *rows: Tensor) -> list[Tensor]:
    count, first, length, _, _ = run
    return [_stack(row, count, first, length) for row in rows]


def _keys(run: tuple[int, int, int, int, int], *rows: Tensor) -> list[Tensor]:
    count, _, _, first, length = run
    return [_stack(row, count, first, length) for row in rows]


def _stack(row: Tensor, count: int, first: int, length: int) -> Tensor:
    # (T, heads, D) -> (segments, heads, length, D), a view
    return row[first : first + count * length].unflatten(0, (count, length)).transpose(1, 2)


def _one_row(parts: list[Tensor]) -> Tensor:
    # each (segments, heads, length, D) -> (T, heads, D), without a copy if there is only one
    rows = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


class CudaFlash:
    """FlashAttention as torch ships it for CUDA: fp16 and bf16. Deterministic (dQ without atomics, slower) where
    ``torch.use_deterministic_algorithms`` asks for it.
    """

    name, windows, softcaps = "torch's flash attention on CUDA", True, False

    def forward(self, q, k, v, spans, causal, scale, window, softcap):  # type: ignore[no-untyped-def]
        out, lse, *_ = aten._flash_attention_forward(
            q,
            k,
            v,
            spans.tensor("cu_q", q.device),
            spans.tensor("cu_k", q.device),
            spans.max_q,
            spans.max_k,
            0.0,
            causal,
            False,
            scale=scale,
            **_window(window),
        )
        return out, lse

    def backward(self, grad, q, k, v, out, lse, spans, causal, scale, window, softcap):  # type: ignore[no-untyped-def]
        return aten._flash_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            spans.tensor("cu_q", q.device),
            spans.tensor("cu_k", q.device),
            spans.max_q,
            spans.max_k,
            0.0,
            causal,
            torch.zeros(2, dtype=torch.uint64, device=q.device),  # the state of a dropout that is not there
            torch.empty(0, device=q.device),
            scale=scale,
            **_window(window),
        )


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


class FlashAttnPackage:
    """The flash-attn package (2.8 or later), for models loaded with attn_implementation="flash_attention_2".

    Written to its interface and not run yet; the comparison before the first step (``sharing.py``) judges it.
    """

    name, windows, softcaps = "the flash-attn package (unverified)", True, True

    def forward(self, q, k, v, spans, causal, scale, window, softcap):  # type: ignore[no-untyped-def]
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        left, right = (-1, -1) if window is None else (window - 1, 0)
        out, lse, *_ = _flash_attn_varlen_forward(
            q,
            k,
            v,
            spans.tensor("cu_q", q.device),
            spans.tensor("cu_k", q.device),
            spans.max_q,
            spans.max_k,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=left,
            window_size_right=right,
            softcap=softcap or 0.0,
        )
        return out, lse

    def backward(self, grad, q, k, v, out, lse, spans, causal, scale, window, softcap):  # type: ignore[no-untyped-def]
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        left, right = (-1, -1) if window is None else (window - 1, 0)
        dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        _flash_attn_varlen_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            spans.tensor("cu_q", q.device),
            spans.tensor("cu_k", q.device),
            spans.max_q,
            spans.max_k,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=left,
            window_size_right=right,
            softcap=softcap or 0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


def choose_kernel(q: Tensor, v: Tensor, implementation: str) -> Kernel | None:
    """The kernel for these heads where the model runs under ``implementation``; None: none of them can."""
    if q.shape[-1] != v.shape[-1]:
        return None
    if q.device.type == "cpu":
        return CpuFlash()
    halves = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and halves and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        return FlashAttnPackage() if implementation == "flash_attention_2" else CudaFlash()
    return None


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: SharedRow,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, str]:
    """Attention of every token on its prompt and, causally, on its own segment; differentiable once.

    Args:
        q: (T, A, D); k, v: (T, B, D), all of one dtype.
        scale: factor on the scores.
        window: how many positions a query sees, its own among them; None for all.
        softcap: scores become ``softcap * tanh(score / softcap)``.

    Returns:
        (T, A, D), and in words how it was computed.
    """
    if window is not None and window >= row.longest:
        window = None
    if kernel is None or (softcap and not kernel.softcaps) or (window and not kernel.windows):
        with torch.autocast(q.device.type, enabled=False):  # the operands have their type already
            return _by_segment(q, k, v, row, scale, window, softcap), "segment by segment"
    if window is None:
        return _Split.apply(q, k, v, row, scale, softcap, kernel), kernel.name
    keys, values, spans = _gather(k, v, row, window)
    return VarlenAttention.apply(q, keys, values, spans, scale, window, softcap, kernel), f"{kernel.name}, windowed"


class _Split(torch.autograd.Function):
    """The two parts of the module's docstring, merged."""

    @staticmethod
    def forward(ctx, q, k, v, row, scale, softcap, kernel):  # type: ignore[no-untyped-def]
        n = row.num_prompt_tokens
        out, lse = kernel.forward(q, k, v, row.own, True, scale, None, softcap)
        cross, cross_lse = kernel.forward(q[n:], k[:n], v[:n], row.cross, False, scale, None, softcap)
        # o = o_1 + (o_2 - o_1) e^(l_2 - l), and e^(l_2 - l) = sigmoid(l_2 - l_1)
        share = torch.sigmoid(cross_lse - lse[:, n:]).T.unsqueeze(-1)
        own = out[n:].to(share.dtype)
        out[n:] = own + (cross.to(share.dtype) - own) * share
        lse[:, n:] = torch.logaddexp(lse[:, n:], cross_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.row, ctx.scale, ctx.softcap, ctx.kernel = row, scale, softcap, kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensors
        row, n, kernel = ctx.row, ctx.row.num_prompt_tokens, ctx.kernel
        grad = grad.contiguous()
        dq, dk, dv = kernel.backward(grad, q, k, v, out, lse, row.own, True, ctx.scale, None, ctx.softcap)
        dq_cross, dk_cross, dv_cross = kernel.backward(
            grad[n:],
            q[n:],
            k[:n],
            v[:n],
            out[n:],
            lse[:, n:].contiguous(),
            row.cross,
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
    """Causal attention of segments on keys of their own, aligned at their ends, in one call."""

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


def _gather(k: Tensor, v: Tensor, row: SharedRow, window: int | None) -> tuple[Tensor, Tensor, Spans]:
    pieces, spans = row.gathered(window)
    key = ("index", window, k.device)
    if key not in row._cache:
        row._cache[key] = on_device(slices_index(pieces), k.device)
    index = row._cache[key]
    return take_rows(k, index, pieces), take_rows(v, index, pieces), spans


def _by_segment(
    q: Tensor, k: Tensor, v: Tensor, row: SharedRow, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Exact with any window, softcap, dtype and device: each segment with its own keys and a mask."""
    k, v, spans = _gather(k, v, row, window)
    outs = []
    for (q0, q1), (k0, k1) in zip(pairwise(spans.cu_q), pairwise(spans.cu_k), strict=True):
        mask = _mask(row, q1 - q0, k1 - k0, window, q.device)
        queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        if softcap:
            out = _capped(queries, keys, values, mask, scale, softcap)
        else:
            grouped = queries.shape[1] != keys.shape[1]
            out = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=grouped)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _mask(row: SharedRow, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    # (queries, keys) bool, the last query at the last key
    name = ("mask", queries, keys, window, device)
    if name not in row._cache:
        distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
        row._cache[name] = (distance >= 0) & (distance < (window or math.inf))
    return row._cache[name]


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    # (1, A, queries, D) on (1, B, keys, D): the A // B query heads of one key head together
    wide = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    grouped = q.unflatten(1, (k.shape[1], -1)).to(wide)
    scores = grouped @ k.to(wide).transpose(2, 3).unsqueeze(2) * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v.to(wide).unsqueeze(2)).flatten(1, 2).to(q.dtype)

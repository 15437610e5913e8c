"""FlashAttention kernels behind one interface: varlen; the forward returns the log-sum-exp, the backward takes it.

Shapes: T tokens of a row, A attention heads, B key/value heads (A is a multiple of B), D channels of a head. Queries
are (T, A, D), keys and values (T, B, D), log-sum-exps (A, T).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from d2o_fast.forward.shared_sequence import Spans

aten = torch.ops.aten


class Kernel(Protocol):
    """Varlen attention that returns its log-sum-exp, and a backward that takes output and log-sum-exp as arguments.

    ``causal`` aligns the ends: a segment's last query sees its last key. ``window`` is the number of keys that a query
    sees, its own position included; None for all.
    """

    name: str
    windows: bool  #: whether it supports windows
    softcaps: bool  #: whether it supports softcaps

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
    """torch's FlashAttention for CPUs. It has no varlen form, so each run of equally long segments is one call."""

    name, windows, softcaps = "torch's flash attention on the CPU", False, False

    def forward(self, q, k, v, spans, causal, scale, window, softcap):  # type: ignore[no-untyped-def]
        if causal and spans.cu_q != spans.cu_k:  # its causal mask is aligned at the starts
            raise ValueError("torch's flash attention on the CPU can be causal only where queries and keys are as many")
        outs, lses = [], []
        for count, q_first, q_length, k_first, k_length in spans.runs:
            queries = _stack(q, count, q_first, q_length)
            keys, values = (_stack(x, count, k_first, k_length) for x in (k, v))
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, 0.0, causal, scale=scale)
            outs.append(out)
            lses.append(lse.transpose(0, 1).flatten(1))
        return _one_row(outs), torch.cat(lses, dim=1)

    def backward(self, grad, q, k, v, out, lse, spans, causal, scale, window, softcap):  # type: ignore[no-untyped-def]
        gradients: tuple[list[Tensor], ...] = ([], [], [])
        for count, first, length, k_first, k_length in spans.runs:
            grads, queries, outs = (_stack(x, count, first, length) for x in (grad, q, out))
            keys, values = (_stack(x, count, k_first, k_length) for x in (k, v))
            lses = lse[:, first : first + count * length].unflatten(1, (count, length)).transpose(0, 1)
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grads, queries, keys, values, outs, lses.contiguous(), 0.0, causal, scale=scale
            )
            for parts, part in zip(gradients, found, strict=True):
                parts.append(part)
        return tuple(_one_row(parts) for parts in gradients)


def _stack(row: Tensor, count: int, first: int, length: int) -> Tensor:
    # (T, heads, D) -> (segments, heads, length, D), a view
    return row[first : first + count * length].unflatten(0, (count, length)).transpose(1, 2)


def _one_row(parts: list[Tensor]) -> Tensor:
    # each (segments, heads, length, D) -> (T, heads, D), without a copy if there is only one
    rows = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


class CudaFlash:
    """torch's FlashAttention for CUDA, for fp16 and bf16.

    ``torch.use_deterministic_algorithms`` makes it deterministic (dQ without atomics, slower).
    """

    name, windows, softcaps = "torch's flash attention on CUDA", True, False

    def forward(self, q, k, v, spans, causal, scale, window, softcap):  # type: ignore[no-untyped-def]
        out, lse, *_ = aten._flash_attention_forward(
            q,
            k,
            v,
            *_offsets(spans, q.device),
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
            *_offsets(spans, q.device),
            0.0,
            causal,
            torch.zeros(2, dtype=torch.uint64, device=q.device),  # random state of the dropout, which is off
            torch.empty(0, device=q.device),
            scale=scale,
            **_window(window),
        )


def _offsets(spans: Spans, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    return spans.tensor("cu_q", device), spans.tensor("cu_k", device), spans.max_q, spans.max_k


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


class FlashAttnPackage:
    """The flash-attn package (2.8 or later), for models loaded with attn_implementation="flash_attention_2".

    Written from its interface and not run yet. ``forward/sharing.py`` compares its results before the first step.
    """

    name, windows, softcaps = "the flash-attn package (unverified)", True, True

    def _options(self, causal: bool, scale: float, window: int | None, softcap: float | None) -> dict[str, Any]:
        everywhere = {"window_size_left": -1, "window_size_right": -1}
        options = {"dropout_p": 0.0, "softmax_scale": scale, "causal": causal, "softcap": softcap or 0.0}
        return {**options, **everywhere, **_window(window)}

    def forward(self, q, k, v, spans, causal, scale, window, softcap):  # type: ignore[no-untyped-def]
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            q,
            k,
            v,
            *_offsets(spans, q.device),
            **self._options(causal, scale, window, softcap),
        )
        return out, lse

    def backward(self, grad, q, k, v, out, lse, spans, causal, scale, window, softcap):  # type: ignore[no-untyped-def]
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

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
            *_offsets(spans, q.device),
            **self._options(causal, scale, window, softcap),
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


def choose_kernel(q: Tensor, v: Tensor, implementation: str) -> Kernel | None:
    """The kernel for these heads in a model with attention ``implementation``; None if no kernel supports them."""
    if q.shape[-1] != v.shape[-1]:
        return None
    if q.device.type == "cpu":
        return CpuFlash()
    halves = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and halves and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        return FlashAttnPackage() if implementation == "flash_attention_2" else CudaFlash()
    return None

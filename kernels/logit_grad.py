"""Row statistics of a chunk's logits and their gradient, from raw products in memory.

Shapes: n rows of the chunk, V vocabulary.

    logits (n, V) fp32: raw products hidden @ weight.T; bias, logit_scale and softcap are applied here
    logit_stats -> logps (n,), stats (2, n)        logit_grad_ -> E (n, V) of out_dtype, in the memory of ``logits``
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import LOWEST, architecture, check_device, check_softcap, exp, tanh, to_logits


class RowTile(NamedTuple):
    """The columns that a row's program reads at a time, and its launch settings."""

    block_v: int
    num_warps: int


# One configuration per architecture and kernel. No spills: tests/kernels/test_codegen.py.
ROW_TILES: dict[tuple[str, str], RowTile] = {
    ("sm_80", "stats"): RowTile(4096, 8),
    ("sm_80", "grad"): RowTile(4096, 8),
    ("sm_86", "stats"): RowTile(4096, 8),
    ("sm_86", "grad"): RowTile(4096, 8),
    ("sm_90", "stats"): RowTile(4096, 8),
    ("sm_90", "grad"): RowTile(4096, 8),
    ("sm_100", "stats"): RowTile(4096, 8),
    ("sm_100", "grad"): RowTile(4096, 8),
    ("gfx942", "stats"): RowTile(4096, 8),
    ("gfx942", "grad"): RowTile(4096, 8),
    ("interpreter", "stats"): RowTile(4096, 8),
    ("interpreter", "grad"): RowTile(4096, 8),
}


@triton.jit
def logit_stats_kernel(
    logits_ptr,
    targets_ptr,
    bias_ptr,
    logps_ptr,
    maximum_ptr,
    log_sum_ptr,
    V,
    stride_n,
    stride_b,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_n
    lanes = tl.arange(0, BLOCK_V)
    # Every lane keeps its own maximum and sum, so the loop needs no reduction across the block.
    lane_max = tl.full((BLOCK_V,), LOWEST, tl.float32)
    lane_sum = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + lanes
        in_row = offs_v < V
        product = tl.load(row_ptr + offs_v, mask=in_row, other=0.0)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_v.to(tl.int64) * stride_b, mask=in_row, other=0.0).to(tl.float32)
        logits = to_logits(product, bias, LOGIT_SCALE, SOFTCAP, HAS_BIAS)
        logits = tl.where(in_row, logits, float("-inf"))
        above = logits - lane_max
        ratio = exp(-tl.abs(above))
        lane_sum = tl.where(above > 0, lane_sum * ratio + 1.0, lane_sum + ratio)
        lane_max = tl.maximum(lane_max, logits)
    row_max = tl.max(lane_max, axis=0)
    log_sum = tl.log(tl.sum(lane_sum * exp(lane_max - row_max), axis=0))

    target = tl.load(targets_ptr + row).to(tl.int64)
    in_vocabulary = (target >= 0) & (target < V)
    product = tl.load(row_ptr + target, mask=in_vocabulary, other=0.0)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + target * stride_b, mask=in_vocabulary, other=0.0).to(tl.float32)
    target_logit = to_logits(product, bias, LOGIT_SCALE, SOFTCAP, HAS_BIAS)
    logp = tl.where(in_vocabulary, (target_logit - row_max) - log_sum, float("nan"))
    tl.store(logps_ptr + row, logp)
    tl.store(maximum_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)


# Vector-Jacobian product. With coef = dL/dlogp of a row, y the target and p = exp((logit - maximum) - log_sum):
#
#     dL/dlogit[v]   = coef * (1[v = y] - p[v])
#     dL/dproduct[v] = dL/dlogit[v] * LOGIT_SCALE * (1 - tanh(x[v] / SOFTCAP)^2)        last factor: only with a softcap
#
# The result overwrites the products. In a 2-byte dtype element j is at byte 2j of the row, over product j/2. Blocks run
# from left to right, so that product was read with this block or an earlier one. A barrier separates a block's reads
# from its writes, so no thread overwrites a product that another thread has yet to read.
@triton.jit
def logit_grad_kernel(
    logits_ptr,
    out_ptr,  # the same memory in the output's dtype
    targets_ptr,
    maximum_ptr,
    log_sum_ptr,
    coef_ptr,
    bias_ptr,
    V,
    stride_n,
    stride_on,
    stride_b,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_n
    out_row_ptr = out_ptr + row * stride_on
    target = tl.load(targets_ptr + row)
    maximum = tl.load(maximum_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    coef = tl.load(coef_ptr + row)
    lanes = tl.arange(0, BLOCK_V)
    for start in range(0, V, BLOCK_V):
        offs_v = start + lanes
        in_row = offs_v < V
        x = tl.load(row_ptr + offs_v, mask=in_row, other=0.0)
        tl.debug_barrier()
        if HAS_BIAS:
            x += tl.load(bias_ptr + offs_v.to(tl.int64) * stride_b, mask=in_row, other=0.0).to(tl.float32)
        if LOGIT_SCALE != 1.0:
            x *= LOGIT_SCALE
        slope = LOGIT_SCALE
        logits = x
        if SOFTCAP > 0.0:
            capped = tanh(x * (1.0 / SOFTCAP))
            slope = LOGIT_SCALE * (1.0 - capped * capped)
            logits = SOFTCAP * capped
        grad = coef * (tl.where(offs_v == target, 1.0, 0.0) - exp((logits - maximum) - log_sum)) * slope
        # A masked token has no gradient, even if the whole row is masked and its softmax NaN.
        grad = tl.where(x == float("-inf"), 0.0, grad)
        tl.store(out_row_ptr + offs_v, grad.to(out_ptr.dtype.element_ty), mask=in_row)


def logit_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each row's target, (n,), and statistics of the row, (2, n), fp32, in nats.

    The statistics are as in ``linear_logprob_forward``. A target outside [0, V) reads nothing and gives NaN in
    ``logps``. The host does not wait for the device.

    Args:
        logits: (n, V) fp32 raw products; its rows do not overlap, their elements are adjacent.
        targets: (n,) int64 or int32.
        bias: (V,) of any floating dtype, added in fp32.

    Raises:
        TypeError, ValueError: other dtypes or shapes, tensors on several devices, a softcap that is not positive.
    """
    n, V = _check(logits, targets, bias)
    logps = torch.empty(n, dtype=torch.float32, device=logits.device)
    stats = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    if n == 0:
        return logps, stats
    tile = ROW_TILES[architecture(logits.device), "stats"]
    logit_stats_kernel[(n,)](
        logits,
        targets.contiguous(),
        bias,
        logps,
        *stats.unbind(0),
        V,
        logits.stride(0),
        0 if bias is None else bias.stride(0),
        LOGIT_SCALE=float(logit_scale),
        SOFTCAP=check_softcap(softcap),
        HAS_BIAS=bias is not None,
        BLOCK_V=tile.block_v,
        num_warps=tile.num_warps,
    )
    return logps, stats


def logit_grad_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    stats: torch.Tensor,
    coef: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """dL/dproduct (n, V) of ``out_dtype``, written over ``logits``. The caller must not use them again.

    ``coef * (onehot(target) - softmax) * d(logit)/d(product)``, computed in fp32 and rounded once. It is exactly
    zero if product, bias and scale give -inf. The row stride of a 2-byte result, in elements, is twice the products'.

    Args:
        logits: (n, V) fp32 raw products; its rows do not overlap, their elements are adjacent.
        targets: (n,) int64 or int32. A target outside [0, V) matches no column.
        stats: (2, n) fp32 from ``logit_stats``.
        coef: (n,) fp32, dL/dlogp of each row.
        bias: (V,) of any floating dtype, added in fp32.
        out_dtype: float32, bfloat16 or float16.

    Raises:
        TypeError, ValueError: other dtypes or shapes, tensors on several devices, a softcap that is not positive.
    """
    n, V = _check(logits, targets, bias)
    for name, tensor, shape in (("stats", stats, (2, n)), ("coef", coef, (n,))):
        if tensor.dtype != torch.float32 or tensor.shape != shape:
            raise ValueError(f"{name} must be fp32 {shape}, not {tensor.dtype} {tuple(tensor.shape)}")
    if out_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"out_dtype must be float32, bfloat16 or float16, not {out_dtype}")
    check_device(logits, stats, coef)
    out = logits if out_dtype == torch.float32 else logits.view(out_dtype)[:, :V]
    if n == 0:
        return out
    tile = ROW_TILES[architecture(logits.device), "grad"]
    logit_grad_kernel[(n,)](
        logits,
        out,
        targets.contiguous(),
        *stats.contiguous().unbind(0),
        coef.contiguous(),
        bias,
        V,
        logits.stride(0),
        out.stride(0),
        0 if bias is None else bias.stride(0),
        LOGIT_SCALE=float(logit_scale),
        SOFTCAP=check_softcap(softcap),
        HAS_BIAS=bias is not None,
        BLOCK_V=tile.block_v,
        num_warps=tile.num_warps,
    )
    return out


def _check(logits: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None) -> tuple[int, int]:
    if logits.dtype != torch.float32:
        raise TypeError(f"logits must be float32, not {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] == 0 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(f"logits must be (n, V) with adjacent columns, not {tuple(logits.shape)} {logits.stride()}")
    n, V = logits.shape
    if n > 1 and logits.stride(0) < V:
        raise ValueError(f"logits must have rows that do not overlap, not {tuple(logits.shape)} {logits.stride()}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, not {targets.dtype}")
    if targets.shape != (n,):
        raise ValueError(f"targets must be ({n},), not {tuple(targets.shape)}")
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"bias must be ({V},), not {tuple(bias.shape)}")
    check_device(logits, targets, bias)
    return n, V

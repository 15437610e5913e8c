"""The two products of a chunk's gradient, over the columns of the vocabulary that are not negligible.

Shapes: n rows of the chunk, V vocabulary, H hidden, M <= V kept columns.

    grad (n, V), weight (V, H), hidden (n, H)
    dhidden (n, H) = grad[:, kept] @ weight[kept]          dweight (V, H)[kept] += grad[:, kept].T @ hidden

A column is kept if one of its gradients exceeds ``eps`` times its row's coefficient. The steps, all on the device:

1. every column gets a flag (several programs may store the same 1);
2. a prefix sum of the flags gives each kept column its place in a list, and M;
3. each row's kept gradients move to its left end, so that the products read a plain matrix;
4. two matrix kernels read M on the device and stop there; their grids do not depend on M.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import architecture, check_device, interpreted, num_processors


class ProductTile(NamedTuple):
    """Rows and columns of a result's tile, the step along the summed axis, and launch settings."""

    block_m: int
    block_h: int
    block_k: int
    num_warps: int
    num_stages: int


# One configuration per architecture, product and kind of operands (see product_kind), without spills:
# tests/kernels/test_codegen.py.
# dhidden's loop reads the list of columns before the weight's rows that it names, which takes two of the stages.
DHIDDEN_TILES: dict[tuple[str, str], ProductTile] = {
    ("sm_80", "16-bit"): ProductTile(128, 128, 64, 8, 5),
    ("sm_80", "16-bit odd"): ProductTile(64, 64, 32, 8, 3),
    ("sm_80", "fp32"): ProductTile(64, 64, 32, 8, 5),
    ("sm_80", "fp32 odd"): ProductTile(64, 64, 32, 8, 5),
    ("sm_86", "16-bit"): ProductTile(128, 128, 32, 8, 5),
    ("sm_86", "16-bit odd"): ProductTile(64, 64, 32, 8, 3),
    ("sm_86", "fp32"): ProductTile(64, 64, 32, 8, 5),
    ("sm_86", "fp32 odd"): ProductTile(64, 64, 32, 8, 5),
    ("sm_90", "16-bit"): ProductTile(128, 256, 64, 8, 5),
    ("sm_90", "16-bit odd"): ProductTile(128, 64, 32, 8, 3),
    ("sm_90", "fp32"): ProductTile(64, 64, 32, 8, 5),
    ("sm_90", "fp32 odd"): ProductTile(64, 64, 32, 8, 5),
    ("sm_100", "16-bit"): ProductTile(128, 128, 64, 8, 5),
    ("sm_100", "16-bit odd"): ProductTile(128, 64, 32, 8, 3),
    ("sm_100", "fp32"): ProductTile(64, 64, 32, 8, 5),
    ("sm_100", "fp32 odd"): ProductTile(64, 64, 32, 8, 5),
    ("gfx942", "16-bit"): ProductTile(128, 128, 64, 8, 2),
    ("gfx942", "16-bit odd"): ProductTile(64, 64, 32, 4, 1),
    ("gfx942", "fp32"): ProductTile(64, 64, 32, 4, 2),
    ("gfx942", "fp32 odd"): ProductTile(64, 32, 32, 8, 2),
}
DWEIGHT_TILES: dict[tuple[str, str], ProductTile] = {
    ("sm_80", "16-bit"): ProductTile(128, 128, 64, 8, 3),
    ("sm_80", "16-bit odd"): ProductTile(64, 64, 32, 8, 3),
    ("sm_80", "fp32"): ProductTile(64, 64, 32, 8, 3),
    ("sm_80", "fp32 odd"): ProductTile(64, 32, 32, 8, 3),
    ("sm_86", "16-bit"): ProductTile(128, 128, 32, 8, 3),
    ("sm_86", "16-bit odd"): ProductTile(64, 64, 32, 8, 3),
    ("sm_86", "fp32"): ProductTile(64, 64, 32, 8, 3),
    ("sm_86", "fp32 odd"): ProductTile(64, 32, 32, 8, 3),
    ("sm_90", "16-bit"): ProductTile(128, 256, 64, 8, 3),
    ("sm_90", "16-bit odd"): ProductTile(128, 64, 32, 8, 3),
    ("sm_90", "fp32"): ProductTile(64, 64, 32, 8, 3),
    ("sm_90", "fp32 odd"): ProductTile(64, 32, 32, 8, 3),
    ("sm_100", "16-bit"): ProductTile(128, 128, 64, 8, 4),
    ("sm_100", "16-bit odd"): ProductTile(128, 64, 32, 8, 3),
    ("sm_100", "fp32"): ProductTile(64, 64, 32, 8, 3),
    ("sm_100", "fp32 odd"): ProductTile(64, 32, 32, 8, 3),
    ("gfx942", "16-bit"): ProductTile(128, 128, 64, 8, 2),
    ("gfx942", "16-bit odd"): ProductTile(64, 32, 32, 4, 1),
    ("gfx942", "fp32"): ProductTile(64, 64, 32, 4, 2),
    ("gfx942", "fp32 odd"): ProductTile(64, 32, 32, 8, 2),
}
for _table in (DHIDDEN_TILES, DWEIGHT_TILES):
    for _kind in ("16-bit", "16-bit odd", "fp32", "fp32 odd"):
        _table["interpreter", _kind] = ProductTile(16, 32, 32, 4, 1)
FLAG_ROWS, FLAG_COLUMNS = 128, 512  # the block that a program of flag_columns_kernel reads
FLAG_STEP = 8  # rows at a time
BLOCK_LIST = 1024
BLOCK_PACK = 4096


@triton.jit
def flag_columns_kernel(
    grad_ptr,
    coef_ptr,
    flags_ptr,  # (V,) int32, zero before
    eps,
    n,
    V,
    stride_gn,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = offs_v < V
    found = tl.zeros((STEP, BLOCK_V), tl.int32)
    first = tl.program_id(1) * ROWS
    for row in range(first, tl.minimum(first + ROWS, n), STEP):
        offs_n = row + tl.arange(0, STEP)
        in_rows = offs_n < n
        bound = eps * tl.abs(tl.load(coef_ptr + offs_n, mask=in_rows, other=0.0))
        grad_ptrs = grad_ptr + offs_n.to(tl.int64)[:, None] * stride_gn + offs_v[None, :]
        grad = tl.load(grad_ptrs, mask=in_rows[:, None] & in_row[None, :], other=0.0).to(tl.float32)
        # Negated, so that a NaN on either side keeps the column.
        found |= (~(tl.abs(grad) <= bound[:, None])).to(tl.int32)
    tl.store(flags_ptr + offs_v, tl.full((BLOCK_V,), 1, tl.int32), mask=in_row & (tl.max(found, axis=0) > 0))


@triton.jit
def list_columns_kernel(flags_ptr, places_ptr, columns_ptr, V, BLOCK_V: tl.constexpr):
    """Stores the j-th flagged column in columns[j]; ``places`` (V,) int32 is the inclusive prefix sum of the flags."""
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = offs_v < V
    kept = tl.load(flags_ptr + offs_v, mask=in_row, other=0) > 0
    place = tl.load(places_ptr + offs_v, mask=in_row, other=1) - 1
    tl.store(columns_ptr + place, offs_v, mask=in_row & kept)


# One program packs one row. columns[j] >= j, so a block's gradients come from its own place or from further right.
# Blocks therefore run from left to right, and a barrier separates a block's reads from its writes. Up to ZEROS columns
# past the last kept one become zero, so that the products may read a whole block.
@triton.jit
def pack_rows_kernel(grad_ptr, columns_ptr, kept_ptr, V, stride_gn, BLOCK_V: tl.constexpr, ZEROS: tl.constexpr):
    kept = tl.load(kept_ptr)
    row_ptr = grad_ptr + tl.program_id(0).to(tl.int64) * stride_gn
    if kept < V:
        for start in range(0, kept, BLOCK_V):
            offs_j = start + tl.arange(0, BLOCK_V)
            listed = offs_j < kept
            columns = tl.load(columns_ptr + offs_j, mask=listed, other=0)
            grad = tl.load(row_ptr + columns, mask=listed, other=0.0)
            tl.debug_barrier()
            tl.store(row_ptr + offs_j, grad, mask=listed)
        offs_j = kept + tl.arange(0, ZEROS)
        tl.store(row_ptr + offs_j, tl.zeros((ZEROS,), grad_ptr.dtype.element_ty), mask=offs_j < V)


# Vector-Jacobian product of product = hidden @ weight.T by hidden: dhidden = grad @ weight, over the kept columns.
# Gradients past the last kept column are zero for a whole block (pack_rows_kernel); past the row's end they are masked.
@triton.jit
def dhidden_kernel(
    grad_ptr,  # (n, M) packed
    weight_ptr,
    columns_ptr,
    kept_ptr,
    dhidden_ptr,
    n,
    V,
    H,
    stride_gn,
    stride_wv,
    stride_wh,
    stride_dn,
    UPCAST: tl.constexpr,  # as in linear_logprob_kernel
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    kept = tl.load(kept_ptr)
    # Row tiles that share a stripe of the weight are consecutive, so they read it from L2.
    num_n_tiles = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    offs_n = (pid % num_n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = (pid // num_n_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
    lanes = tl.arange(0, BLOCK_V)
    rows = tl.minimum(offs_n, n - 1).to(tl.int64)
    grad_ptrs = grad_ptr + rows[:, None] * stride_gn + lanes[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for start in range(0, kept, BLOCK_V):
        offs_j = start + lanes
        columns = tl.load(columns_ptr + offs_j, mask=offs_j < kept, other=0).to(tl.int64)
        weight_ptrs = weight_ptr + columns[:, None] * stride_wv + offs_h[None, :].to(tl.int64) * stride_wh
        weight = tl.load(weight_ptrs, mask=(offs_j[:, None] < kept) & (offs_h[None, :] < H), other=0.0)
        grad = tl.load(grad_ptrs, mask=offs_j[None, :] < V, other=0.0)
        if UPCAST:
            grad = grad.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(grad, weight, total, input_precision="ieee")
        grad_ptrs += BLOCK_V
    dhidden_ptrs = dhidden_ptr + offs_n.to(tl.int64)[:, None] * stride_dn + offs_h[None, :]
    tl.store(dhidden_ptrs, total.to(dhidden_ptr.dtype.element_ty), mask=(offs_n[:, None] < n) & (offs_h[None, :] < H))


# Vector-Jacobian product of product = hidden @ weight.T by weight: dweight = grad.T @ hidden, its kept rows.
# Lanes past the last kept column compute on arbitrary values; their results are masked out.
@triton.jit
def dweight_kernel(
    grad_ptr,  # (n, M) packed
    hidden_ptr,
    columns_ptr,
    kept_ptr,
    dweight_ptr,
    n,
    V,
    H,
    stride_gn,
    stride_hn,
    stride_hh,
    stride_dv,
    FRESH: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kept = tl.load(kept_ptr)
    num_h_tiles = tl.cdiv(H, BLOCK_H)
    lanes_n = tl.arange(0, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(kept, BLOCK_V) * num_h_tiles, tl.num_programs(0)):
        offs_j = (tile // num_h_tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
        offs_h = (tile % num_h_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
        grad_ptrs = grad_ptr + lanes_n.to(tl.int64)[:, None] * stride_gn + offs_j[None, :]
        hidden_ptrs = hidden_ptr + lanes_n.to(tl.int64)[:, None] * stride_hn + offs_h[None, :].to(tl.int64) * stride_hh
        total = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
        for start in range(0, n, BLOCK_N):
            in_rows = lanes_n[:, None] < n - start
            grad = tl.load(grad_ptrs, mask=in_rows & (offs_j[None, :] < V), other=0.0)
            hidden = tl.load(hidden_ptrs, mask=in_rows & (offs_h[None, :] < H), other=0.0)
            if UPCAST:
                grad = grad.to(tl.float32)
                hidden = hidden.to(tl.float32)
            total = tl.dot(tl.trans(grad), hidden, total, input_precision="ieee")
            grad_ptrs += tl.cast(stride_gn, tl.int64) * BLOCK_N
            hidden_ptrs += tl.cast(stride_hn, tl.int64) * BLOCK_N
        columns = tl.load(columns_ptr + offs_j, mask=offs_j < kept, other=0).to(tl.int64)
        # In two halves, one after the other: the old values of a whole tile would take as many registers as the sums.
        halves = tl.split(tl.permute(tl.reshape(total, (BLOCK_V, 2, BLOCK_H // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            offs_h = (tile % num_h_tiles) * BLOCK_H + half * (BLOCK_H // 2) + tl.arange(0, BLOCK_H // 2)
            dweight_ptrs = dweight_ptr + columns[:, None] * stride_dv + offs_h[None, :]
            mask = (offs_j[:, None] < kept) & (offs_h[None, :] < H)
            value = halves[half]
            if not FRESH:
                value += tl.load(dweight_ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(dweight_ptrs, value.to(dweight_ptr.dtype.element_ty), mask=mask)


def filtered_products(
    grad: torch.Tensor,
    coef: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    dhidden: torch.Tensor | None,
    dweight: torch.Tensor | None,
    fresh: bool,
) -> torch.Tensor:
    """Fills ``dhidden`` and adds to ``dweight`` from the kept columns of ``grad``; returns their number.

    Column v is kept if ``|grad[m, v]| > eps * |coef[m]|`` for some row m, compared in fp32, or if either side is
    NaN. The products omit the other columns. Elementwise, the results differ from the full products by at most

        row m of dhidden:            eps * |coef[m]| * sum of |weight[v]| over the columns v not kept
        row v of dweight, not kept:  eps * sum over rows m of |coef[m]| * |hidden[m]|

    and the kept rows of dweight by rounding alone. With ``eps`` 0 only columns of zeros are omitted. Accumulation is in
    fp32; fp32 operands are multiplied in IEEE fp32. The bits are the same on every run. The host does not wait for the
    device.

    Args:
        grad: (n, V) fp32, bf16 or fp16, dL/dproduct of the chunk; its rows do not overlap, their elements
            are adjacent. Its values are overwritten.
        coef: (n,) fp32, dL/dlogp of each row.
        weight: (V, H) of grad's dtype, any strides.
        hidden: (n, H) of grad's dtype, any strides.
        dhidden: (n, H) fp32 or of grad's dtype, its columns adjacent, or None. It is overwritten.
        dweight: (V, H) fp32, bf16 or fp16, its columns adjacent, or None. The products are added to the kept rows
            and the sum is rounded once.
        fresh: ``dweight`` is uninitialised: its kept rows are assigned, all others become zero.

    Returns:
        () int32 on the device: the number of kept columns, M.

    Raises:
        TypeError, ValueError: other dtypes or shapes, tensors on several devices, eps negative or NaN.
    """
    n, V, H = _check(grad, coef, eps, weight, hidden, dhidden, dweight)
    device, arch = grad.device, architecture(grad.device)
    if dweight is not None and fresh:
        dweight.zero_()
    flags = torch.zeros(V, dtype=torch.int32, device=device)
    if n == 0:
        return flags.sum(dtype=torch.int32)
    flag_columns_kernel[(triton.cdiv(V, FLAG_COLUMNS), triton.cdiv(n, FLAG_ROWS))](
        grad,
        coef.contiguous(),
        flags,
        float(eps),
        n,
        V,
        grad.stride(0),
        ROWS=FLAG_ROWS,
        STEP=FLAG_STEP,
        BLOCK_V=FLAG_COLUMNS,
        num_warps=4,
    )
    places = flags.cumsum(0, dtype=torch.int32)
    kept = places[-1].clone()  # a view would keep all of ``places`` in memory
    columns = torch.empty_like(flags)
    list_columns_kernel[(triton.cdiv(V, BLOCK_LIST),)](flags, places, columns, V, BLOCK_V=BLOCK_LIST, num_warps=4)
    dhidden_tile = DHIDDEN_TILES[arch, product_kind(grad, weight)]
    pack_rows_kernel[(n,)](
        grad, columns, kept, V, grad.stride(0), BLOCK_V=BLOCK_PACK, ZEROS=dhidden_tile.block_k, num_warps=8
    )
    if dhidden is not None:
        tile = dhidden_tile
        dhidden_kernel[(triton.cdiv(n, tile.block_m) * triton.cdiv(H, tile.block_h),)](
            grad,
            weight,
            columns,
            kept,
            dhidden,
            n,
            V,
            H,
            grad.stride(0),
            *weight.stride(),
            dhidden.stride(0),
            UPCAST=interpreted(),
            BLOCK_N=tile.block_m,
            BLOCK_H=tile.block_h,
            BLOCK_V=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if dweight is not None:
        tile = DWEIGHT_TILES[arch, product_kind(grad, hidden)]
        most = triton.cdiv(V, tile.block_m) * triton.cdiv(H, tile.block_h)
        dweight_kernel[(min(most, num_processors(device)),)](
            grad,
            hidden,
            columns,
            kept,
            dweight,
            n,
            V,
            H,
            grad.stride(0),
            *hidden.stride(),
            dweight.stride(0),
            FRESH=fresh,
            UPCAST=interpreted(),
            BLOCK_V=tile.block_m,
            BLOCK_H=tile.block_h,
            BLOCK_N=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return kept


def product_kind(grad: torch.Tensor, operand: torch.Tensor) -> str:
    """The kind in the tile tables' keys for these operands; ``odd``: rows that cannot be read 16 bytes at a time."""
    aligned = all(
        t.stride(1) == 1 and t.shape[1] % 16 == 0 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0
        for t in (grad, operand)
    )
    return ("fp32" if grad.element_size() == 4 else "16-bit") + ("" if aligned else " odd")


def _check(
    grad: torch.Tensor,
    coef: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    dhidden: torch.Tensor | None,
    dweight: torch.Tensor | None,
) -> tuple[int, int, int]:
    if grad.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"grad must be float32, bfloat16 or float16, not {grad.dtype}")
    if grad.dim() != 2 or grad.shape[1] == 0 or (grad.shape[1] > 1 and grad.stride(1) != 1):
        raise ValueError(f"grad must be (n, V) with adjacent columns, not {tuple(grad.shape)} {grad.stride()}")
    n, V = grad.shape
    if n > 1 and grad.stride(0) < V:
        raise ValueError(f"grad must have rows that do not overlap, not {tuple(grad.shape)} {grad.stride()}")
    if not eps >= 0:
        raise ValueError(f"eps must be zero or positive, got {eps}")
    if hidden.dim() != 2 or hidden.shape[0] != n or hidden.shape[1] == 0:
        raise ValueError(f"hidden must be ({n}, H), H > 0, not {tuple(hidden.shape)}")
    H = hidden.shape[1]
    for name, tensor, shape, dtypes in (
        ("coef", coef, (n,), (torch.float32,)),
        ("weight", weight, (V, H), (grad.dtype,)),
        ("hidden", hidden, (n, H), (grad.dtype,)),
        ("dhidden", dhidden, (n, H), (torch.float32, grad.dtype)),
        ("dweight", dweight, (V, H), (torch.float32, torch.bfloat16, torch.float16)),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, not {tuple(tensor.shape)}")
        if name[0] == "d" and H > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name} must have adjacent columns, not strides {tensor.stride()}")
    check_device(grad, coef, weight, hidden, dhidden, dweight)
    return n, V, H

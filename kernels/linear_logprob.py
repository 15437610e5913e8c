"""Log-probability of one target per row, from hidden states and the head's weight, without logits in memory.

Shapes: N response tokens, V vocabulary, H hidden, P splits of the vocabulary.

    hidden (N, H), weight (V, H), bias (V,), targets (N,)  ->  logps (N,) fp32, stats (2, N) fp32
    logps[n] = logit[n, targets[n]] - stats[0, n] - stats[1, n]
    stats[0, n] = max_v logit[n, v],   stats[1, n] = log sum_v exp(logit[n, v] - stats[0, n])

The sum of the two statistics is the log-sum-exp. Two numbers keep digits that it loses if logits are far from zero.

A work item is BLOCK_N rows and one of P contiguous ranges of the vocabulary. Its program walks the range in tiles of
BLOCK_V columns, keeps the running maximum, the sum of exponentials and the target's logit of each row in registers, and
writes these three numbers. A last kernel combines the P partial results in the order of the splits, so the bits do not
depend on the order in which programs finish. Temporary memory: 3 * P * N floats, bounded by ``choose_splits``.

Two kernels do the walk. ``linear_logprob_tma_kernel`` serves Hopper and Blackwell if the rows suit tensor descriptors.
``linear_logprob_kernel`` serves every other device, dtype and stride through pointers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import LOWEST, architecture, check_device, check_softcap, exp, interpreted, num_processors, to_logits


class Tile(NamedTuple):
    """A tile configuration; ``group_n`` row tiles walk a range of the vocabulary side by side."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    group_n: int = 12


# One configuration per architecture and kind of operands (see tile_kind). No spills: tests/kernels/test_codegen.py.
TILES: dict[tuple[str, str], Tile] = {
    ("sm_80", "16-bit"): Tile(128, 128, 64, 8, 3),
    ("sm_80", "16-bit capped"): Tile(128, 128, 64, 8, 3),
    ("sm_80", "16-bit odd"): Tile(64, 64, 32, 8, 3),
    ("sm_80", "mixed"): Tile(64, 128, 32, 8, 3),
    ("sm_80", "fp32"): Tile(64, 64, 32, 8, 3),
    ("sm_80", "fp32 odd"): Tile(64, 64, 32, 8, 3),
    ("sm_86", "16-bit"): Tile(128, 128, 32, 8, 3),
    ("sm_86", "16-bit capped"): Tile(128, 128, 32, 8, 3),
    ("sm_86", "16-bit odd"): Tile(64, 64, 32, 8, 3),
    ("sm_86", "mixed"): Tile(64, 128, 32, 8, 3),
    ("sm_86", "fp32"): Tile(64, 64, 32, 8, 3),
    ("sm_86", "fp32 odd"): Tile(64, 64, 32, 8, 3),
    ("sm_90", "16-bit"): Tile(128, 256, 64, 8, 3),
    ("sm_90", "16-bit capped"): Tile(128, 128, 64, 8, 3),
    ("sm_90", "16-bit odd"): Tile(128, 64, 32, 8, 3),
    ("sm_90", "mixed"): Tile(128, 128, 64, 8, 3),
    ("sm_90", "fp32"): Tile(64, 64, 32, 8, 3),
    ("sm_90", "fp32 odd"): Tile(64, 64, 32, 8, 3),
    ("sm_100", "16-bit"): Tile(128, 128, 64, 8, 3),
    ("sm_100", "16-bit capped"): Tile(128, 128, 64, 8, 3),
    ("sm_100", "16-bit odd"): Tile(128, 64, 32, 8, 3),
    ("sm_100", "mixed"): Tile(128, 128, 32, 8, 3),
    ("sm_100", "fp32"): Tile(64, 64, 32, 8, 3),
    ("sm_100", "fp32 odd"): Tile(64, 64, 32, 8, 3),
    ("gfx942", "16-bit"): Tile(128, 128, 64, 8, 2),
    ("gfx942", "16-bit capped"): Tile(128, 128, 64, 8, 2),
    ("gfx942", "16-bit odd"): Tile(64, 64, 32, 4, 1),
    ("gfx942", "mixed"): Tile(64, 64, 32, 8, 2),
    ("gfx942", "fp32"): Tile(64, 64, 32, 4, 2),
    ("gfx942", "fp32 odd"): Tile(64, 32, 32, 8, 2),
}
TILES |= {
    ("interpreter", kind): Tile(16, 32, 32, 4, 1, 2)
    for kind in ("16-bit", "16-bit capped", "16-bit odd", "mixed", "fp32", "fp32 odd")
}
# The same for 16-bit operands read through tensor descriptors, for the architectures that have them. Two consumer
# warpgroups of 64 x 256 fp32 accumulators fill Hopper's registers; half the columns would read a third more from L2.
DESCRIPTOR_TILES: dict[str, Tile] = {
    "sm_90": Tile(128, 256, 64, 8, 4),
    "sm_100": Tile(128, 256, 64, 8, 4),
    "interpreter": Tile(16, 32, 32, 4, 1, 2),
}
MAX_ITEMS_PER_PROCESSOR = 16  # bounds P for many rows, and with it the temporary memory
BLOCK_COMBINE = 128


@triton.jit
def work_item(item, N, num_splits, BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr):
    """(row tile, split) of a work item.

    The items of GROUP_N row tiles and all splits are consecutive. So the row tiles of a group read a weight tile from
    L2, and the group's hidden states stay in L2 for the whole walk.
    """
    group = item // (GROUP_N * num_splits)
    first_tile = group * GROUP_N
    group_size = tl.minimum(tl.cdiv(N, BLOCK_N) - first_tile, GROUP_N)
    rest = item - group * (GROUP_N * num_splits)
    return first_tile + rest % group_size, rest // group_size


@triton.jit
def add_tile(
    row_max,
    row_sum,
    target_logit,
    product,
    start,  # the tile's first column
    targets,
    bias_ptr,
    V,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The rows' (maximum, sum of exp(logit - maximum), logit of the target) after adding a tile's raw products."""
    lanes = tl.arange(0, BLOCK_V)
    in_tile = lanes < V - start
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + start + lanes, mask=in_tile, other=0.0).to(tl.float32)[None, :]
    logits = to_logits(product, bias, LOGIT_SCALE, SOFTCAP, HAS_BIAS)
    # Columns past the vocabulary must be -inf before the maximum.
    logits = tl.where(in_tile[None, :], logits, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(logits, axis=1))
    row_sum = row_sum * exp(row_max - new_max) + tl.sum(exp(logits - new_max[:, None]), axis=1)
    # 32 bits, because every element is compared. A target outside the vocabulary may wrap: combine_splits_kernel makes
    # its row NaN.
    target_lane = (targets - start).to(tl.int32)
    target_logit += tl.sum(tl.where(lanes[None, :] == target_lane[:, None], logits, 0.0), axis=1)
    return new_max, row_sum, target_logit


@triton.jit
def store_partial(partial_ptr, row_max, row_sum, target_logit, n_tile, split, N, num_splits, BLOCK_N: tl.constexpr):
    offs_n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    partial = partial_ptr + tl.cast(split, tl.int64) * N + offs_n
    in_rows = offs_n < N
    plane = tl.cast(num_splits, tl.int64) * N
    tl.store(partial, row_max, mask=in_rows)
    tl.store(partial + plane, row_sum, mask=in_rows)
    tl.store(partial + 2 * plane, target_logit, mask=in_rows)


# One program per multiprocessor takes work items in turn. An item walks the vocabulary and H in one loop, so the first
# blocks of the next tile load while the statistics of this one are computed.
@triton.jit
def linear_logprob_tma_kernel(
    hidden_desc,  # (N, H) in blocks of (BLOCK_N, BLOCK_H); elements outside read as zero
    weight_desc,  # (V, H) in blocks of (BLOCK_V, BLOCK_H)
    bias_ptr,
    targets_ptr,
    partial_ptr,  # (3, P, N) fp32: maximum, sum of exp(logit - maximum), logit of the target
    N,
    V,
    H,
    num_splits,
    tiles_per_split,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose dot reads bf16 as integers; the products are exact either way
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    num_h_blocks = tl.cdiv(H, BLOCK_H)
    for item in range(tl.program_id(0), tl.cdiv(N, BLOCK_N) * num_splits, tl.num_programs(0)):
        n_tile, split = work_item(item, N, num_splits, BLOCK_N, GROUP_N)
        first_row = n_tile * BLOCK_N
        offs_n = first_row + tl.arange(0, BLOCK_N)
        targets = tl.load(targets_ptr + offs_n, mask=offs_n < N, other=-1).to(tl.int64)
        row_max = tl.full((BLOCK_N,), LOWEST, tl.float32)
        row_sum = tl.zeros((BLOCK_N,), tl.float32)
        target_logit = tl.zeros((BLOCK_N,), tl.float32)

        first_v_tile = split * tiles_per_split
        num_v_tiles = tl.minimum(tiles_per_split, tl.cdiv(V, BLOCK_V) - first_v_tile)
        start = first_v_tile * BLOCK_V
        h_block = 0
        product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for _ in range(num_v_tiles * num_h_blocks):
            hidden = hidden_desc.load([first_row, h_block * BLOCK_H])
            weight = weight_desc.load([start, h_block * BLOCK_H])
            if UPCAST:
                hidden = hidden.to(tl.float32)
                weight = weight.to(tl.float32)
            product = tl.dot(hidden, weight.T, product, input_precision="ieee")
            h_block += 1
            if h_block == num_h_blocks:
                # In two halves, one after the other: a softcap's intermediate results for the whole tile would not fit
                # in registers beside it.
                halves = tl.split(tl.permute(tl.reshape(product, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))
                for half in tl.static_range(2):
                    row_max, row_sum, target_logit = add_tile(
                        row_max,
                        row_sum,
                        target_logit,
                        halves[half],
                        start + half * (BLOCK_V // 2),
                        targets,
                        bias_ptr,
                        V,
                        LOGIT_SCALE,
                        SOFTCAP,
                        HAS_BIAS,
                        BLOCK_V // 2,
                    )
                product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
                h_block = 0
                start += BLOCK_V
        store_partial(partial_ptr, row_max, row_sum, target_logit, n_tile, split, N, num_splits, BLOCK_N)


@triton.jit
def linear_logprob_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    partial_ptr,  # (3, P, N) fp32: maximum, sum of exp(logit - maximum), logit of the target
    N,
    V,
    H,
    num_splits,
    tiles_per_split,
    stride_hn,
    stride_hh,
    stride_wv,
    stride_wh,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose dot reads bf16 as integers; the products are exact either way
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    n_tile, split = work_item(tl.program_id(0), N, num_splits, BLOCK_N, GROUP_N)
    offs_n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    # Rows past the end read the last row instead; their results are not stored.
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    targets = tl.load(targets_ptr + rows).to(tl.int64)
    hidden_rows = hidden_ptr + rows[:, None] * stride_hn + offs_h[None, :].to(tl.int64) * stride_hh

    row_max = tl.full((BLOCK_N,), LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK_N,), tl.float32)
    target_logit = tl.zeros((BLOCK_N,), tl.float32)

    first_v_tile = split * tiles_per_split
    last_v_tile = tl.minimum(first_v_tile + tiles_per_split, tl.cdiv(V, BLOCK_V))
    for v_tile in range(first_v_tile, last_v_tile):
        start = v_tile * BLOCK_V
        columns = tl.minimum(start + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
        hidden_ptrs = hidden_rows
        weight_ptrs = weight_ptr + columns[None, :] * stride_wv + offs_h[:, None].to(tl.int64) * stride_wh
        product = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for h in range(0, H, BLOCK_H):
            if EVEN_H:
                hidden = tl.load(hidden_ptrs)
                weight = tl.load(weight_ptrs)
            else:
                hidden = tl.load(hidden_ptrs, mask=offs_h[None, :] < H - h, other=0.0)
                weight = tl.load(weight_ptrs, mask=offs_h[:, None] < H - h, other=0.0)
            weight = weight.to(hidden.dtype)
            if UPCAST:
                hidden = hidden.to(tl.float32)
                weight = weight.to(tl.float32)
            product = tl.dot(hidden, weight, product, input_precision="ieee")
            hidden_ptrs += BLOCK_H * stride_hh
            weight_ptrs += BLOCK_H * stride_wh

        row_max, row_sum, target_logit = add_tile(
            row_max,
            row_sum,
            target_logit,
            product,
            start,
            targets,
            bias_ptr,
            V,
            LOGIT_SCALE,
            SOFTCAP,
            HAS_BIAS,
            BLOCK_V,
        )
    store_partial(partial_ptr, row_max, row_sum, target_logit, n_tile, split, N, num_splits, BLOCK_N)


@triton.jit
def combine_splits_kernel(
    partial_ptr,  # (3, P, N) fp32, as above
    targets_ptr,
    logps_ptr,
    stats_ptr,  # (2, N) fp32
    N,
    V,
    num_splits,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = offs_n < N
    plane = tl.cast(num_splits, tl.int64) * N
    row_max = tl.full((BLOCK_N,), LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK_N,), tl.float32)
    target_logit = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(0, num_splits):
        partial = partial_ptr + tl.cast(split, tl.int64) * N + offs_n
        split_max = tl.load(partial, mask=in_rows, other=LOWEST)
        split_sum = tl.load(partial + plane, mask=in_rows, other=1.0)
        target_logit += tl.load(partial + 2 * plane, mask=in_rows, other=0.0)
        new_max = tl.maximum(row_max, split_max)
        row_sum = row_sum * exp(row_max - new_max) + split_sum * exp(split_max - new_max)
        row_max = new_max
    log_sum = tl.log(row_sum)
    targets = tl.load(targets_ptr + offs_n, mask=in_rows, other=0)
    # (target - max) comes first: it is exact if the target is the likeliest token.
    logps = tl.where((targets >= 0) & (targets < V), (target_logit - row_max) - log_sum, float("nan"))
    tl.store(logps_ptr + offs_n, logps, mask=in_rows)
    tl.store(stats_ptr + offs_n, row_max, mask=in_rows)
    tl.store(stats_ptr + N + offs_n, log_sum, mask=in_rows)


@functools.lru_cache(maxsize=256)
def choose_splits(num_n_tiles: int, num_v_tiles: int, processors: int) -> tuple[int, int]:
    """(splits P, tiles of BLOCK_V columns in each), for the P that keeps ``processors`` busy for the fewest tiles.

    The busiest processor runs ceil(row tiles * P / processors) programs of ceil(column tiles / P) tiles. A tie goes to
    fewer splits. P depends on shapes and the device alone, so the bits are the same on every run.
    """
    most = max(1, min(num_v_tiles, MAX_ITEMS_PER_PROCESSOR * processors // num_n_tiles))

    def busy(splits: int) -> int:
        return triton.cdiv(num_n_tiles * splits, processors) * triton.cdiv(num_v_tiles, splits)

    splits = min(range(1, most + 1), key=busy)
    tiles = triton.cdiv(num_v_tiles, splits)
    return triton.cdiv(num_v_tiles, tiles), tiles


def tile_kind(hidden: torch.Tensor, weight: torch.Tensor, softcap: float) -> str:
    """The kind in the keys of TILES that serves these operands.

    ``fp32``: fp32 hidden states. ``16-bit``: both operands are 16-bit. ``16-bit capped``: there is a softcap too, whose
    tanh needs registers. ``mixed``: 16-bit hidden states and an fp32 weight, rounded tile by tile. ``odd``: the rows
    cannot be read 16 bytes at a time. Elements then pass through registers one by one, so only a small tile fits.
    """
    aligned = all(t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in (hidden, weight))
    if hidden.element_size() == 4:
        return "fp32" if aligned else "fp32 odd"
    if not aligned:
        return "16-bit odd"
    if weight.element_size() == 4:
        return "mixed"
    return "16-bit capped" if softcap > 0 else "16-bit"


def tile_entry(hidden: torch.Tensor, weight: torch.Tensor, softcap: float) -> tuple[dict[Any, Tile], Any]:
    """(table, its key) for these operands: DESCRIPTOR_TILES if the device has descriptors and the rows suit them."""
    device = architecture(hidden.device)
    alike = hidden.dtype == weight.dtype != torch.float32
    if device in DESCRIPTOR_TILES and alike and suits_descriptor(hidden) and suits_descriptor(weight):
        return DESCRIPTOR_TILES, device
    return TILES, (device, tile_kind(hidden, weight, softcap))


def suits_descriptor(tensor: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can read these rows: aligned, strides of 16-byte multiples, no overlap."""
    row_bytes = tensor.stride(0) * tensor.element_size()
    return (
        tensor.stride(1) == 1
        and row_bytes % 16 == 0
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(0) >= tensor.shape[1] > 0
    )


def linear_logprob_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each row's target, (N,), and statistics of the row, (2, N), fp32, in nats. Not differentiable.

    fp32 operands are multiplied in IEEE fp32, never TF32; 16-bit operands accumulate in fp32. A target outside [0, V)
    reads nothing and gives NaN in ``logps``. The host does not wait for the device.

    Args:
        hidden: (N, H) fp32, bf16 or fp16, any strides.
        weight: (V, H), any strides; converted tile by tile to the dtype of ``hidden`` if it differs.
        targets: (N,) int64 or int32.
        bias: (V,) of any floating dtype, added in fp32.

    Raises:
        TypeError: any other dtype.
        ValueError: shapes that do not fit, tensors on several devices, a softcap that is not positive.
    """
    _check(hidden, weight, targets, bias)
    softcap_value = check_softcap(softcap)
    (N, H), V = hidden.shape, weight.shape[0]
    logps = torch.empty(N, dtype=torch.float32, device=hidden.device)
    stats = torch.empty(2, N, dtype=torch.float32, device=hidden.device)
    if N == 0:
        return logps, stats
    targets = targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    table, key = tile_entry(hidden, weight, softcap_value)
    by_descriptor, tile = table is DESCRIPTOR_TILES, table[key]
    num_n_tiles = triton.cdiv(N, tile.block_n)
    processors = num_processors(hidden.device)
    num_splits, tiles_per_split = choose_splits(num_n_tiles, triton.cdiv(V, tile.block_v), processors)
    partial = torch.empty(3, num_splits, N, dtype=torch.float32, device=hidden.device)
    settings = {
        "LOGIT_SCALE": float(logit_scale),
        "SOFTCAP": softcap_value,
        "HAS_BIAS": bias is not None,
        "UPCAST": interpreted(),
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_H": tile.block_h,
        "GROUP_N": tile.group_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    sizes = (N, V, H, num_splits, tiles_per_split)
    items = num_n_tiles * num_splits
    if by_descriptor:
        hidden_desc = TensorDescriptor.from_tensor(hidden, [tile.block_n, tile.block_h])
        weight_desc = TensorDescriptor.from_tensor(weight, [tile.block_v, tile.block_h])
        linear_logprob_tma_kernel[(min(items, processors),)](
            hidden_desc, weight_desc, bias, targets, partial, *sizes, **settings
        )
    else:
        strides = (*hidden.stride(), *weight.stride())
        even = H % tile.block_h == 0
        linear_logprob_kernel[(items,)](
            hidden, weight, bias, targets, partial, *sizes, *strides, EVEN_H=even, **settings
        )
    combine_splits_kernel[(triton.cdiv(N, BLOCK_COMBINE),)](
        partial, targets, logps, stats, N, V, num_splits, BLOCK_N=BLOCK_COMBINE, num_warps=4
    )
    return logps, stats


def _check(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} must be float32, bfloat16 or float16 for the Triton kernel, not {tensor.dtype}")
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, not shape {tuple(tensor.shape)}")
    if hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, H) and (V, H), V > 0"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, not {targets.dtype}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be ({hidden.shape[0]},), not {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")
    check_device(hidden, weight, targets, bias)

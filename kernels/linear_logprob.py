"""Log-probability of one target per row from hidden states and the head's weight; no logits in memory.

Shapes: N response tokens, V vocabulary, H hidden, P splits of the vocabulary.

    hidden (N, H), weight (V, H), bias (V,), targets (N,)  ->  logps (N,) fp32, lse (N,) fp32
    logps[n] = logit[n, targets[n]] - lse[n],   lse[n] = log sum_v exp(logit[n, v])

One program owns BLOCK_N rows and one of P contiguous ranges of the vocabulary. It walks its range in tiles of BLOCK_V
columns, keeps the running maximum, the sum of exponentials and the target's logit of its rows in registers, and writes
those three numbers. A second kernel combines the P partial results in the order of the splits, so the bits do not
depend on which program finished first. Temporary memory: 3 * P * N floats.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import LOWEST, architecture, check_device, check_softcap, interpreted, num_processors, to_logits


class Tile(NamedTuple):
    """A tile configuration; ``group_n`` row tiles walk the same range of the vocabulary side by side."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    group_n: int = 12


# One configuration per architecture and kind of operands (see tile_kind). No spills: tests/test_codegen.py.
TILES: dict[tuple[str, str], Tile] = {
    ("sm_80", "16-bit"): Tile(128, 128, 64, 8, 3),
    ("sm_80", "16-bit capped"): Tile(128, 128, 64, 8, 3),
    ("sm_80", "16-bit odd"): Tile(64, 64, 32, 8, 3),
    ("sm_80", "mixed"): Tile(64, 128, 32, 8, 3),
    ("sm_80", "fp32"): Tile(64, 64, 32, 8, 3),
    ("sm_86", "16-bit"): Tile(128, 128, 32, 8, 3),
    ("sm_86", "16-bit capped"): Tile(128, 128, 32, 8, 3),
    ("sm_86", "16-bit odd"): Tile(64, 64, 32, 8, 3),
    ("sm_86", "mixed"): Tile(64, 128, 32, 8, 3),
    ("sm_86", "fp32"): Tile(64, 64, 32, 8, 3),
    ("sm_90", "16-bit"): Tile(128, 256, 64, 8, 3),
    ("sm_90", "16-bit capped"): Tile(128, 128, 64, 8, 3),
    ("sm_90", "16-bit odd"): Tile(128, 64, 32, 8, 3),
    ("sm_90", "mixed"): Tile(128, 128, 64, 8, 3),
    ("sm_90", "fp32"): Tile(64, 64, 32, 8, 3),
    ("sm_100", "16-bit"): Tile(128, 128, 64, 8, 3),
    ("sm_100", "16-bit capped"): Tile(128, 128, 64, 8, 3),
    ("sm_100", "16-bit odd"): Tile(128, 64, 32, 8, 3),
    ("sm_100", "mixed"): Tile(128, 128, 32, 8, 3),
    ("sm_100", "fp32"): Tile(64, 64, 32, 8, 3),
    ("gfx942", "16-bit"): Tile(128, 128, 64, 8, 2),
    ("gfx942", "16-bit capped"): Tile(128, 128, 64, 8, 2),
    ("gfx942", "16-bit odd"): Tile(64, 64, 32, 8, 1),
    ("gfx942", "mixed"): Tile(64, 64, 32, 8, 2),
    ("gfx942", "fp32"): Tile(64, 64, 32, 8, 2),
}
TILES |= {
    ("interpreter", kind): Tile(16, 32, 32, 4, 1, 2)
    for kind in ("16-bit", "16-bit capped", "16-bit odd", "mixed", "fp32")
}
MAX_SPLITS = 64
BLOCK_COMBINE = 128


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
    stride_b,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose dot takes bf16 for integers; the products are exact either way
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    # GROUP_N row tiles times all splits run side by side: a weight tile is read from L2 by the row tiles of its group,
    # and the group's hidden states stay in L2 for the whole walk.
    pid = tl.program_id(0)
    num_n_tiles = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_N * num_splits)
    first_tile = group * GROUP_N
    group_size = tl.minimum(num_n_tiles - first_tile, GROUP_N)
    rest = pid - group * (GROUP_N * num_splits)
    n_tile = first_tile + rest % group_size
    split = rest // group_size

    offs_n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    # Rows past the end read the last row instead; their results are not stored.
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    targets = tl.load(targets_ptr + rows)
    hidden_rows = hidden_ptr + rows[:, None] * stride_hn + offs_h[None, :].to(tl.int64) * stride_hh

    row_max = tl.full((BLOCK_N,), LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK_N,), tl.float32)
    target_logit = tl.zeros((BLOCK_N,), tl.float32)

    first_v_tile = split * tiles_per_split
    last_v_tile = tl.minimum(first_v_tile + tiles_per_split, tl.cdiv(V, BLOCK_V))
    for v_tile in range(first_v_tile, last_v_tile):
        offs_v = v_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        columns = tl.minimum(offs_v, V - 1).to(tl.int64)
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

        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + columns * stride_b).to(tl.float32)[None, :]
        logits = to_logits(product, bias, LOGIT_SCALE, SOFTCAP, HAS_BIAS)
        # Columns past the vocabulary are -inf before they can take part in a maximum.
        logits = tl.where(offs_v[None, :] < V, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        row_sum = row_sum * tl.exp(row_max - new_max) + tl.sum(tl.exp(logits - new_max[:, None]), axis=1)
        row_max = new_max
        is_target = offs_v[None, :] == targets[:, None]
        target_logit += tl.sum(tl.where(is_target, logits, 0.0), axis=1)

    partial = partial_ptr + tl.cast(split, tl.int64) * N + offs_n
    in_rows = offs_n < N
    plane = tl.cast(num_splits, tl.int64) * N
    tl.store(partial, row_max, mask=in_rows)
    tl.store(partial + plane, row_sum, mask=in_rows)
    tl.store(partial + 2 * plane, target_logit, mask=in_rows)


@triton.jit
def combine_splits_kernel(
    partial_ptr,  # (3, P, N) fp32, as above
    targets_ptr,
    logps_ptr,
    lse_ptr,
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
        row_sum = row_sum * tl.exp(row_max - new_max) + split_sum * tl.exp(split_max - new_max)
        row_max = new_max
    log_sum = tl.log(row_sum)
    targets = tl.load(targets_ptr + offs_n, mask=in_rows, other=0)
    # (target - max) first: it is exact where the target is the likeliest token.
    logps = tl.where((targets >= 0) & (targets < V), (target_logit - row_max) - log_sum, float("nan"))
    tl.store(logps_ptr + offs_n, logps, mask=in_rows)
    tl.store(lse_ptr + offs_n, row_max + log_sum, mask=in_rows)


@functools.lru_cache(maxsize=256)
def choose_splits(num_n_tiles: int, num_v_tiles: int, processors: int) -> tuple[int, int]:
    """(splits P, tiles of BLOCK_V columns in each): the P that keeps ``processors`` busy for the fewest tiles.

    The longest-lived processor runs ceil(row tiles * P / processors) programs of ceil(column tiles / P) tiles. A tie
    goes to fewer splits. A function of shapes and the device alone, so the bits are the same on every run.
    """

    def busy(splits: int) -> int:
        return triton.cdiv(num_n_tiles * splits, processors) * triton.cdiv(num_v_tiles, splits)

    splits = min(range(1, min(MAX_SPLITS, num_v_tiles) + 1), key=busy)
    tiles = triton.cdiv(num_v_tiles, splits)
    return triton.cdiv(num_v_tiles, tiles), tiles


def tile_kind(hidden: torch.Tensor, weight: torch.Tensor, softcap: float) -> str:
    """Which column of TILES serves these operands.

    ``fp32``: fp32 hidden states. ``16-bit``: both operands; ``16-bit capped``: with a softcap, whose tanh needs
    registers. ``mixed``: 16-bit hidden states and an fp32 weight, rounded tile by tile. ``16-bit odd``: 16-bit hidden
    states where rows cannot be read 16 bytes at a time: elements pass through registers one by one, which leaves room
    for a small tile only.
    """
    if hidden.element_size() == 4:
        return "fp32"
    if not all(t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in (hidden, weight)):
        return "16-bit odd"
    if weight.element_size() == 4:
        return "mixed"
    return "16-bit capped" if softcap > 0 else "16-bit"


def linear_logprob_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each row's target and the row's log-sum-exp, both (N,) fp32, in nats. Not differentiable.

    fp32 operands are multiplied in IEEE fp32, never TF32; 16-bit ones with fp32 accumulation. A target outside [0, V)
    reads nothing and gives NaN in ``logps``. Nothing waits for the device.

    Args:
        hidden: (N, H) fp32, bf16 or fp16, any strides.
        weight: (V, H), any strides; taken tile by tile in the dtype of ``hidden`` if it has another one.
        targets: (N,) int64 or int32.
        bias: (V,) of any floating dtype, added in fp32.

    Raises:
        TypeError: a dtype other than those.
        ValueError: shapes that do not fit, tensors on several devices, a softcap that is not positive.
    """
    _check(hidden, weight, targets, bias)
    softcap_value = check_softcap(softcap)
    (N, H), V = hidden.shape, weight.shape[0]
    logps = torch.empty(N, dtype=torch.float32, device=hidden.device)
    lse = torch.empty_like(logps)
    if N == 0:
        return logps, lse
    targets = targets.contiguous()
    tile = TILES[architecture(hidden.device), tile_kind(hidden, weight, softcap_value)]
    num_n_tiles = triton.cdiv(N, tile.block_n)
    num_splits, tiles_per_split = choose_splits(
        num_n_tiles, triton.cdiv(V, tile.block_v), num_processors(hidden.device)
    )
    partial = torch.empty(3, num_splits, N, dtype=torch.float32, device=hidden.device)
    linear_logprob_kernel[(num_n_tiles * num_splits,)](
        hidden,
        weight,
        bias,
        targets,
        partial,
        N,
        V,
        H,
        num_splits,
        tiles_per_split,
        *hidden.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        LOGIT_SCALE=float(logit_scale),
        SOFTCAP=softcap_value,
        HAS_BIAS=bias is not None,
        EVEN_H=H % tile.block_h == 0,
        UPCAST=interpreted(),
        BLOCK_N=tile.block_n,
        BLOCK_V=tile.block_v,
        BLOCK_H=tile.block_h,
        GROUP_N=tile.group_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    combine_splits_kernel[(triton.cdiv(N, BLOCK_COMBINE),)](
        partial, targets, logps, lse, N, V, num_splits, BLOCK_N=BLOCK_COMBINE, num_warps=4
    )
    return logps, lse


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

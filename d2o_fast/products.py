"""The three matrix products of a chunk, with fp32 results whatever the operands (fp64 for fp64).

Shapes: n tokens of the chunk, V vocabulary, H hidden. *Operand dtype*: that of ``hidden``; *wide*: fp32, or fp64 for
fp64.

    logits  (n, V) = hidden (n, H) @ weight (V, H).T
    dhidden (n, H) = E (n, V) @ weight (V, H)
    dweight (V, H) += E (n, V).T @ hidden (n, H)

On a GPU the vendor's GEMM takes 16-bit operands to fp32 results. A CPU's has no such form: there the 16-bit operand is
widened block by block, and for bf16 oneDNN is asked to multiply fp32 tensors as bf16 with fp32 accumulation, which is
exact for numbers that were bf16 to begin with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

BLOCK_BYTES = 8 << 20  # of widened weight that a CPU holds at a time


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.promote_types(dtype, torch.float32)


@contextlib.contextmanager
def exact_products(device: torch.device, operand: torch.dtype) -> Iterator[None]:
    """fp32 products are IEEE fp32 whatever the user allowed elsewhere; on a CPU, bf16 ones are multiplied as bf16.

    Sets torch's global fp32 matmul precision for the device and puts it back, also after an error. Autocast is off
    inside: it would choose other operands.
    """
    vendor: Any = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    backend = vendor.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "bf16" if device.type == "cpu" and operand == torch.bfloat16 else "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        backend.fp32_precision = before


def operand_weight(weight: torch.Tensor, operand: torch.dtype) -> torch.Tensor:
    """The weight as the products take it: on a GPU a copy in the operand dtype unless it has it already.

    On a CPU the weight itself: blocks of it are converted as they are needed.
    """
    return weight if weight.device.type == "cpu" else weight.to(operand)


def logits_(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` (n, V), wide, becomes the raw products."""
    if _direct(hidden, weight):
        return torch.mm(hidden, weight.T, out=out)
    if hidden.device.type != "cpu":
        return torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    hidden = hidden.to(out.dtype)
    for start, block in _wide_blocks(weight, hidden.dtype):
        torch.mm(hidden, block.T, out=out[:, start : start + block.shape[0]])
    return out


def dhidden_(grad: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` (n, H), wide, becomes ``grad @ weight``; ``grad`` (n, V) is wide or of the operand dtype."""
    if _direct(grad, weight) and grad.dtype == out.dtype:
        return torch.mm(grad, weight, out=out)
    if grad.device.type != "cpu":
        return torch.mm(grad, weight, out_dtype=out.dtype, out=out)
    for start, block in _wide_blocks(weight, out.dtype):
        part = grad[:, start : start + block.shape[0]].to(out.dtype)
        if start == 0:
            torch.mm(part, block, out=out)
        else:
            out.addmm_(part, block)
    return out


def add_dweight_(grad: torch.Tensor, hidden: torch.Tensor, out: torch.Tensor, *, fresh: bool) -> None:
    """``out`` (V, H), wide, gains ``grad.T @ hidden``; ``fresh``: its memory holds nothing yet and is written over."""
    if grad.device.type != "cpu" and grad.dtype != out.dtype:
        if fresh:
            torch.mm(grad.T, hidden, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, grad.T, hidden, out_dtype=out.dtype, out=out)
        return
    grad, hidden = grad.to(out.dtype), hidden.to(out.dtype)
    if fresh:
        torch.mm(grad.T, hidden, out=out)
    else:
        out.addmm_(grad.T, hidden)


def _direct(left: torch.Tensor, weight: torch.Tensor) -> bool:
    return left.dtype == weight.dtype and left.dtype in (torch.float32, torch.float64)


def _wide_blocks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    V, H = weight.shape
    if weight.dtype == dtype:
        yield 0, weight
        return
    step = max(1, BLOCK_BYTES // (H * dtype.itemsize))
    for start in range(0, V, step):
        yield start, weight[start : start + step].to(dtype)

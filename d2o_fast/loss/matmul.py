"""Matrix products that sum in fp32 (fp64 for fp64), for operands of any floating dtype.

*Operand dtype*: that of ``hidden``; *wide*: fp32, or fp64 for fp64.

A GPU multiplies 16-bit operands to fp32 results. torch has no such product on a CPU, so 16-bit operands are widened
there, the weight block by block. oneDNN may round widened bf16 operands to bf16 again if it multiplies bf16 faster.
That is exact, since the numbers were bf16 before, and the sums are fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.promote_types(dtype, torch.float32)


@contextlib.contextmanager
def exact_products(device: torch.device, operand: torch.dtype) -> Iterator[None]:
    """Makes fp32 products IEEE fp32 inside the block. On a CPU widened bf16 may be multiplied as bf16.

    Sets torch's global fp32 matmul precision for the device and restores it, also after an error. Turns autocast off,
    which would change the operands' dtype.
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


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively. A CPU that does not emulates it, far slower than fp32."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, add: bool = False) -> torch.Tensor:
    """``out = left @ right``, or ``out += left @ right`` if ``add``; returns ``out``.

    Sums are fp32 (fp64 for fp64) and rounded once to ``out``'s dtype.

    Args:
        out: (m, n), wide or in the operands' dtype; wide if ``add`` or if the operands have two dtypes.
        left, right: (m, k) and (k, n) in the operand dtype, or wide if widened for a CPU.
    """
    if not left.dtype == right.dtype == out.dtype:
        if out.device.type != "cpu" and left.dtype == right.dtype:
            if add:
                return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
            return torch.mm(left, right, out_dtype=out.dtype, out=out)
        left, right = left.to(out.dtype), right.to(out.dtype)
    return out.addmm_(left, right) if add else torch.mm(left, right, out=out)

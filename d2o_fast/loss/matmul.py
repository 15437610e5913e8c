"""Matrix products with fp32 results for any operands (fp64 for fp64), in no lower precision than asked for.

*Operand dtype*: that of ``hidden``; *wide*: fp32, or fp64 for fp64.

A GPU multiplies 16-bit operands to fp32 results. On a CPU torch has no such product. There 16-bit operands are
widened, the weight block by block, and where they are bf16, oneDNN may round them to bf16 again if it multiplies that
faster: exact, since the numbers were bf16 to begin with, and summed in fp32.
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
    """fp32 products are IEEE fp32 whatever the user allowed elsewhere; on a CPU, widened bf16 may be multiplied as
    bf16.

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


def multiplies_bf16(device: torch.device) -> bool:
    """Whether this device has bf16 products of its own. A CPU without them emulates them, far slower than fp32."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, add: bool = False) -> torch.Tensor:
    """``out = left @ right``, or ``out += left @ right``; sums in fp32 (fp64), rounded once to ``out``'s dtype.

    Args:
        out: (m, n) wide or of the operands' dtype; wide if ``add``, and for operands of two dtypes.
        left, right: (m, k) and (k, n) in the operand dtype, or wide where a CPU has widened them.
    """
    if not left.dtype == right.dtype == out.dtype:
        if out.device.type != "cpu" and left.dtype == right.dtype:
            if add:
                return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
            return torch.mm(left, right, out_dtype=out.dtype, out=out)
        left, right = left.to(out.dtype), right.to(out.dtype)
    return out.addmm_(left, right) if add else torch.mm(left, right, out=out)

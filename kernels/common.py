"""Shared parts of the kernels: logits from raw products, checks, and the tile-table row of a device.

Shapes: N response tokens, V vocabulary, H hidden.

``to_logits`` computes logits from hidden @ weight.T with the formula of ``naive_linear_logprob`` in
``d2o_fast/loss/reference.py``.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

# Finite, and no larger than any finite logit: a running maximum that starts here and meets -inf gives no NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def exp(x):
    """e^x in fp32, through the hardware's base 2. Subnormal results become zero.

    Triton's own ``exp`` keeps them, which costs three more instructions for each element on NVIDIA's chips.
    """
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(x):
    """tanh in fp32, to about 2e-7 relative, also near zero, where 1 - exp(-2|x|) cancels.

    The polynomial is a least-squares fit of (tanh(x) - x) / x^3 in x^2 on [-0.56, 0.56], weighted for relative error.
    """
    z = x * x
    p = -0.00618846 * z + 0.02101242
    p = p * z - 0.05383827
    p = p * z + 0.13332455
    p = p * z - 0.33333314
    near = x + x * z * p
    decayed = exp(-2.0 * tl.abs(x))
    tail = (1.0 - decayed) / (1.0 + decayed)
    return tl.where(tl.abs(x) < 0.55, near, tl.where(x < 0.0, -tail, tail))


@triton.jit
def to_logits(product, bias, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The model's logits from raw products, elementwise; ``bias`` is read only if HAS_BIAS."""
    x = product
    if HAS_BIAS:
        x = x + bias
    if LOGIT_SCALE != 1.0:
        x = x * LOGIT_SCALE
    if SOFTCAP > 0.0:
        x = SOFTCAP * tanh(x * (1.0 / SOFTCAP))
    return x


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python on the CPU (``TRITON_INTERPRET=1``)."""
    return bool(triton.knobs.runtime.interpret)


def check_device(*tensors: torch.Tensor | None) -> None:
    """Checks that all tensors are on one device and Triton can run on it.

    Raises:
        ValueError: tensors on different devices, or on a CPU without the interpreter.
    """
    devices = {t.device for t in tensors if t is not None}
    if len(devices) != 1:
        raise ValueError(f"all tensors must be on one device, found {sorted(map(str, devices))}")
    (device,) = devices
    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"the Triton kernels need a GPU, or TRITON_INTERPRET=1 for tests; these tensors are on {device}"
        )


def check_softcap(softcap: float | None) -> float:
    """The kernels' SOFTCAP: ``softcap``, or 0.0 for None.

    Raises:
        ValueError: a softcap that is not positive.
    """
    if softcap is None:
        return 0.0
    if not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    return float(softcap)


@functools.cache
def architecture(device: torch.device) -> str:
    """The tile-table row for ``device``.

    ``interpreter``, ``sm_80``, ``sm_86``, ``sm_90``, ``sm_100`` or ``gfx942``. ``sm_86`` serves every NVIDIA chip
    whose blocks have less than 163 KiB of shared memory: sm_86, sm_89, sm_120.
    """
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] == 9:
        return "sm_90"
    if capability[0] in (10, 11):
        return "sm_100"
    return "sm_80" if capability in ((8, 0), (8, 7)) else "sm_86"


@functools.cache
def num_processors(device: torch.device) -> int:
    """The number of the device's multiprocessors; 4 under the interpreter, so that it splits the vocabulary too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4

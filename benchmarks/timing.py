"""The timing loop of every benchmark: rounds in which each candidate runs once, in a new order each time.

Time in seconds, memory in bytes; a report has median and quartiles in milliseconds.
"""

from __future__ import annotations

import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

MIN_ROUNDS = 3
Name = TypeVar("Name")


def interleaved(
    calls: Mapping[Name, Callable[[], float | None]], rounds: int, until: float = math.inf, seed: int = 0
) -> dict[Name, list[float]]:
    """The seconds that each call returned, round by round. A call that returned None is not called again.

    After ``MIN_ROUNDS`` rounds, no new round begins once ``until`` (of ``time.monotonic``) has passed.
    """
    order, shuffle = list(calls), random.Random(seed)
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.monotonic() > until:
            break
        shuffle.shuffle(order)
        for name in list(order):
            taken = calls[name]()
            if taken is None:
                order.remove(name)
            else:
                seconds[name].append(taken)
    return seconds


def quartiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles in milliseconds, and the number of rounds; empty if nothing was timed."""
    if not seconds:
        return {}
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    return {"ms": median * 1e3, "ms_q1": q1 * 1e3, "ms_q3": q3 * 1e3, "rounds": len(seconds)}


def timed(function: Callable[[], object], device: torch.device, flush: torch.Tensor | None = None) -> float:
    """Seconds of one call: by events on an idle CUDA device, by the clock elsewhere.

    ``flush``: so large that writing it empties the L2 and lasts until the host has queued the call.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        if flush is not None:
            flush.zero_()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def memory_growth(function: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes held during ``function`` beyond those held before it; None if Linux does not tell.

    CUDA: torch's allocator, exact. CPU: the growth of the process's peak resident set (VmHWM), which counts every
    library's memory to about 1 MiB. VmHWM is reset before the call, after the heap has returned its free pages.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def device_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Rate of a large square product (TFLOP/s) and of a large copy (GB/s, bytes read plus written)."""
    n, size = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 26)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out, source = torch.empty_like(a), torch.ones(size, device=device)
    target = torch.empty_like(source)
    product = [timed(lambda: torch.mm(a, b, out=out), device) for _ in range(8)][2:]
    copy = [timed(lambda: target.copy_(source), device) for _ in range(8)][2:]
    return {
        "matmul_tflops": 2.0 * n**3 / statistics.median(product) / 1e12,
        "copy_gb_per_s": 2.0 * source.nbytes / statistics.median(copy) / 1e9,
    }

"""Measure one case: errors against fp64 first, then memory, then time with the providers interleaved.

Shapes: N response tokens, V vocabulary, H hidden. Memory in bytes, time in seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.providers import Functions, Missing, Provider
from benchmarks.shapes import (
    DTYPES,
    MODES,
    Case,
    Problem,
    Results,
    exact_results,
    make_problem,
    relative_error,
    response_lengths,
)

#: The shared error bound, relative: a provider past it is reported, but not ranked. Gradients and log-probabilities by
#: their root mean square. Eager's bf16 logits (8 bits for numbers near 12) lie inside; TF32 products as fp32 do not.
BOUNDS = {
    "fp32": {"loss": 1e-5, "rest": 5e-5},
    "bf16": {"loss": 3e-2, "rest": 5e-2},
    "fp16": {"loss": 4e-3, "rest": 1e-2},
}
MIN_ROUNDS = 3
SLOW = 10.0  # times the floor: one round of so slow a provider says enough, and more would take the others' time
Emit = Callable[[dict[str, Any]], None]


class DeviceLost(RuntimeError):
    """A provider left the CUDA context unusable: only a new process can go on."""


def run_case(case: Case, providers: list[Provider], emit: Emit, seconds: float = 60.0) -> list[dict[str, Any]]:
    """Rows of all providers, in order. ``emit`` hears which provider is at work and what came of it, at once.

    Each row holds the case, ``status`` ("ok", "missing", "failed", "out of bound") with its ``reason``, and what was
    measured. ``seconds`` limits the timing; at least ``MIN_ROUNDS`` rounds run.
    """
    deadline = time.monotonic() + seconds
    torch.manual_seed(case.seed)
    problem = make_problem(case)
    ready: dict[str, Functions] = {}
    rows: dict[str, dict[str, Any]] = {}
    exact: dict[str, Results] = {}
    for provider in providers:
        emit({"event": "provider", "name": provider.name})
        row = rows[provider.name] = {"provider": provider.name, "status": "ok", "reason": ""}
        with _failures_into(row, case):
            functions = provider.make(problem)
            if case.mode == "score" and functions.logps is None:
                raise Missing("gives no log-probabilities")
            row["path"] = functions.path
            ready[provider.name] = functions
        if provider.name not in ready:
            continue
        if "errors" in case.measure and provider.objective not in exact:
            emit({"event": "provider", "name": None})  # a failure here would not be the provider's
            exact[provider.objective] = exact_results(problem, case.mode, provider.objective)
            emit({"event": "provider", "name": provider.name})
        with _failures_into(row, case):
            if "errors" in case.measure:
                row["errors"] = errors(step(functions, problem, case.mode), exact[provider.objective], problem)
                row.update(verdict(row["errors"], case.dtype))
            else:
                step(provider.make(problem.prompt(0)), problem.prompt(0), case.mode)
            if provider.objective != "d2o" and row["status"] == "ok":
                row["reason"] = "a plain sum, not D2O: not ranked"
        if row["status"] == "failed":
            del ready[provider.name]
    exact.clear()
    if "memory" in case.measure:
        gc.collect()
        gc.freeze()  # what is alive now: the collections before each provider's turn need not look at it again
        for name in list(ready):
            emit({"event": "provider", "name": name})
            with _failures_into(rows[name], case):
                rows[name].update(peak_memory(ready[name], problem, case.mode))
            if rows[name]["status"] == "failed":
                del ready[name]
        gc.unfreeze()
    if "time" in case.measure:
        _time_interleaved(ready, rows, problem, case, emit, deadline)
    facts = {
        "entropy_nats": problem.entropy,
        "target_logp": problem.target_logp,
        "accumulator_bytes": problem.weight.numel() * 4 if case.mode == "train" and case.dtype != "fp32" else 0,
    }
    return [finished(case, row, facts) for row in rows.values()]


def step(functions: Functions, problem: Problem, mode: str) -> Results:
    """One use of a provider: log-probabilities, or the loss and its gradients."""
    if mode == "score":
        assert functions.logps is not None
        with torch.no_grad():
            return Results(logps=functions.logps(problem.hidden, problem.weight))
    assert functions.loss is not None
    hidden = problem.hidden.detach().requires_grad_()
    weight = problem.weight.detach().requires_grad_(mode == "train")
    loss = functions.loss(hidden, weight)
    loss.backward()
    return Results(loss.detach(), hidden.grad, weight.grad)


def errors(found: Results, exact: Results, problem: Problem) -> dict[str, float]:
    """Of each result against fp64. Sequences' log-probabilities are sums, and their error is in nats."""
    measured: dict[str, float] = {}
    for name in ("loss", "dhidden", "dweight", "logps"):
        mine, true = getattr(found, name), getattr(exact, name)
        if (mine is None) != (true is None):
            raise RuntimeError(f"{name} was {'not ' if mine is None else ''}returned")
        if true is not None:
            largest, rms = relative_error(mine, true)
            measured[name] = rms
            if name != "loss":
                measured[f"{name}_largest"] = largest
    if found.logps is not None and exact.logps is not None:
        difference = (found.logps.double() - exact.logps).split(response_lengths(problem.layout))
        measured["sequence_nats"] = max(abs(part.sum().item()) for part in difference)
    return measured


def verdict(measured: dict[str, float], dtype: str) -> dict[str, str]:
    """Whether every error is within the shared bound; NaN is not."""
    bounds = BOUNDS[dtype]
    for name in ("loss", "dhidden", "dweight", "logps"):
        bound = bounds["loss" if name == "loss" else "rest"]
        if name in measured and not measured[name] <= bound:
            return {"status": "out of bound", "reason": f"error of {name} {measured[name]:.1e} > {bound:.0e}"}
    return {"status": "ok"}


def peak_memory(functions: Functions, problem: Problem, mode: str) -> dict[str, Any]:
    """Most bytes held during a step beyond what was there before and the gradients that it returns.

    CUDA: torch's allocator, exact. CPU: the growth of the process's peak resident set (Linux's VmHWM, set back before
    the step, with the heap's free pages given back first), which sees what every library takes, to about 1 MiB.
    """
    device = problem.hidden.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = step(functions, problem, mode)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError as error:
            return {"memory_bytes": None, "memory_reason": f"the peak cannot be set back here: {error}"}
        before = _resident("VmRSS")
        results = step(functions, problem, mode)
        peak = _resident("VmHWM")
    return {"memory_bytes": max(0, peak - before - results.gradient_bytes)}


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024


def _time_interleaved(
    ready: dict[str, Functions], rows: dict[str, dict[str, Any]], problem: Problem, case: Case, emit: Emit, until: float
) -> None:
    """Rounds in which every provider runs once, in a new order each time, after the device's own products.

    A provider that takes ``SLOW`` times their floor, and more than a second, runs in the first round alone.
    """
    device = problem.hidden.device
    for row in rows.values():
        row["seconds"] = []
    products = Products(problem)
    order, shuffle = list(ready), random.Random(case.seed)
    products.measure()
    for rounds in range(case.rounds):
        if rounds >= MIN_ROUNDS and time.monotonic() > until:
            break
        shuffle.shuffle(order)
        products.measure()
        for name in list(order):
            emit({"event": "provider", "name": name})
            with _failures_into(rows[name], case):
                rows[name]["seconds"].append(timed(partial(step, ready[name], problem, case.mode), device))
            taken = rows[name].get("seconds") or [0.0]
            if rows[name]["status"] == "failed" or taken[-1] > max(1.0, SLOW * products.floor(MODES[case.mode])):
                order.remove(name)
    floor = products.floor(MODES[case.mode])
    for row in rows.values():
        row["gemm_seconds"], row["floor_seconds"] = products.medians(), floor


class Products:
    """The three products of N x H x V by the vendor's library, in the operand dtype: the floor of this run."""

    def __init__(self, problem: Problem) -> None:
        self.hidden, self.weight = problem.hidden, problem.weight
        self.logits = self.hidden.new_empty(self.hidden.shape[0], self.weight.shape[0])
        self.dhidden, self.dweight = torch.empty_like(self.hidden), torch.empty_like(self.weight)
        self.times: tuple[list[float], ...] = ([], [], [])

    def measure(self) -> None:
        """The first call warms up."""
        device = self.hidden.device
        found = (
            timed(lambda: torch.mm(self.hidden, self.weight.T, out=self.logits), device),
            timed(lambda: torch.mm(self.logits, self.weight, out=self.dhidden), device),
            timed(lambda: torch.mm(self.logits.T, self.hidden, out=self.dweight), device),
        )
        if not hasattr(self, "warm"):
            self.warm = True
            return
        for times, seconds in zip(self.times, found, strict=True):
            times.append(seconds)

    def medians(self) -> list[float]:
        return [statistics.median(times) for times in self.times]

    def floor(self, units: int) -> float:
        return sum(self.medians()[:units])


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: by events on a CUDA device that has nothing else to do, by the clock elsewhere."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


@contextlib.contextmanager
def _failures_into(row: dict[str, Any], case: Case) -> Iterator[None]:
    """What a provider raises becomes its row's reason; the others go on."""
    try:
        yield
        if case.device == "cuda":
            torch.cuda.synchronize()
    except Missing as missing:
        row.update(status="missing", reason=str(missing))
    except Exception as error:  # whatever a peer may raise
        row.update(status="failed", reason=f"{type(error).__name__}: {str(error).strip()[:300]}")
        gc.collect()
        if case.device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as lost:
                raise DeviceLost(row["reason"]) from lost


def finished(case: Case, row: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The row as it is stored: the case's facts, and times as median and quartiles in milliseconds."""
    shape = {"N": case.N, "H": case.H, "V": case.V, "S": sum(map(len, case.lengths)), "G": len(case.lengths)}
    named = {"suite": case.suite, "head": case.head, "device": case.device, "dtype": case.dtype, "mode": case.mode}
    row = {**named, "inputs": case.inputs, "softcap": case.softcap, **shape, **facts, **row}
    seconds = row.pop("seconds", [])
    if seconds:
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        row["ms"], row["ms_q1"], row["ms_q3"], row["rounds"] = median * 1e3, q1 * 1e3, q3 * 1e3, len(seconds)
        row["over_floor"] = median / row["floor_seconds"]
    if "gemm_seconds" in row:
        row["gemm_tflops"] = [case.flops(1) / s / 1e12 if s > 0 else math.nan for s in row["gemm_seconds"]]
    return row


def device_rates(device: str, dtype: str) -> dict[str, Any]:
    """Rate of a large square product (TFLOP/s) and of a large copy (GB/s, bytes read plus written)."""
    n, where = (8192, torch.device(device)) if device == "cuda" else (1536, torch.device(device))
    a, b = (torch.randn(n, n, device=where).to(DTYPES[dtype]) for _ in range(2))
    out, source = torch.empty_like(a), torch.ones((1 << 30) if device == "cuda" else (1 << 26), device=where)
    target = torch.empty_like(source)
    product = [timed(lambda: torch.mm(a, b, out=out), where) for _ in range(8)][2:]
    copy = [timed(lambda: target.copy_(source), where) for _ in range(8)][2:]
    return {
        "dtype": dtype,
        "matmul_tflops": 2.0 * n**3 / statistics.median(product) / 1e12,
        "copy_gb_per_s": 2.0 * source.nbytes / statistics.median(copy) / 1e9,
    }

"""Measures one case: errors against fp64 first, then memory, then time with the providers interleaved.

Shapes: N response tokens, V vocabulary, H hidden. Memory in bytes, time in seconds.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.providers import Functions, Missing, Provider
from benchmarks.shapes import (
    MODES,
    Case,
    Problem,
    Results,
    exact_results,
    make_problem,
    relative_error,
    response_lengths,
)
from benchmarks.timing import interleaved, memory_growth, quartiles, timed

#: The shared relative error bound: a provider past it is reported, but not ranked. It bounds the root mean square of
#: gradients and log-probabilities. Eager's bf16 logits (8 bits for numbers near 12) pass; TF32 products as fp32 fail.
BOUNDS = {
    "fp32": {"loss": 1e-5, "rest": 5e-5},
    "bf16": {"loss": 3e-2, "rest": 5e-2},
    "fp16": {"loss": 4e-3, "rest": 1e-2},
}
SLOW = 10.0  # times the floor: one round of so slow a provider is enough, and more would cost the others' time
Emit = Callable[[dict[str, Any]], None]


class DeviceLost(RuntimeError):
    """A provider left the CUDA context unusable; only a new process can go on."""


def run_case(case: Case, providers: list[Provider], emit: Emit, seconds: float = 60.0) -> list[dict[str, Any]]:
    """Rows of all providers, in order. ``emit`` gets the provider at work, or None for our own work.

    Each row holds the case, ``status`` ("ok", "missing", "failed", "out of bound") with its ``reason``, and the
    measurements. ``seconds`` limits the timing.
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
            emit({"event": "provider", "name": None})  # a failure here is not the provider's
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
        gc.freeze()  # so that the collections before each provider's turn skip the objects alive now
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
    """The error of each result against fp64. Sequences' log-probabilities are sums; their error is in nats."""
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
    """The row's ``status``, "ok" if every error is within the shared bound (NaN is not), or its ``reason`` too."""
    bounds = BOUNDS[dtype]
    for name in ("loss", "dhidden", "dweight", "logps"):
        bound = bounds["loss" if name == "loss" else "rest"]
        if name in measured and not measured[name] <= bound:
            return {"status": "out of bound", "reason": f"error of {name} {measured[name]:.1e} > {bound:.0e}"}
    return {"status": "ok"}


def peak_memory(functions: Functions, problem: Problem, mode: str) -> dict[str, Any]:
    """Peak bytes of a step beyond the bytes held before it and the gradients that it returns."""
    returned: list[int] = []
    growth = memory_growth(
        lambda: returned.append(step(functions, problem, mode).gradient_bytes), problem.hidden.device
    )
    if growth is None:
        return {"memory_bytes": None, "memory_reason": "the peak cannot be set back here"}
    return {"memory_bytes": max(0, growth - returned[0])}


def _time_interleaved(
    ready: dict[str, Functions], rows: dict[str, dict[str, Any]], problem: Problem, case: Case, emit: Emit, until: float
) -> None:
    """Times every provider and the device's own products in turn; the products of the mode are the floor.

    A provider that takes ``SLOW`` times the floor, and more than a second, runs in the first round only.
    """
    device, units = problem.hidden.device, MODES[case.mode]
    products, slow = products_of(problem), set[str]()
    emit({"event": "provider", "name": None})
    for product in products:
        timed(product, device)  # warms up
    limit = max(1.0, SLOW * sum(timed(product, device) for product in products[:units]))

    def of_product(product: Callable[[], object]) -> float:
        emit({"event": "provider", "name": None})
        return timed(product, device)

    def of_provider(name: str) -> float | None:
        if name in slow:
            return None
        emit({"event": "provider", "name": name})
        taken = None
        with _failures_into(rows[name], case):
            taken = timed(partial(step, ready[name], problem, case.mode), device)
            slow.update([name] if taken > limit else [])
        return taken

    calls: dict[Any, Callable[[], float | None]] = {name: partial(of_provider, name) for name in ready}
    calls |= {i: partial(of_product, product) for i, product in enumerate(products)}
    seconds = interleaved(calls, case.rounds, until, case.seed)
    gemm = [statistics.median(seconds[i]) for i in range(len(products))]
    for name, row in rows.items():
        row.update(seconds=seconds.get(name, []), gemm_seconds=gemm, floor_seconds=sum(gemm[:units]))


def products_of(problem: Problem) -> list[Callable[[], object]]:
    """The three products of N x H x V by the vendor's library, in the operand dtype: the floor of this run."""
    hidden, weight = problem.hidden, problem.weight
    logits = hidden.new_zeros(hidden.shape[0], weight.shape[0])
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    return [
        lambda: torch.mm(hidden, weight.T, out=logits),
        lambda: torch.mm(logits, weight, out=dhidden),
        lambda: torch.mm(logits.T, hidden, out=dweight),
    ]


@contextlib.contextmanager
def _failures_into(row: dict[str, Any], case: Case) -> Iterator[None]:
    """An exception of a provider becomes its row's reason; the others go on."""
    try:
        yield
        if case.device == "cuda":
            torch.cuda.synchronize()
    except Missing as missing:
        row.update(status="missing", reason=str(missing))
    except Exception as error:  # a peer may raise anything
        row.update(status="failed", reason=f"{type(error).__name__}: {str(error).strip()[:300]}")
        gc.collect()
        if case.device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as lost:
                raise DeviceLost(row["reason"]) from lost


def finished(case: Case, row: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The stored row: the case's facts, and times as median and quartiles in milliseconds."""
    shape = {"N": case.N, "H": case.H, "V": case.V, "S": sum(map(len, case.lengths)), "G": len(case.lengths)}
    named = {"suite": case.suite, "head": case.head, "device": case.device, "dtype": case.dtype, "mode": case.mode}
    row = {**named, "inputs": case.inputs, "softcap": case.softcap, **shape, **facts, **row}
    row.update(quartiles(row.pop("seconds", [])))
    if "ms" in row:
        row["over_floor"] = row["ms"] / 1e3 / row["floor_seconds"]
    if "gemm_seconds" in row:
        row["gemm_tflops"] = [case.flops(1) / s / 1e12 if s > 0 else math.nan for s in row["gemm_seconds"]]
    return row

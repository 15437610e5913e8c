"""Runs cases in a separate process and keeps every row: a provider that crashes or hangs loses its own rows only.

python -m benchmarks.runner < plan.json      # the worker: one JSON object per line on stdout
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import torch

from benchmarks.measure import DeviceLost, finished, run_case
from benchmarks.providers import PROVIDERS
from benchmarks.report import ROOT, about_this_run
from benchmarks.shapes import DTYPES, Case
from benchmarks.timing import device_rates

COMMAND = [sys.executable, "-m", "benchmarks.runner"]
GRACE = 60.0  # seconds past its budget; a worker still running then counts as hanging


def run_cases(
    cases: Sequence[Case], seconds: float, keep: Callable[[dict[str, Any]], None], log: TextIO = sys.stderr
) -> list[dict[str, Any]]:
    """Rows of all cases. ``keep`` gets each row as soon as it is measured.

    ``seconds`` is divided among the cases; a case out of time is kept as "not run". If the worker dies or hangs, the
    provider at work is marked as failed and skipped from then on; the others go on in a new worker.
    """
    deadline, rows = time.monotonic() + seconds, list[dict[str, Any]]()
    crashed: dict[str, str] = {}
    index = 0

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        keep(row)

    while index < len(cases):
        provider = failure = None
        for event in worker_events(cases[index:], crashed, deadline, log):
            if event["event"] == "provider":
                provider = event["name"]
            elif event["event"] == "row":
                add(event["row"])
            elif event["event"] == "case done":
                index += 1
            else:
                failure = event["reason"]
        if failure is None:
            break
        print(f"worker: {failure} (provider {provider})", file=log)
        if provider is None or provider in crashed:  # no provider's fault: the case cannot run
            for name in cases[index].providers:
                add(finished(cases[index], {"provider": name, "status": "failed", "reason": failure}, {}))
            index += 1
        else:
            crashed[provider] = failure
    return rows


def worker_events(
    cases: Sequence[Case], crashed: dict[str, str], deadline: float, log: TextIO
) -> Iterator[dict[str, Any]]:
    """The events of one process that measures cases in turn; ends with {"event": "failure"} if it dies or hangs."""
    plan = {"cases": [case.to_json() for case in cases], "crashed": crashed, "seconds": deadline - time.monotonic()}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
    process = subprocess.Popen(COMMAND, cwd=ROOT, text=True, **pipes)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(plan))
        process.stdin.close()
        while (line := lines.get(timeout=max(0.1, deadline + GRACE - time.monotonic()))) is not None:
            if line.startswith('{"event"'):  # libraries print other lines
                yield json.loads(line)
        if process.wait() != 0:
            yield {"event": "failure", "reason": f"the process ended with code {process.returncode}"}
    except queue.Empty:
        yield {"event": "failure", "reason": "did not finish in time"}
    finally:
        process.kill()
        process.wait()


def work(plan: dict[str, Any], out: TextIO) -> None:
    """The worker's side: measures the plan's cases and prints events."""

    def emit(event: dict[str, Any]) -> None:
        print(json.dumps(event), file=out, flush=True)

    cases = [Case.from_json(fields) for fields in plan["cases"]]
    deadline = time.monotonic() + plan["seconds"]
    about: dict[str, Any] = {}
    rates: dict[str, dict[str, Any]] = {}
    for i, case in enumerate(cases):
        emit({"event": "provider", "name": None})
        about = about or about_this_run(case.device)
        if "time" in case.measure and case.dtype not in rates:
            rates[case.dtype] = device_rates(torch.device(case.device), DTYPES[case.dtype])
        left = deadline - time.monotonic()
        rows = [
            finished(case, {"provider": name, "status": "failed", "reason": plan["crashed"][name] + " (earlier)"}, {})
            for name in case.providers
            if name in plan["crashed"]
        ]
        providers = [PROVIDERS[name] for name in case.providers if name not in plan["crashed"]]
        if left <= 0:
            late = {"status": "not run", "reason": "the suite's time was out"}
            rows += [finished(case, {"provider": provider.name, **late}, {}) for provider in providers]
        else:
            rows += run_case(case, providers, emit, left / (len(cases) - i))
        for row in rows:
            emit({"event": "row", "row": {**row, **about, "rates": rates.get(case.dtype)}})
        emit({"event": "case done"})


if __name__ == "__main__":
    try:
        work(json.load(sys.stdin), sys.stdout)
    except DeviceLost as lost:
        print(f"the device is lost: {lost}", file=sys.stderr)
        sys.exit(70)

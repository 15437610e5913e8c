"""Run cases in a process of their own and keep every row: a provider that crashes or hangs loses its own rows only.

python -m benchmarks.runner < plan.json      # the worker: one JSON object per line on stdout
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.measure import DeviceLost, device_rates, finished, run_case
from benchmarks.providers import PROVIDERS
from benchmarks.shapes import Case

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
COMMAND = [sys.executable, "-m", "benchmarks.runner"]
GRACE = 60.0  # seconds past its budget after which a worker is taken to hang


def about_this_run(device: str) -> dict[str, Any]:
    """Commit, versions, device and date: what every row names."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()} ({torch.get_num_threads()} threads)"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": commit(), "versions": versions, "device_name": name, "date": now}


def commit() -> str:
    """The commit that is checked out, and whether code was changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "d2o_fast", "kernels", "benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git history here)"


def run_cases(
    cases: Sequence[Case], seconds: float, keep: Callable[[dict[str, Any]], None], log: TextIO = sys.stderr
) -> list[dict[str, Any]]:
    """Rows of all cases. ``keep`` gets each row as soon as it is measured.

    ``seconds`` is shared out over the cases; a case that the time does not reach is kept as "not run". When the worker
    dies or hangs, the provider at work then is named as failed and sits out the rest; the others go on in a new worker.
    """
    deadline, rows = time.monotonic() + seconds, list[dict[str, Any]]()
    crashed: dict[str, str] = {}
    index = 0

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        keep(row)

    while index < len(cases):
        worker = Worker(cases[index:], crashed, deadline - time.monotonic(), log)
        for event in worker.events(deadline + GRACE):
            if event["event"] == "row":
                add(event["row"])
            elif event["event"] == "case done":
                index += 1
        if worker.failure is None:
            break
        print(f"worker: {worker.failure} (provider {worker.provider})", file=log)
        if worker.provider is None or worker.provider in crashed:  # not a provider's doing: this case cannot be run
            for name in cases[index].providers:
                add(finished(cases[index], {"provider": name, "status": "failed", "reason": worker.failure}, {}))
            index += 1
        else:
            crashed[worker.provider] = worker.failure
    return rows


class Worker:
    """One process that measures cases in turn. ``failure``: how it ended if not well; ``provider``: who was at work."""

    def __init__(self, cases: Sequence[Case], crashed: dict[str, str], seconds: float, log: TextIO) -> None:
        self.failure: str | None = None
        self.provider: str | None = None
        plan = {"cases": [case.to_json() for case in cases], "crashed": crashed, "seconds": seconds}
        self.process = subprocess.Popen(
            COMMAND, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(plan))
        self.process.stdin.close()
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def events(self, until: float) -> Any:
        """Events up to the worker's end; it is killed when the time is out."""
        try:
            while (line := self.lines.get(timeout=max(0.1, until - time.monotonic()))) is not None:
                if not line.startswith('{"event"'):
                    continue  # something a library printed
                event = json.loads(line)
                if event["event"] == "provider":
                    self.provider = event["name"]
                yield event
            if self.process.wait() != 0:
                self.failure = f"the process ended with code {self.process.returncode}"
        except queue.Empty:
            self.failure = "did not finish in time"
        finally:
            self.process.kill()
            self.process.wait()


def work(plan: dict[str, Any], out: TextIO) -> None:
    """The worker's side: measure the plan's cases and print events."""

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
            rates[case.dtype] = device_rates(case.device, case.dtype)
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

"""One command for a CUDA machine: ``python -m benchmarks.gpu``, under 10 minutes.

The GPU-marked tests first, then the loss suite against every peer that is installed, each row written as soon as it is
measured, then the training step of a model of 1B parameters, and at the end JSON, a Markdown table and a roofline plot.
Every stage has its own time; one that fails or runs out of it does not keep the next from running, but the command then
ends with 1. ``--dry-run`` does all of it on a CPU with tiny shapes.

``--sanitize`` does something else instead, again under 10 minutes: the tests marked ``sanitize`` under
compute-sanitizer, once with memcheck and once with racecheck, our kernels alone. It ends with 1 unless both are clean.

The folder named by ``--out`` (or by the environment's OUT) gets at most eight files: tests.log, worker.log, rows.jsonl,
results.json, table.md, roofline.png, step.json and step.md; or memcheck.log, racecheck.log, results.json and table.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.report import append_row, markdown, roofline, summary
from benchmarks.runner import RESULTS, ROOT, about_this_run, run_cases
from benchmarks.suites import cases_of

TEST_SECONDS, LOSS_SECONDS, STEP_SECONDS = 150.0, 240.0, 120.0  # with a hanging worker, under 10 minutes
KERNEL = re.compile(r"^def (\w+_kernel)\(", re.MULTILINE)
SANITIZE_SECONDS = 280.0  # for each tool
SANITIZED = ("tests/test_kernels.py", "tests/test_filtered_products.py")  # where the marked tests are
#: A tool's last word, and the number in it that must be zero.
SUMMARIES = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) errors?.*"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed.*"),
}


def run_tests(out: Path, seconds: float) -> tuple[bool, str]:
    """Run the tests marked ``gpu``: whether they passed, and pytest's last line, or how it ended."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rfEs"]
    command += ["--continue-on-collection-errors", "--durations=10", "tests"]
    path = out / "tests.log"
    with path.open("w") as log:
        code = run_within(command, seconds, log)
    if code is None:
        return False, f"stopped after {seconds:.0f} s (see tests.log)"
    last = (path.read_text().strip().splitlines() or ["no output"])[-1]
    return code == 0, f"{last.strip('= ')} (pytest code {code})"


def run_within(
    command: list[str], seconds: float, log: TextIO, environment: dict[str, str] | None = None
) -> int | None:
    """The command's exit code; None if it was stopped because its time was out."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, process_group=0
    )
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it started: a sanitizer's own child holds the device
        process.wait()
        return None


def sanitize(out: Path, sanitizer: str, seconds: float) -> dict[str, dict[str, Any]]:
    """What each tool of compute-sanitizer says of the tests marked ``sanitize``: whether all is clean, and its summary.

    Clean: the tool's summary counts nothing, the tests passed, and the tool saw the process to its end. Tensors get
    allocations of their own, or a read past one's end would find its neighbour's memory and be no error.
    """
    names = [name for path in ROOT.glob("kernels/*.py") for name in KERNEL.findall(path.read_text())]
    tests = [sys.executable, "-m", "pytest", "-m", "sanitize", "-p", "no:cacheprovider", "-rfEs", *SANITIZED]
    found = {}
    for tool, pattern in SUMMARIES.items():
        command = [sanitizer, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "86"]
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch asks and is refused, by design
        for name in names:
            command += ["--kernel-name", f"kernel_substring={name}"]
        path = out / f"{tool}.log"
        with path.open("w") as log:
            code = run_within([*command, *tests], seconds, log, {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        said = pattern.search(text := path.read_text())
        passed = re.search(r"\b\d+ passed.*", text)
        parts = [said[0] if said else "no summary", passed[0].strip("= ") if passed else "no test passed"]
        parts += [f"stopped after {seconds:.0f} s" if code is None else f"code {code}"]
        clean = code == 0 and said is not None and int(said[1]) == 0 and passed is not None
        found[tool] = {"clean": clean, "summary": "; ".join(parts) + ("" if clean else f" (see {path.name})")}
        print(f"{tool}: {found[tool]['summary']}", flush=True)
    return found


def sanitize_all(out: Path, sanitizer: str, device: str) -> int:
    """``sanitize`` into results.json and table.md; 0 if all is clean."""
    found = sanitize(out, sanitizer, SANITIZE_SECONDS)
    about = {**about_this_run(device), "sanitizer": found}
    (out / "results.json").write_text(json.dumps({"about": about, "rows": []}, indent=1))
    lines = ["# The kernels under compute-sanitizer", "", f"{about['date']}, commit {about['commit']}, "]
    lines[-1] += f"{about['device_name']}; the tests marked `sanitize`."
    lines += ["", "| tool | clean | summary |", "|---|---|---|"]
    lines += [f"| {tool} | {'yes' if one['clean'] else '**no**'} | {one['summary']} |" for tool, one in found.items()]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    return 0 if all(one["clean"] for one in found.values()) else 1


def run_step(out: Path, device: str, tiny: bool, seconds: float) -> tuple[bool, str]:
    """The training step in a process of its own, into step.json and step.md: whether it went well, and how it ended."""
    command = [sys.executable, "-m", "benchmarks.step", "--device", device, "--rounds", "3", "--out", str(out / "step")]
    with (out / "worker.log").open("a") as log:
        code = run_within([*command, "--tiny"] if tiny else command, seconds, log)
    if code is None:
        return False, f"stopped after {seconds:.0f} s (see worker.log)"
    return code == 0, "done" if code == 0 else f"ended with code {code} (see step.md and worker.log)"


def run_loss(out: Path, device: str, tiny: bool, seconds: float) -> list[dict[str, Any]]:
    cases = cases_of("errors", device, tiny=True) + cases_of("gpu", device, tiny)
    with (out / "worker.log").open("w") as log:
        return run_cases(cases, seconds, lambda row: append_row(out / "rows.jsonl", row), log)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description="Tests and benchmarks on a CUDA device.")
    default = os.environ.get("OUT") or RESULTS / f"gpu-{time.strftime('%Y-%m-%d-%H%M%S')}"
    parser.add_argument("--out", type=Path, default=Path(default), help="folder for the files")
    parser.add_argument("--dry-run", action="store_true", help="everything on a CPU with tiny shapes")
    parser.add_argument("--skip-tests", action="store_true", help="the loss suite alone")
    parser.add_argument("--sanitize", action="store_true", help="small tests under compute-sanitizer, nothing else")
    parser.add_argument("--seconds", type=float, default=LOSS_SECONDS, help="time for the loss suite")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run tries everything on a CPU with tiny shapes")
    device = "cpu" if args.dry_run else "cuda"
    sanitizer = shutil.which("compute-sanitizer")
    if args.sanitize and sanitizer is None:
        parser.error("compute-sanitizer is not on the PATH: it comes with the CUDA toolkit, in its bin folder")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.sanitize and sanitizer is not None:
        return sanitize_all(args.out, sanitizer, device)

    begin = time.monotonic()
    passed, tests = (True, "skipped on request") if args.skip_tests else run_tests(args.out, TEST_SECONDS)
    print(f"tests: {tests}", flush=True)
    tests_done = time.monotonic()
    rows = run_loss(args.out, device, args.dry_run, args.seconds)
    loss_done = time.monotonic()
    stepped, step = run_step(args.out, device, args.dry_run, STEP_SECONDS)
    stages = {"tests": tests_done - begin, "loss": loss_done - tests_done, "step": time.monotonic() - loss_done}

    plot = roofline(rows, args.out / "roofline.png")
    about = {
        **about_this_run(device),
        "tests": tests,
        "stage_seconds": stages,
        "step": step,
        "plot": plot or "roofline.png",
    }
    (args.out / "results.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    table = markdown(rows, "The fused D2O loss on a GPU" if device == "cuda" else "Dry run on a CPU: not a measurement")
    (args.out / "table.md").write_text(table + f"\nTests: {tests}. Training step: {step}. Plot: {about['plot']}.\n")
    print(table)
    print(f"tests: {tests}; step: {step}; plot: {about['plot']}; seconds: {stages}")
    print(summary(rows))
    return 0 if rows and passed and stepped else 1


if __name__ == "__main__":
    raise SystemExit(main())

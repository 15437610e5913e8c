"""One command for a CUDA machine: ``python -m benchmarks.gpu``, under 10 minutes.

It runs the tests marked ``gpu``, the loss suite beside every installed peer, the kernels of one head beside their
floors, and the training step of a model of 1B parameters. It then writes JSON, a Markdown table and a roofline plot.
Each row of the loss suite is written as soon as it is measured. Every stage has its own time limit, and the next stage
runs even if one fails. The command exits with 1 if a stage failed or ran out of time, if a test failed or none ran, or
if one of our providers failed or is out of its error bound. ``--dry-run`` does all of it on a CPU with tiny shapes.

``--sanitize`` instead runs the tests marked ``sanitize`` under compute-sanitizer, once with memcheck and once with
racecheck, in under 10 minutes. Only our kernels are checked. It exits with 1 unless both runs are clean.

The folder ``--out`` (or the environment's OUT) gets tests.log, worker.log, rows.jsonl, results.json, table.md and
roofline.png. With ``--sanitize`` it gets memcheck.log, racecheck.log, results.json and table.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks.loss_report import append_row, markdown, roofline, summary, wrong
from benchmarks.report import RESULTS, ROOT, about_this_run, heading, options, place, require_cuda, table
from benchmarks.runner import run_cases
from benchmarks.suites import cases_of

#: For each stage. They sum to under 10 minutes even if a worker of the loss suite hangs.
TEST_SECONDS, LOSS_SECONDS, KERNEL_SECONDS, STEP_SECONDS = 140.0, 190.0, 90.0, 110.0
KERNEL = re.compile(r"^def (\w+_kernel)\(", re.MULTILINE)
SANITIZE_SECONDS = 280.0  # for each tool
#: A tool's summary line, and the number in it that must be zero.
SUMMARIES = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) errors?.*"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed.*"),
}


def run_within(command: list[str], seconds: float, log: TextIO, **environment: str) -> int | None:
    """The command's exit code; None if it ran out of time and was stopped."""
    settings: dict[str, Any] = {"env": {**os.environ, **environment}, "process_group": 0}
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, **settings)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the whole group: a sanitizer's child holds the device
        process.wait()
        return None


def run_tests(out: Path, seconds: float, dry_run: bool) -> tuple[bool, str]:
    """Runs the tests marked ``gpu``; returns (passed, pytest's last line). In a dry run all may be skipped."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rfEs"]
    command += ["--continue-on-collection-errors", "--durations=10", "tests"]
    path = out / "tests.log"
    with path.open("w") as log:
        code = run_within(command, seconds, log)
    if code is None:
        return False, f"stopped after {seconds:.0f} s (see tests.log)"
    last = (path.read_text().strip().splitlines() or ["no output"])[-1]
    return code == 0 and (dry_run or " passed" in last), f"{last.strip('= ')} (pytest code {code})"


def run_stage(
    name: str, device: str, arguments: list[str], log: TextIO, seconds: float
) -> tuple[str, dict[str, Any], str]:
    """Runs one of our commands in its own process; returns how it ended, and the JSON and the text that it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", folder, *arguments]
        code = run_within(command, seconds, log)
        said = "done" if code == 0 else f"ended with code {code} (see worker.log)"
        said = f"stopped after {seconds:.0f} s (see worker.log)" if code is None else said
        path = place(Path(folder), name, device, "--dry-run" in arguments)
        report, numbers = (path.with_name(path.name + ending) for ending in (".md", ".json"))
        if not report.exists() or not numbers.exists():
            return f"{said}, without a report", {}, ""
        return said, json.loads(numbers.read_text()), report.read_text()


def sanitize(out: Path, sanitizer: str, seconds: float) -> dict[str, dict[str, Any]]:
    """Runs the tests marked ``sanitize`` under each tool of compute-sanitizer; returns its verdict and summary by tool.

    Clean: the tool's summary counts nothing, the tests passed, and the tool saw the process to its end. Every tensor
    gets its own allocation: otherwise a read past its end would hit a neighbour's memory and raise no error.
    """
    names = [name for path in ROOT.glob("kernels/*.py") for name in KERNEL.findall(path.read_text())]
    marked = [str(path) for path in ROOT.glob("tests/**/test_*.py") if "pytest.mark.sanitize" in path.read_text()]
    tests = [sys.executable, "-m", "pytest", "-m", "sanitize", "-p", "no:cacheprovider", "-rfEs", *marked]
    found = {}
    for tool, pattern in SUMMARIES.items():
        command = [sanitizer, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "86"]
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch makes calls that fail by design
        for name in names:
            command += ["--kernel-name", f"kernel_substring={name}"]
        path = out / f"{tool}.log"
        with path.open("w") as log:
            code = run_within([*command, *tests], seconds, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        said = pattern.search(text := path.read_text())
        passed = re.search(r"\b\d+ passed.*", text)
        parts = [said[0] if said else "no summary", passed[0].strip("= ") if passed else "no test passed"]
        parts += [f"stopped after {seconds:.0f} s" if code is None else f"code {code}"]
        clean = code == 0 and said is not None and int(said[1]) == 0 and passed is not None
        found[tool] = {"clean": clean, "summary": "; ".join(parts) + ("" if clean else f" (see {path.name})")}
        print(f"{tool}: {found[tool]['summary']}", flush=True)
    return found


def sanitize_all(out: Path, sanitizer: str, device: str) -> int:
    """Writes the result of ``sanitize`` to results.json and table.md; returns 0 if all is clean."""
    found = sanitize(out, sanitizer, SANITIZE_SECONDS)
    about = {**about_this_run(device), "sanitizer": found}
    (out / "results.json").write_text(json.dumps({"about": about, "rows": []}, indent=1))
    rows = [[tool, "yes" if one["clean"] else "**no**", one["summary"]] for tool, one in found.items()]
    lines = heading("The tests marked `sanitize` under compute-sanitizer", about)
    lines += table("tool | clean | summary", rows)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    return 0 if all(one["clean"] for one in found.values()) else 1


def run_all(out: Path, device: str, dry_run: bool, skip_tests: bool, seconds: float) -> int:
    """Runs every stage and writes the report; returns 0 if all went well."""
    tiny, took = ["--dry-run"] if dry_run else [], dict[str, float]()

    def done(stage: str, said: str) -> None:
        took[stage] = round(time.monotonic() - begin - sum(took.values()), 1)
        print(f"{stage}: {said} ({took[stage]} s)", flush=True)

    begin = time.monotonic()
    passed, tests = (True, "skipped on request") if skip_tests else run_tests(out, TEST_SECONDS, dry_run)
    done("tests", tests)
    with (out / "worker.log").open("w") as log:
        cases = cases_of("errors", device, tiny=True) + cases_of("gpu", device, dry_run)
        rows = run_cases(cases, seconds, lambda row: append_row(out / "rows.jsonl", row), log)
        done("loss", f"{len(rows)} rows")
        arguments = ["--head", "llama-3.1-8b", "--seconds", str(seconds if dry_run else 40.0), *tiny]
        limit = seconds if dry_run else KERNEL_SECONDS
        kernels, kernel_rows, kernel_text = run_stage("kernels", device, arguments, log, limit)
        done("kernels", kernels)
        arguments = ["--device", device, "--rounds", "3", *tiny]
        limit = seconds if dry_run else STEP_SECONDS
        step, step_rows, step_text = run_stage("step", device, arguments, log, limit)
        done("step", step)
    plot = roofline(rows, out / "roofline.png") or "roofline.png"
    ours = ", ".join(wrong(rows)) or "all within their error bounds"
    stages = {"tests": tests, "loss: ours": ours, "kernels": kernels, "step": step, "plot": plot}
    about = {**about_this_run(device), **stages, "stage_seconds": took}
    content = {"about": about, "rows": rows, "kernels": kernel_rows, "step": step_rows}
    (out / "results.json").write_text(json.dumps(content, indent=1))
    lines = markdown(rows, "The fused D2O loss", dry_run)
    said = table("stage | how it went", stages.items())
    (out / "table.md").write_text("\n".join([*lines, *said, "", kernel_text, step_text]))
    print("\n".join([*lines, *said, "", summary(rows)]))
    return 0 if rows and passed and not wrong(rows) and kernels == step == "done" else 1


def main(argv: list[str] | None = None) -> int:
    parser = options("benchmarks.gpu", __doc__)
    parser.set_defaults(out=Path(os.environ.get("OUT") or RESULTS / f"gpu-{time.strftime('%Y-%m-%d-%H%M%S')}"))
    parser.add_argument("--skip-tests", action="store_true", help="the benchmarks alone")
    parser.add_argument("--sanitize", action="store_true", help="small tests under compute-sanitizer, nothing else")
    parser.add_argument(
        "--seconds", type=float, default=LOSS_SECONDS, help="time for the loss suite; in a dry run for each stage"
    )
    args = parser.parse_args(argv)
    device = require_cuda(parser, args.dry_run).type
    sanitizer = shutil.which("compute-sanitizer")
    if args.sanitize and sanitizer is None:
        parser.error("compute-sanitizer is not on the PATH: it comes with the CUDA toolkit, in its bin folder")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.sanitize and sanitizer is not None:
        return sanitize_all(args.out, sanitizer, device)
    return run_all(args.out, device, args.dry_run, args.skip_tests, args.seconds)


if __name__ == "__main__":
    raise SystemExit(main())

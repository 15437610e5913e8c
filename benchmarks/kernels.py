"""One row per kernel at the heads of real models: floor, measured, gap, and what bounds it by the arithmetic.

    python -m benchmarks.kernels                       # a CUDA device, all heads, within --seconds
    python -m benchmarks.kernels --ncu logit_grad      # one kernel under Nsight Compute; keeps the sections' text
    python -m benchmarks.kernels --dry-run             # a CPU, tiny shapes, interpreted: whether everything runs

A kernel's *floor* is the longest of three times: its bytes over the rate of a large copy, its operations over the rate
of a large square product, and its launches times what a launch of nothing takes, all measured in the same run. Its
results are compared with fp64 before it is timed. All kernels of a head run in turn, round after round, the L2 emptied
before each. Writes <date>-kernels-<device>.json and .md after every head; ends with 1 if a kernel failed or is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measure import MIN_ROUNDS, device_rates, timed
from benchmarks.runner import RESULTS, ROOT, about_this_run
from benchmarks.shapes import DTYPES, HEADS

if TYPE_CHECKING:
    from benchmarks.kernel_cases import Work

FLUSH_BYTES = 2 << 30
NCU_SECONDS = 300.0
Row = dict[str, Any]


class Stopwatch:
    """Times single launches. On CUDA by events behind a write of 2 GiB, which empties the L2 and takes so long that the
    host has queued the launch before the device comes to it; on a CPU by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None

    def seconds(self, work: Work) -> float:
        work.prepare()
        if self.flush is None:
            return timed(work.launch, self.device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        work.launch()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3


def checked(work: Work) -> str:
    """Why the kernel is not to be timed, or "". Its first launch, so that it is compiled afterwards."""
    try:
        work.prepare()
        error = work.error(work.launch())
    except Exception as failure:  # of the compiler, of the device, for want of memory: the others go on
        return f"{type(failure).__name__}: {str(failure).strip()[:300]}"
    return "" if error <= 1.0 else f"its error is {error:.2g} times the bound"


def measure(works: Sequence[Work], watch: Stopwatch, until: float, rounds: int) -> tuple[list[str], list[list[float]]]:
    """(why each is out, or ""; seconds of each): correctness first, then rounds in which every kernel runs once.

    At least ``MIN_ROUNDS`` rounds unless fewer are asked for, whatever the time.
    """
    reasons, seconds = [checked(work) for work in works], [list[float]() for _ in works]
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.monotonic() > until:
            break
        for i, work in enumerate(works):
            if not reasons[i]:
                seconds[i].append(watch.seconds(work))
    return reasons, seconds


def row_of(work: Work, reason: str, seconds: list[float], rates: dict[str, float]) -> Row:
    """The counted work, the floor with its bound, and what was measured: median and quartiles in milliseconds."""
    terms = {
        "memory": work.moved / rates["copy_gb_per_s"] / 1e9,
        "matrix": work.operations / rates["matmul_tflops"] / 1e12,
        "launches": work.launches * rates["launch_seconds"],
    }
    bound = max(terms, key=terms.__getitem__)
    counted = {"bytes": work.moved, "operations": work.operations, "launches": work.launches}
    row: Row = {"kernel": work.kernel, **work.size, **counted, "floor_ms": terms[bound] * 1e3, "bound": bound}
    row.update(status="failed" if reason else "ok", reason=reason)
    if seconds:
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        row.update(ms=median * 1e3, ms_q1=q1 * 1e3, ms_q3=q3 * 1e3, rounds=len(seconds))
        row.update(gb_per_s=work.moved / median / 1e9, tflops=work.operations / median / 1e12)
        row["gap"] = median / terms[bound]
    return row


def launch_seconds(watch: Stopwatch) -> float:
    """What the smallest kernel takes."""
    from benchmarks.kernel_cases import Work

    one = torch.zeros(1, device=watch.device)
    nothing = Work("nothing", {}, lambda: one.add_(1), lambda _: 0.0, 0.0, 0.0)
    return statistics.median([watch.seconds(nothing) for _ in range(20)][5:])


def markdown(about: dict[str, Any], rates: dict[str, float], rows: Sequence[Row]) -> str:
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("python", "torch", "triton"))
    lines = [
        "# The kernels" if about["measured"] else "# Dry run on a CPU: not a measurement",
        "",
        f"{about['date']}, commit {about['commit']}, {about['device_name']}; {versions}. {about['dtype']} operands.",
        "",
        f"Measured in this run: {rates['copy_gb_per_s']:.4g} GB/s in a copy, {rates['matmul_tflops']:.3g} TFLOP/s in a "
        f"square product, {rates['launch_seconds'] * 1e6:.2g} us for a launch of nothing.",
    ]
    for head in dict.fromkeys(row["head"] for row in rows):
        lines += [
            "",
            f"## {head}",
            "",
            "| kernel | shape | MB | GFLOP | floor, ms | bound by | measured, ms (quartiles) | gap | GB/s | TFLOP/s |",
            "|---|---|--:|--:|--:|---|--:|--:|--:|--:|",
        ]
        lines += [f"| {' | '.join(_cells(row))} |" for row in rows if row["head"] == head]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    shape = ", ".join(f"{axis} = {row[axis]}" for axis in "nHVM" if axis in row)
    cells = [row["kernel"], shape, f"{row['bytes'] / 1e6:.4g}", f"{row['operations'] / 1e9:.4g}"]
    cells += [f"{row['floor_ms']:.3g}", row["bound"]]
    if "ms" not in row:
        return [*cells, f"**{row['status']}**: {row['reason']}".replace("|", "/").replace("\n", " "), "", "", ""]
    cells += [f"{row['ms']:.4g} ({row['ms_q1']:.4g} - {row['ms_q3']:.4g})", f"{row['gap']:.2f}"]
    return [*cells, f"{row['gb_per_s']:.4g}", f"{row['tflops']:.3g}"]


def works_of(head: str, device: torch.device, dtype: str, tiny: bool, only: str | None) -> list[Work]:
    from benchmarks.kernel_cases import Operands, all_work, shape_of

    works = all_work(Operands(shape_of(head, tiny), device, DTYPES[dtype]))
    chosen = [work for work in works if only is None or only in work.kernel]
    if not chosen:
        raise SystemExit(f"no kernel's name contains {only!r}: {', '.join(work.kernel for work in works)}")
    return chosen


def under_ncu(kernel: str, head: str, dtype: str, out: Path) -> int:
    """One launch of ``kernel`` under ncu, its report's text in ncu-<kernel>.txt; 1 if that cannot be had."""
    ncu = shutil.which("ncu")
    if ncu is None:
        print("ncu is not on the PATH: install Nsight Compute (it comes with the CUDA toolkit)", file=sys.stderr)
        return 1
    path = out / f"ncu-{''.join(c if c.isalnum() else '-' for c in kernel)}.txt"
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--set", "full", "--log-file", str(path)]
    command += [sys.executable, "-m", "benchmarks.kernels", "--profile", kernel, "--head", head, "--dtype", dtype]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=NCU_SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"ncu was stopped after {NCU_SECONDS:.0f} s (see {path})", file=sys.stderr)
        return 1
    print(path.read_text() if path.exists() else f"ncu left no report; it ended with code {code}")
    return 1 if code or not path.exists() else 0


def profile(works: Sequence[Work]) -> None:
    """A launch of each that ncu sees, after one that it does not."""
    for work in works:
        reason = checked(work)
        if reason:
            raise RuntimeError(f"{work.kernel}: {reason}")
        work.prepare()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        work.launch()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.kernels", description="Every kernel beside its floor.")
    parser.add_argument("--head", action="append", choices=list(HEADS), help="one head (may be repeated)")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=400.0, help="time for all heads")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS), help="folder for the files")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, interpreted on a CPU")
    parser.add_argument("--ncu", metavar="KERNEL", help="one kernel at one head under Nsight Compute")
    parser.add_argument("--profile", metavar="KERNEL", help=argparse.SUPPRESS)  # what --ncu runs
    args = parser.parse_args(argv)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels
    elif not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run tries everything on a CPU with tiny shapes")
    heads, device = args.head or list(HEADS), torch.device("cpu" if args.dry_run else "cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.ncu:
        return under_ncu(args.ncu, heads[0] if args.head else "llama-3.1-8b", args.dtype, args.out)
    if args.profile:
        profile(works_of(heads[0], device, args.dtype, args.dry_run, args.profile))
        return 0

    deadline, watch = time.monotonic() + args.seconds, Stopwatch(device)
    rates = {**device_rates(device.type, args.dtype), "launch_seconds": launch_seconds(watch)}
    about = {**about_this_run(device.type), "measured": not args.dry_run, "dtype": args.dtype}
    path = args.out / f"{datetime.date.today()}-kernels-{device.type}{'-tiny' if args.dry_run else ''}.json"
    rows: list[Row] = []
    for i, head in enumerate(heads):
        works = works_of(head, device, args.dtype, args.dry_run, args.kernel)
        until = time.monotonic() + (deadline - time.monotonic()) / (len(heads) - i)
        measured = zip(works, *measure(works, watch, until, args.rounds), strict=True)
        rows += [{"head": head, **row_of(work, reason, seconds, rates)} for work, reason, seconds in measured]
        del works
        gc.collect()
        path.write_text(json.dumps({"about": about, "rates": rates, "rows": rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(about, rates, rows))
    print(markdown(about, rates, rows))
    return 0 if rows and all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

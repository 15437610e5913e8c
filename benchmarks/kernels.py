"""One row per kernel at the heads of real models: its floor, its measured time, the gap, and the floor's limit.

    python -m benchmarks.kernels                       # a CUDA device, all heads, within --seconds
    ncu --profile-from-start off --set full python -m benchmarks.kernels --profile logit_grad --head llama-3.1-8b
    python -m benchmarks.kernels --dry-run             # a CPU, tiny shapes, interpreted: checks that everything runs

A kernel's *floor* is the longest of three times: its bytes over the rate of a large copy, its operations over the rate
of a large square product, and its launches times the time of an empty launch, all measured in the same run. Its
results are compared with fp64 before it is timed. Each round runs every kernel of a head once and empties the L2
before each. Writes kernels-<device>.json and .md after every head; exits with 1 if a kernel failed or is wrong.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.report import about_this_run, heading, milliseconds, options, place, require_cuda, save, table
from benchmarks.shapes import DTYPES, HEADS
from benchmarks.timing import device_rates, interleaved, quartiles, timed

if TYPE_CHECKING:
    from benchmarks.kernel_cases import Work

FLUSH_BYTES = 2 << 30
Row = dict[str, Any]


class Stopwatch:
    """Times single launches; on CUDA behind a write of 2 GiB, which empties the L2 and lasts until they are queued."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None

    def seconds(self, work: Work) -> float:
        work.prepare()
        return timed(work.launch, self.device, self.flush)


def checked(work: Work) -> str:
    """Launches the kernel once, which also compiles it; returns why it may not be timed, or ""."""
    try:
        work.prepare()
        error = work.error(work.launch())
    except Exception as failure:  # the compiler, the device or its memory: the others go on
        return f"{type(failure).__name__}: {str(failure).strip()[:300]}"
    return "" if error <= 1.0 else f"its error is {error:.2g} times the bound"


def measure(works: Sequence[Work], watch: Stopwatch, until: float, rounds: int) -> tuple[list[str], list[list[float]]]:
    """(why each is out, or ""; seconds of each): correctness first, then rounds in which every kernel runs once."""
    reasons = [checked(work) for work in works]
    calls = {i: partial(watch.seconds, work) for i, work in enumerate(works) if not reasons[i]}
    seconds = interleaved(calls, rounds, until)
    return reasons, [seconds.get(i, []) for i in range(len(works))]


def row_of(work: Work, reason: str, seconds: list[float], rates: dict[str, float]) -> Row:
    """The counted work, the floor with its bound, and the measured median and quartiles in milliseconds."""
    terms = {
        "memory": work.moved / rates["copy_gb_per_s"] / 1e9,
        "matrix": work.operations / rates["matmul_tflops"] / 1e12,
        "launches": work.launches * rates["launch_seconds"],
    }
    bound = max(terms, key=terms.__getitem__)
    counted = {"bytes": work.moved, "operations": work.operations, "launches": work.launches}
    row: Row = {"kernel": work.kernel, **work.size, **counted, "floor_ms": terms[bound] * 1e3, "bound": bound}
    row.update(status="failed" if reason else "ok", reason=reason, **quartiles(seconds))
    if seconds:
        row.update(gb_per_s=work.moved / row["ms"] / 1e6, tflops=work.operations / row["ms"] / 1e9)
        row["gap"] = row["ms"] / row["floor_ms"]
    return row


def launch_seconds(watch: Stopwatch) -> float:
    """The time of the smallest kernel."""
    one = torch.zeros(1, device=watch.device)
    return statistics.median([timed(lambda: one.add_(1), watch.device, watch.flush) for _ in range(20)][5:])


def markdown(about: Row, rates: dict[str, float], rows: Sequence[Row], dry_run: bool) -> list[str]:
    lines = [
        *heading("The kernels", about, dry_run),
        f"{about['dtype']} operands. This device in this run: {rates['copy_gb_per_s']:.4g} GB/s in a copy, "
        f"{rates['matmul_tflops']:.3g} TFLOP/s in a square product, {rates['launch_seconds'] * 1e6:.2g} us a launch.",
    ]
    columns = "kernel | shape | MB | GFLOP | floor, ms | bound by | measured, ms (quartiles) | gap | GB/s | TFLOP/s"
    for head in dict.fromkeys(row["head"] for row in rows):
        lines += ["", f"## {head}", "", *table(columns, (_cells(row) for row in rows if row["head"] == head))]
    return lines


def _cells(row: Row) -> list[str]:
    shape = ", ".join(f"{axis} = {row[axis]}" for axis in "nHVM" if axis in row)
    cells = [row["kernel"], shape, f"{row['bytes'] / 1e6:.4g}", f"{row['operations'] / 1e9:.4g}"]
    cells += [f"{row['floor_ms']:.3g}", row["bound"]]
    if "ms" not in row:
        return [*cells, f"**{row['status']}**: {row['reason']}", "", "", ""]
    return [*cells, milliseconds(row), f"{row['gap']:.2f}", f"{row['gb_per_s']:.4g}", f"{row['tflops']:.3g}"]


def works_of(head: str, device: torch.device, dtype: str, tiny: bool, only: str | None) -> list[Work]:
    from benchmarks.kernel_cases import Operands, all_work, shape_of

    works = all_work(Operands(shape_of(head, tiny), device, DTYPES[dtype]))
    chosen = [work for work in works if only is None or only in work.kernel]
    if not chosen:
        raise SystemExit(f"no kernel's name contains {only!r}: {', '.join(work.kernel for work in works)}")
    return chosen


def profile(works: Sequence[Work]) -> None:
    """Launches each kernel twice; a profiler sees only the second launch."""
    for work in works:
        if reason := checked(work):
            raise RuntimeError(f"{work.kernel}: {reason}")
        work.prepare()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        work.launch()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(argv: list[str] | None = None) -> int:
    parser = options("benchmarks.kernels", __doc__)
    parser.add_argument("--head", action="append", choices=list(HEADS), help="one head (may be repeated)")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=400.0, help="time for all heads")
    parser.add_argument("--profile", metavar="KERNEL", help="one launch for a profiler, see above")
    args = parser.parse_args(argv)
    device, heads = require_cuda(parser, args.dry_run), args.head or list(HEADS)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.profile:
        profile(works_of(heads[0], device, args.dtype, args.dry_run, args.profile))
        return 0

    deadline, watch = time.monotonic() + args.seconds, Stopwatch(device)
    rates = {**device_rates(device, DTYPES[args.dtype]), "launch_seconds": launch_seconds(watch)}
    about, text = {**about_this_run(device.type), "dtype": args.dtype}, ""
    rows: list[Row] = []
    for i, head in enumerate(heads):
        works = works_of(head, device, args.dtype, args.dry_run, args.kernel)
        until = time.monotonic() + (deadline - time.monotonic()) / (len(heads) - i)
        measured = zip(works, *measure(works, watch, until, args.rounds), strict=True)
        rows += [{"head": head, **row_of(work, reason, seconds, rates)} for work, reason, seconds in measured]
        del works
        gc.collect()
        lines = markdown(about, rates, rows, args.dry_run)
        text = save(place(args.out, "kernels", device.type, args.dry_run), lines, about, rates=rates, rows=rows)
    print(text)
    return 0 if rows and all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

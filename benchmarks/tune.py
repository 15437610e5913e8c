"""Measures the kernels' tile tables on this device and prints them as lines to paste into their source.

    python -m benchmarks.tune                          # a CUDA device, within --seconds
    python -m benchmarks.tune --dry-run                # a CPU, tiny shapes, interpreted: checks that everything runs

For each entry of a table, at each head that reads it, every candidate is compiled, left out if it spills or does not
fit, compared with fp64, and timed in turn with the others. The winner has the smallest geometric mean over the heads of
its time over the fastest one's. The present configuration stays unless it is beaten by ``MARGIN``. The most important
entries come first, and <date>-tiles-<architecture>.json and .md are rewritten after each. Entries out of time stay as
they are. Separate processes compile the candidates beforehand into Triton's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.kernels import Stopwatch, checked
from benchmarks.report import ROOT, about_this_run, heading, options, require_cuda, save, table
from benchmarks.shapes import DTYPES
from benchmarks.timing import interleaved

if TYPE_CHECKING:
    from benchmarks.kernel_cases import Operands, Work

MARGIN = 0.01  # a smaller gain may be noise
ROUNDS = 15
ENTRIES = "forward, forward capped, stats, grad, dhidden, dweight, dhidden odd, dweight odd, forward mixed, "
ENTRIES += "forward fp32, dhidden fp32, dweight fp32"
COMPILING = 0.4  # at most this share of the time
Tile = Any  # a named tuple of the kernel's own module
Table = dict[Any, Tile]


def tiles(kind: Any, text: str) -> tuple[Tile, ...]:
    return tuple(kind(*map(int, numbers.split())) for numbers in text.split(", "))


# BLOCK_N, BLOCK_V, BLOCK_H, warps, stages, and row tiles side by side if not the default.
FORWARD = (
    "128 256 64 8 3, 128 256 64 8 4 4, 128 256 64 8 4 8, 128 256 64 8 4 24, 128 256 32 8 6, "
    "128 256 128 8 2, 256 128 64 8 4, 256 128 64 8 3, 128 128 64 8 5, 128 128 64 4 5, 128 128 128 8 3, "
    "64 256 64 4 4"
)
MIXED = "128 128 32 8 4, 64 128 64 8 3, 128 256 32 8 3, 64 256 32 8 3, 64 128 64 4 3, 128 64 64 4 4"
FORWARD_FP32 = "64 64 16 8 4, 128 64 16 8 3, 64 128 16 8 3, 128 128 16 8 3, 128 64 32 8 3, 64 64 32 4 3"
# BLOCK_V, warps.
ROWS = "1024 4, 2048 4, 2048 8, 4096 16, 8192 8, 8192 16, 16384 16"
# Rows and columns of the result, the step along the sum, warps, stages.
DHIDDEN = (
    "128 256 64 8 4, 128 256 64 8 3, 128 256 32 8 6, 256 128 64 8 4, 128 128 64 8 5, 128 128 64 4 5, "
    "128 128 64 4 3, 128 128 128 8 4, 64 256 64 4 4"
)
DWEIGHT = (
    "128 256 64 8 4, 128 256 32 8 6, 128 256 32 8 4, 128 128 64 8 5, 128 128 64 8 3, 128 128 128 8 2, "
    "128 128 32 8 5, 64 256 64 8 4, 64 128 64 4 4"
)
PRODUCT_ODD = "64 64 32 8 3, 128 128 32 8 3, 64 128 32 8 3, 128 64 64 8 3, 128 128 64 8 3, 64 64 64 4 3"
PRODUCT_FP32 = "64 64 32 8 3, 64 64 16 8 4, 128 64 16 8 4, 64 128 16 8 4, 128 128 16 8 3, 64 64 32 4 3"


@dataclass(frozen=True)
class Entry:
    """One entry of a table: the kernels and heads that read it, and the tiles to try.

    ``at``: the table and the key that the launcher reads for these operands, and the work to time.
    """

    name: str
    kernels: tuple[Any, ...]  #: as Triton compiles them
    heads: tuple[str, ...]
    dtypes: tuple[str, str]  #: of hidden states and weight
    candidates: tuple[Tile, ...]
    at: Callable[[Operands], tuple[Table, Any, list[Work]]]


@dataclass
class Found:
    """The measurements of one entry. ``ms``: by head and kernel, then by tile; ``out``: why a tile was left out."""

    table: str
    key: Any
    present: Tile
    out: dict[Tile, str] = field(default_factory=dict)
    ms: dict[str, dict[Tile, float]] = field(default_factory=dict)

    def scores(self) -> dict[Tile, float]:
        """Geometric mean of each tile's time over the fastest one's, for the tiles that ran everywhere."""
        columns = list(self.ms.values())
        everywhere = [tile for tile in (columns[0] if columns else ()) if all(tile in column for column in columns)]
        if not everywhere:
            return {}
        best = [min(column[tile] for tile in everywhere) for column in columns]
        return {
            tile: statistics.geometric_mean([column[tile] / least for column, least in zip(columns, best, strict=True)])
            for tile in everywhere
        }

    def winner(self) -> Tile:
        scores = self.scores()
        best = min(scores, key=scores.__getitem__, default=self.present)
        stays = self.present in scores and scores[self.present] * (1 - MARGIN) <= scores[best]
        return self.present if stays else best


def tables() -> dict[str, Table]:
    """The tables by module and name, as in kernels/."""
    from d2o_fast.kernels import filtered_products, linear_logprob, logit_grad

    names = {
        linear_logprob: ("DESCRIPTOR_TILES", "TILES"),
        filtered_products: ("DHIDDEN_TILES", "DWEIGHT_TILES"),
        logit_grad: ("ROW_TILES",),
    }
    return {f"{module.__name__.split('.')[-1]}.{n}": getattr(module, n) for module, ns in names.items() for n in ns}


def entries(device: torch.device) -> list[Entry]:
    """The entries that real heads read, the most telling first; one head and one candidate each for the interpreter.

    For rows that cannot be read 16 bytes at a time, only the filter's products are tuned: some vocabularies are odd, no
    hidden size is. All devices have the same candidates; a tile that does not fit a device is left out there.
    """
    from benchmarks import kernel_cases as cases
    from d2o_fast.kernels import filtered_products as products
    from d2o_fast.kernels import linear_logprob as forward
    from d2o_fast.kernels import logit_grad as rows
    from d2o_fast.kernels.common import architecture

    def scoring(of: Operands) -> tuple[Table, Any, list[Work]]:
        return *forward.tile_entry(of.hidden, of.weight, of.shape.softcap or 0.0), [cases.linear_logprob_work(of)]

    def row(kernel: str, of: Operands) -> tuple[Table, Any, list[Work]]:
        work = {"stats": cases.logit_stats_work, "grad": cases.logit_grad_work}[kernel](of, cases.Logits(of))
        return rows.ROW_TILES, (architecture(of.device), kernel), [work]

    def product(which: str, of: Operands) -> tuple[Table, Any, list[Work]]:
        asked = {"dhidden": which == "dhidden", "dweight": which == "dweight"}
        gradients = {f"{which}, 5%": cases.Gradient(of, 0.05), f"{which}, all": cases.Gradient(of)}
        works = [cases.filtered_work(of, gradient, label, **asked) for label, gradient in gradients.items()]
        operand = of.weight if which == "dhidden" else of.hidden
        kind = products.product_kind(next(iter(gradients.values())).memory, operand)
        read = products.DHIDDEN_TILES if which == "dhidden" else products.DWEIGHT_TILES
        return read, (architecture(of.device), kind), works

    both = (forward.linear_logprob_tma_kernel, forward.linear_logprob_kernel)
    dhidden, dweight = partial(product, "dhidden"), partial(product, "dweight")
    alike, mixed, fp32 = ("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")
    large, odd, capped, qwen = ("llama-3.1-8b", "qwen2.5-0.5b"), ("gpt2",), ("gemma-2-2b",), ("qwen2.5-0.5b",)
    vocabularies = ("llama-3.1-8b", "gpt2", "gemma-2-2b")
    one_entry = architecture(device) in forward.DESCRIPTOR_TILES  # with a softcap and without
    stats, grad = (rows.logit_stats_kernel,), (rows.logit_grad_kernel,)
    hidden, weight = (products.dhidden_kernel,), (products.dweight_kernel,)
    Forward, Row, Product = forward.Tile, rows.RowTile, products.ProductTile
    plan = [
        Entry("forward", both, large + capped if one_entry else large, alike, tiles(Forward, FORWARD), scoring),
        Entry("stats", stats, vocabularies, alike, tiles(Row, ROWS), partial(row, "stats")),
        Entry("grad", grad, vocabularies, alike, tiles(Row, ROWS), partial(row, "grad")),
        Entry("dhidden", hidden, large, alike, tiles(Product, DHIDDEN), dhidden),
        Entry("dweight", weight, large, alike, tiles(Product, DWEIGHT), dweight),
        Entry("dhidden odd", hidden, odd, alike, tiles(Product, PRODUCT_ODD), dhidden),
        Entry("dweight odd", weight, odd, alike, tiles(Product, PRODUCT_ODD), dweight),
        Entry("forward mixed", both, ("llama-3.2-1b",), mixed, tiles(Forward, MIXED), scoring),
        Entry("forward fp32", both, odd, fp32, tiles(Forward, FORWARD_FP32), scoring),
        Entry("dhidden fp32", hidden, qwen, fp32, tiles(Product, PRODUCT_FP32), dhidden),
        Entry("dweight fp32", weight, qwen, fp32, tiles(Product, PRODUCT_FP32), dweight),
    ]
    if not one_entry:
        plan.insert(1, Entry("forward capped", both, capped, alike, tiles(Forward, FORWARD), scoring))
    if device.type == "cuda":
        return plan
    small = {Forward: "16 64 32 4 1 2", Row: "1024 4", Product: "16 64 32 4 1"}
    kinds = [type(one.candidates[0]) for one in plan]
    return [
        replace(one, heads=one.heads[-1:], candidates=tiles(kind, small[kind]))
        for one, kind in zip(plan, kinds, strict=True)
    ]


@contextlib.contextmanager
def using(known: Table, key: Any, tile: Tile) -> Iterator[None]:
    """Context manager: makes the launcher read ``tile``."""
    before, known[key] = known[key], tile
    try:
        yield
    finally:
        known[key] = before


def spilled(kernels: Sequence[Any], device: torch.device) -> int:
    """The most local memory (spills and stack) of a thread, in bytes, over the kernels compiled since ``forget``."""
    if device.type != "cuda":
        return 0
    compiled = [binary for kernel in kernels for cache in kernel.device_caches.values() for binary in cache[0].values()]
    return max((4 * binary.n_spills for binary in compiled if binary.n_spills), default=0)


def forget(kernels: Sequence[Any], device: torch.device) -> None:
    """Drops the compiled kernels from this process; they stay in Triton's cache on disk."""
    for kernel in kernels if device.type == "cuda" else ():
        kernel.device_caches.clear()


def refused(entry: Entry, work: Work, device: torch.device) -> str:
    """The reason to leave the present tile out, or ""."""
    forget(entry.kernels, device)
    reason = checked(work)
    if not reason and (local := spilled(entry.kernels, device)):
        reason = f"spills: {local} bytes of local memory"
    return reason


def tune(entry: Entry, watch: Stopwatch, until: float, rounds: int = ROUNDS) -> Found:
    """Checks and times every candidate at every head until the time is out, but at the first head in any case."""
    found: Found | None = None
    for head in entry.heads:
        if found is not None and time.monotonic() > until:
            break
        read, key, works = entry.at(operands(entry, head, watch.device))
        if found is None:
            found = Found(next(name for name, known in tables().items() if known is read), key, read[key])
        assert key == found.key, f"{head} reads {key}, not {found.key}"
        for work in works:
            tiles = [tile for tile in dict.fromkeys((found.present, *entry.candidates)) if tile not in found.out]
            for tile in tiles:
                with using(read, key, tile):
                    late = tile != found.present and time.monotonic() > until
                    reason = "not reached in time" if late else refused(entry, work, watch.device)
                if reason:
                    found.out[tile] = reason
            tiles = [tile for tile in tiles if tile not in found.out]
            found.ms[f"{head}, {work.kernel}"] = timed_in_turn(read, key, tiles, work, watch, until, rounds)
        del read, works
        gc.collect()
    assert found is not None
    return found


def timed_in_turn(
    known: Table, key: Any, tiles: Sequence[Tile], work: Work, watch: Stopwatch, until: float, rounds: int
) -> dict[Tile, float]:
    """Median milliseconds of each tile; the first round, which may load the kernel, does not count."""

    def seconds(tile: Tile) -> float:
        with using(known, key, tile):
            return watch.seconds(work)

    found = interleaved({tile: partial(seconds, tile) for tile in tiles}, rounds + 1, until)
    return {tile: statistics.median(taken[1:]) * 1e3 for tile, taken in found.items()}


def operands(entry: Entry, head: str, device: torch.device) -> Operands:
    from benchmarks.kernel_cases import Operands, shape_of

    hidden, weight = (DTYPES[name] for name in entry.dtypes)
    return Operands(shape_of(head, tiny=device.type != "cuda"), device, hidden, weight)


def compile_part(part: int, parts: int) -> None:
    """Launches every ``parts``-th candidate once to fill Triton's cache.

    Failures are ignored here: the candidate fails again when it is measured, and is named then.
    """
    for entry in entries(torch.device("cuda")):
        for head in entry.heads:
            read, key, works = entry.at(operands(entry, head, torch.device("cuda")))
            for tile in dict.fromkeys((read[key], *entry.candidates)[part::parts]):
                with contextlib.suppress(Exception), using(read, key, tile):
                    works[0].prepare()
                    works[0].launch()
                    torch.cuda.synchronize()


def compile_ahead(seconds: float, log: Path) -> None:
    """Runs ``compile_part`` in as many processes as help, and stops them when the time is out."""
    parts = max(1, min(8, (os.cpu_count() or 1) // 2))
    deadline = time.monotonic() + seconds
    with log.open("w") as file:
        command = [sys.executable, "-m", "benchmarks.tune", "--compile"]
        running = [
            subprocess.Popen([*command, f"{part}/{parts}"], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            for part in range(parts)
        ]
        for process in running:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def literal(key: Any, tile: Tile) -> str:
    """A table's line, as written in the source."""
    values, defaults = list(tile), tile._field_defaults
    while values and defaults.get(tile._fields[len(values) - 1]) == values[-1]:
        values.pop()
    name = json.dumps(key) if isinstance(key, str) else f"({', '.join(map(json.dumps, key))})"
    return f"    {name}: {type(tile).__name__}({', '.join(map(str, values))}),"


def markdown(about: dict[str, Any], found: Sequence[Found], dry_run: bool) -> list[str]:
    """A table per entry, and at the end the lines to paste."""
    lines = [*heading("Tile configurations", about, dry_run), f"{about['architecture']}. Milliseconds, medians."]
    for one in found:
        scores, winner, rows = one.scores(), one.winner(), list[list[str]]()
        for tile in sorted(scores, key=scores.__getitem__):
            remark = ", ".join(word for word, of in (("winner", winner), ("present", one.present)) if tile == of)
            cells = [f"{column[tile]:.4g}" for column in one.ms.values()]
            rows.append([", ".join(map(str, tile)), *cells, f"{scores[tile]:.3f}", remark])
        columns = f"tile | {' | '.join(one.ms)} | over the fastest | "
        lines += ["", f"## {one.table}, {one.key}", "", *table(columns, rows)]
        lines += [f"\nOut: {', '.join(map(str, tile))}: {reason}" for tile, reason in one.out.items()]
    changed = [one for one in found if one.winner() != one.present]
    lines += ["", "## To paste", ""] if changed else ["", "Nothing to paste: every present configuration stays."]
    for name in dict.fromkeys(one.table for one in changed):
        module, variable = name.split(".")
        pasted = [literal(one.key, one.winner()) for one in changed if one.table == name]
        lines += [f"kernels/{module}.py, {variable}:", "", "```python", *pasted, "```", ""]
    return lines


def as_json(one: Found) -> dict[str, Any]:
    """The measurements with tiles as lists, since JSON's keys are text."""
    tiles = {**dict.fromkeys(one.out), **{tile: None for column in one.ms.values() for tile in column}}
    rows = [
        {"tile": tile, "out": one.out.get(tile, ""), "ms": {n: c[tile] for n, c in one.ms.items() if tile in c}}
        for tile in tiles
    ]
    return {"table": one.table, "key": one.key, "present": one.present, "winner": one.winner(), "tiles": rows}


def main(argv: list[str] | None = None) -> int:
    parser = options("benchmarks.tune", __doc__)
    parser.add_argument("--seconds", type=float, default=540.0, help="time for everything")
    parser.add_argument("--only", choices=ENTRIES.split(", "), metavar="ENTRY", help=f"one of: {ENTRIES}")
    parser.add_argument("--compile", help=argparse.SUPPRESS)  # a process of compile_ahead: part/parts
    args = parser.parse_args(argv)
    device = require_cuda(parser, args.dry_run)
    if args.compile:
        compile_part(*map(int, args.compile.split("/")))
        return 0
    from d2o_fast.kernels.common import architecture

    deadline = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.dry_run:
        compile_ahead(COMPILING * args.seconds, args.out / "compile.log")
    about, text = {**about_this_run(device.type), "architecture": architecture(device)}, ""
    watch, found = Stopwatch(device), list[Found]()
    plan = [entry for entry in entries(device) if args.only in (None, entry.name)]
    for i, entry in enumerate(plan):
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"not reached in time: {len(plan) - i} of {len(plan)} entries")
            break
        found.append(tune(entry, watch, time.monotonic() + left / (len(plan) - i), 1 if args.dry_run else ROUNDS))
        lines, numbers = markdown(about, found, args.dry_run), [as_json(one) for one in found]
        text = save(args.out / f"tiles-{about['architecture']}", lines, about, entries=numbers)
    print(text)
    return 0 if found else 1


if __name__ == "__main__":
    raise SystemExit(main())

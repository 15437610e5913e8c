"""Writes the rows of the loss suites: JSON lines, Markdown tables, and a roofline plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import heading, milliseconds, table
from benchmarks.shapes import DTYPES, MODES

Row = dict[str, Any]
#: Rows that agree in these belong to one interleaved run.
WHERE = ("suite", "head", "device", "dtype", "mode", "inputs", "N", "H", "V", "S", "G", "softcap")


def append_row(path: Path, row: Row) -> None:
    """Appends one line, which is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each case, in the order of measurement."""
    together: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        together.setdefault(tuple(row.get(name) for name in WHERE), []).append(row)
    return list(together.values())


def markdown(rows: Sequence[Row], title: str, dry_run: bool = False) -> list[str]:
    """The report as Markdown: one table of errors over all cases, then one table per timed case."""
    about = next((row for row in rows if "versions" in row), None)
    lines = heading(title, about, dry_run) if about else [f"# {title}", ""]
    for dtype, rates in {row["dtype"]: row["rates"] for row in rows if row.get("rates")}.items():
        lines += [
            f"This device in this run: {rates['matmul_tflops']:.3g} TFLOP/s in a square {dtype} product, "
            f"{rates['copy_gb_per_s']:.4g} GB/s in a copy.",
            "",
        ]
    if error_rows := [row for row in rows if row["suite"] == "errors"]:
        lines += _error_table(error_rows)
    for group in groups(row for row in rows if row["suite"] != "errors"):
        lines += _case_table(group)
    return lines


def _error_table(rows: Sequence[Row]) -> list[str]:
    """The largest error of each provider over all draws, beside eager's, by dtype and mode."""
    together: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        together.setdefault((row["dtype"], row["mode"], row["provider"]), []).append(row)
    lines = []
    for key, mine in together.items():
        found = [row["errors"] for row in mine if "errors" in row]
        cells = [_most(found, "loss")]
        for name in ("dhidden", "dweight", "logps"):
            pair = (_most(found, name), _most(found, f"{name}_largest"))
            cells.append(" / ".join(pair) if pair[0] else "")
        bad = "; ".join(f"{row['status']}: {row['reason']}" for row in mine if row["status"] != "ok")
        lines.append([*key, *cells, _most(found, "sequence_nats"), bad])
    columns = "dtype | mode | provider | loss | dhidden | dweight | log-probabilities | of a sequence, nats | not ok"
    return [
        "## Errors against fp64, the largest over all cases",
        "",
        f"{len(groups(rows))} shapes and inputs, {len(rows)} rows. Relative: root mean square / largest entry.",
        "",
        *table(columns, lines),
        "",
    ]


def _most(found: Sequence[dict[str, float]], name: str) -> str:
    return _number(max((errors[name] for errors in found if name in errors), default=None))


def ranking(group: Sequence[Row]) -> list[Row]:
    """The rows that may be compared, fastest first: timed, the same loss, within the shared error bound."""
    return sorted((row for row in group if row["status"] == "ok" and not row["reason"] and "ms" in row), key=_ms)


def wrong(rows: Sequence[Row]) -> list[str]:
    """Our providers that failed or are out of their error bound; the one with the filter is exempt."""
    bad = (row["provider"] for row in rows if row["status"] in ("failed", "out of bound"))
    return sorted({name for name in bad if name.startswith("ours") and name != "ours-filtered"})


def _ms(row: Row) -> float:
    return float(row.get("ms", float("inf")))


def summary(rows: Sequence[Row]) -> str:
    """One line per timed case: ours over the floor and over the best peer."""
    lines = []
    for group in groups(row for row in rows if "ms" in row):
        first, ranked = group[0], ranking(group)
        label = " ".join(str(first[name]) for name in ("head", "N", "dtype", "mode", "inputs"))
        mine = next((row for row in group if row["provider"] == "ours"), None)
        if mine is None or mine not in ranked:
            lines.append(f"{label}: ours is not ranked")
            continue
        peers = [row for row in ranked if not row["provider"].startswith("ours")]
        against = f", {mine['ms'] / peers[0]['ms']:.2f} x the best other, {peers[0]['provider']}" if peers else ""
        lines.append(f"{label}: ours {mine['ms']:.4g} ms, {mine['over_floor']:.2f} x floor{against}")
    return "\n".join(lines)


def _case_table(group: Sequence[Row]) -> list[str]:
    first = group[0]
    size = ", ".join(f"{axis} = {first[axis]}" for axis in "NHVSG")
    capped = f", softcap {first['softcap']}" if first.get("softcap") else ""
    lines = [f"## {first['suite']}: {first['head']}, {first['dtype']}, {first['mode']}, {first['inputs']} inputs", ""]
    entropy = f" Entropy {first['entropy_nats']:.1f} nats." if "entropy_nats" in first else ""
    lines.append(f"{size}{capped}.{entropy}")
    timed = next((row for row in group if "floor_seconds" in row), None)
    if timed:
        pairs = zip(timed["gemm_seconds"], timed["gemm_tflops"], strict=True)
        rates = ", ".join(f"{s * 1e3:.4g} ms ({t:.3g} TFLOP/s)" for s, t in pairs)
        lines.append(f"The device's own products: {rates}; the floor is {timed['floor_seconds'] * 1e3:.4g} ms.")
    if first.get("accumulator_bytes"):
        lines.append(
            f"Memory includes ours' fp32 accumulator of the weight, {first['accumulator_bytes'] / 2**20:.0f} MiB."
        )
    ours = next((row["ms"] for row in group if row["provider"] == "ours" and "ms" in row), None)
    ranked = [row["provider"] for row in ranking(group)]
    cells = []
    for row in sorted((row for row in group if row["status"] != "missing"), key=_ms):
        place = f"{ranked.index(row['provider']) + 1}. " if row["provider"] in ranked else ""
        over = [f"{row['over_floor']:.2f}", f"{row['ms'] / ours:.2f}" if ours else ""] if "ms" in row else ["", ""]
        memory = row.get("memory_bytes")
        errors = [_number(row.get("errors", {}).get(name)) for name in ("loss", "dhidden", "dweight", "logps")]
        remark = "" if row["status"] == "ok" else f"**{row['status']}**: "
        remark += row["reason"] or row.get("memory_reason", "") or row.get("path", "")
        size = "" if memory is None else f"{memory / 2**20:.0f}"
        cells.append([place + row["provider"], milliseconds(row), *over, size, *errors, remark])
    columns = "provider | ms (quartiles) | x floor | x ours | memory MiB | loss | dhidden | dweight | logps | remark"
    lines += ["", *table(columns, cells)]
    if missing := "; ".join(f"{row['provider']}: {row['reason']}" for row in group if row["status"] == "missing"):
        lines += ["", f"Missing: {missing}."]
    return [*lines, ""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def roofline(rows: Sequence[Row], path: Path) -> str | None:
    """Plots useful TFLOP/s over intensity under the ceilings measured in the same run. Returns why it cannot, or None.

    Useful operations are those of the floor (3, 2 or 1 products of 2 N H V) for every provider. Bytes count inputs and
    gradients once.
    """
    try:
        import matplotlib
    except ImportError as error:
        return f"matplotlib is not installed: {error}"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "ms" in row and row.get("rates") and row["status"] == "ok"]
    if not timed:
        return "no provider was timed"
    timed = [row for row in timed if row["dtype"] == timed[0]["dtype"]]
    rates = timed[0]["rates"]
    figure, axes = pyplot.subplots(figsize=(9, 6))
    points: dict[str, list[tuple[float, float]]] = {}
    for row in timed:
        units, itemsize = MODES[row["mode"]], DTYPES[row["dtype"]].itemsize
        operations = 2.0 * units * row["N"] * row["H"] * row["V"]
        size = (row["N"] + row["V"]) * row["H"] * itemsize
        moved = size * {"train": 2, "frozen": 1, "score": 1}[row["mode"]]
        points.setdefault(row["provider"], []).append((operations / moved, operations / row["ms"] * 1e-9))
    reach = [x for values in points.values() for x, _ in values]
    xs = [min(reach) / 4, max(reach) * 2]
    ridge = rates["matmul_tflops"] * 1e3 / rates["copy_gb_per_s"]
    roof = sorted({*xs, ridge})
    heights = [min(rates["matmul_tflops"], x * rates["copy_gb_per_s"] / 1e3) for x in roof]
    axes.plot(
        roof, heights, "k-", label=f"measured: {rates['matmul_tflops']:.3g} TFLOP/s, {rates['copy_gb_per_s']:.4g} GB/s"
    )
    for marker, (name, values) in zip("o^sDvPX*<>hp8d+x1" * 2, points.items(), strict=False):
        axes.plot(*zip(*values, strict=True), marker, label=name, markersize=9 if name == "ours" else 6)
    axes.set(xscale="log", yscale="log", xlabel="useful operations per byte that must move", ylabel="useful TFLOP/s")
    axes.set_title(f"{timed[0]['device_name']}, {timed[0]['dtype']}, commit {timed[0]['commit']}")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None

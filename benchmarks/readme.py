"""README's table from the results: ``python -m benchmarks.readme`` after a new run, or with the files to take.

    python -m benchmarks.readme                              # the newest rows in benchmarks/results
    python -m benchmarks.readme benchmarks/results/A.jsonl   # these

A table for the CPU, from its newest run of the peers, and one for each GPU, from its newest run of ``benchmarks.gpu``:
bf16, forward and backward. Of rows measured more than once in a file, the last count. Only what stands between the two
markers of README.md changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Row, groups, ranking, read_rows
from benchmarks.runner import RESULTS, ROOT
from benchmarks.shapes import HEADS

BEGIN, END = "<!-- made by python -m benchmarks.readme -->", "<!-- up to here -->"
SUITES = {"cpu": "peers", "cuda": "gpu"}
MODELS = {  # the head's model, and whose vocabulary it is where it is measured with another H
    "gpt2": ("GPT-2", "GPT-2"),
    "qwen2.5-0.5b": ("Qwen2.5-0.5B", "Qwen2.5"),
    "llama-3.2-1b": ("Llama-3.2-1B", "Llama 3"),
    "llama-3.1-8b": ("Llama-3.1-8B", "Llama 3"),
    "gemma-2-2b": ("Gemma-2-2B", "Gemma 2"),
}
PEERS = {
    "naive": "eager",
    "naive-compiled": "torch.compile",
    "torch-lce": "torch linear CE",
    "liger-flce": "Liger fused CE",
    "liger-chunked": "Liger chunked",
    "liger-scaled-ce": "Liger scaled CE",
    "liger-dpo": "Liger DPO",
    "trl-chunked": "TRL chunked",
    "cce": "CCE",
    "cce-exact": "CCE, exact",
    "quack": "QuACK",
}
MODES = {"train": "trained", "frozen": "frozen"}


def place(row: Row) -> str | None:
    """Whose table a row belongs to: "cpu", a GPU's name, or None for a row that is in no table."""
    shown = row["dtype"] == "bf16" and row["mode"] in MODES and "date" in row
    if not shown or SUITES.get(row["device"]) != row["suite"]:
        return None
    return "cpu" if row["device"] == "cpu" else str(row["device_name"])


def newest(folder: Path) -> list[Path]:
    """The files that hold the newest timed row of each place, the CPU's first; those of tiny shapes do not count."""
    found: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.rglob("*.jsonl")):
        for row in [] if path.stem.endswith("-tiny") else read_rows(path):
            where = place(row)
            if where is not None and "ms" in row:
                found[where] = max(found.get(where, ("", path)), (row["date"], path))
    return list(dict.fromkeys(found[where][1] for where in sorted(found, key=lambda name: (name != "cpu", name))))


def last_run(group: Sequence[Row]) -> list[Row]:
    """The last row of each provider, of those that the group's last commit measured."""
    latest = {row["provider"]: row for row in group}
    commit = group[-1].get("commit")
    return [row for row in latest.values() if row.get("commit") == commit]


def tables(files: Sequence[Path]) -> str:
    """What stands between the markers.

    Raises:
        ValueError: a file without a row to show.
    """
    parts = []
    for path in files:
        rows = read_rows(path)
        places = list(dict.fromkeys(where for row in rows if (where := place(row)) is not None))
        if not places:
            raise ValueError(f"{path} has no bf16 row of the suites {', '.join(SUITES.values())}: nothing to show")
        for where in places:
            parts.append(
                _table([last_run(group) for group in groups(row for row in rows if place(row) == where)], path)
            )
    return "\n\n".join(parts)


def _table(cases: list[list[Row]], path: Path) -> str:
    cases = [case for case in cases if any("ms" in row for row in case)]
    lines = [[_label(case[0]), *_cells(case)] for case in cases]
    # A peer that takes part in one case of several says less than its column takes.
    enough = min(2, len(lines))
    peers = [i for i in range(len(PEERS)) if sum(bool(line[i + 2]) for line in lines) >= enough]
    kept = [0, 1, *(i + 2 for i in peers), len(PEERS) + 2]
    heading = ["head, tokens", "ours, ms", *PEERS.values(), "memory, ours / eager"]
    source = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path
    measured = [row for case in cases for row in case]
    commits = " and ".join(dict.fromkeys(row["commit"] for row in measured))
    caption = f"{measured[-1]['device_name']}, {measured[-1]['date'][:10]}, commit {commits} ([rows]({source}))"
    peaked = any(row["inputs"] == "peaked" for row in measured)
    caption += "; *peaked*: as certain as a trained model, otherwise nearly uniform." if peaked else "."
    body = [heading, ["---"] * len(heading), *lines]
    return "\n".join([caption, "", *(f"| {' | '.join(line[i] for i in kept)} |" for line in body)])


def _label(row: Row) -> str:
    head = HEADS[row["head"]]
    model, vocabulary = MODELS[row["head"]]
    words = [model] if row["H"] == head.H else [f"{vocabulary} vocabulary", f"H = {row['H']}"]
    words += ["softcap"] if row.get("softcap") else []
    words += [MODES[row["mode"]], str(row["N"])]
    K = row["S"] // row["G"] - 1
    words += [f"K = {K}"] if K != 11 else []
    return ", ".join(words + (["peaked"] if row["inputs"] == "peaked" else []))


def _cells(case: list[Row]) -> list[str]:
    """Ours in milliseconds; each peer over ours, the faster ones bold; the temporary memory of ours and of eager."""
    ranked = {row["provider"]: row for row in ranking(case)}
    by_name: dict[str, dict[str, Any]] = {row["provider"]: row for row in case}
    mine = ranked.get("ours")
    if mine is None:
        return ["not ranked", *("" for _ in PEERS), ""]
    cells = [f"{mine['ms']:.3g}"]
    for name in PEERS:
        ratio = ranked[name]["ms"] / mine["ms"] if name in ranked else None
        cells.append("" if ratio is None else f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}")
    memory = [by_name.get(name, {}).get("memory_bytes") for name in ("ours", "naive")]
    mebibytes = [f"{size / 2**20:.0f}" for size in memory if size is not None]
    return [*cells, " / ".join(mebibytes) + " MiB" if len(mebibytes) == 2 else ""]


def rewrite(readme: Path, text: str) -> None:
    """Puts ``text`` between the markers.

    Raises:
        ValueError: the markers are not there once each, in their order.
    """
    before = readme.read_text(encoding="utf-8")
    if before.count(BEGIN) != 1 or before.count(END) != 1 or before.index(BEGIN) > before.index(END):
        raise ValueError(f"{readme} needs the two markers, once each and in this order: {BEGIN} and {END}")
    head, tail = before.split(BEGIN)[0], before.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.readme", description="README's table from the results.")
    parser.add_argument("results", nargs="*", type=Path, help="files of rows (default: the newest there are)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args(argv)
    files = args.results or newest(RESULTS)
    if not files:
        parser.error(f"no results in {RESULTS}")
    rewrite(args.readme, tables(files))
    print(f"{args.readme}: from {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The loss benchmarks on this machine: ``python -m benchmarks`` runs every CPU suite in about 10 minutes on two cores.

    python -m benchmarks --suite errors       # loss and gradients against fp64 at odd sizes, beside eager's
    python -m benchmarks --suite cpu-loss     # time and memory against naive at N = 1536, H = 768, V = 50257
    python -m benchmarks --suite memory       # temporary memory at N = 3072 and 12288
    python -m benchmarks --suite peers        # every peer, ranked within one shared error bound

A suite named with ``--suite`` takes what time it needs up to ``--seconds``; see ``python -m benchmarks.gpu`` for a GPU.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from benchmarks.report import append_row, markdown, summary
from benchmarks.runner import RESULTS, run_cases
from benchmarks.suites import SECONDS, SUITES, cases_of

DEFAULT = ("errors", "cpu-loss", "memory", "peers")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Benchmarks of the fused D2O loss.")
    parser.add_argument("--suite", action="append", choices=list(SUITES), help="one suite (may be repeated)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether everything runs, not how fast")
    parser.add_argument("--seconds", type=float, help="time for each suite; each has its own default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for <date>-<suite>.jsonl and .md")
    args = parser.parse_args(argv)
    for suite in args.suite or DEFAULT:
        cases = cases_of(suite, args.device, args.tiny)
        name = f"{datetime.date.today()}-{suite}-{args.device}" + ("-tiny" if args.tiny else "")
        path = args.out / f"{name}.jsonl"
        rows = run_cases(cases, args.seconds or SECONDS[suite], lambda row, path=path: append_row(path, row))  # type: ignore[misc]
        table = markdown(rows, f"{suite} on {args.device}")
        path.with_suffix(".md").write_text(table)
        print(table + summary(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The loss benchmarks on this machine: ``python -m benchmarks`` runs every CPU suite in about 10 minutes on two cores.

    python -m benchmarks --suite errors       # loss and gradients against fp64 at odd sizes, beside eager's
    python -m benchmarks --suite cpu-loss     # time and memory beside naive at N = 1536, H = 768, V = 50257
    python -m benchmarks --suite memory       # temporary memory at N = 3072 and 12288
    python -m benchmarks --suite peers        # every peer, ranked within one shared error bound

A suite named with ``--suite`` runs for at most ``--seconds``. ``python -m benchmarks.gpu`` measures on a GPU.
Writes <date>-<suite>-<device>.jsonl and .md. Exits with 1 if one of our providers failed or is out of its error bound.
"""

from __future__ import annotations

import datetime

from benchmarks.loss_report import append_row, markdown, summary, wrong
from benchmarks.report import options
from benchmarks.runner import run_cases
from benchmarks.suites import SECONDS, SUITES, cases_of

DEFAULT = ("errors", "cpu-loss", "memory", "peers")


def main(argv: list[str] | None = None) -> int:
    parser = options("benchmarks", __doc__)
    parser.add_argument("--suite", action="append", choices=list(SUITES), help="one suite (may be repeated)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, help="time for each suite; each has its own default")
    args = parser.parse_args(argv)
    status = 0
    for suite in args.suite or DEFAULT:
        name = f"{datetime.date.today()}-{suite}-{args.device}" + ("-tiny" if args.dry_run else "")
        path = args.out / f"{name}.jsonl"
        cases = cases_of(suite, args.device, args.dry_run)
        rows = run_cases(cases, args.seconds or SECONDS[suite], lambda row, path=path: append_row(path, row))  # type: ignore[misc]
        lines = markdown(rows, f"{suite} on {args.device}", args.dry_run)
        path.with_suffix(".md").write_text("\n".join(lines))
        print("\n".join([*lines, summary(rows)]))
        status = 1 if wrong(rows) else status
    return status


if __name__ == "__main__":
    raise SystemExit(main())

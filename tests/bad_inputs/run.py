"""Measures the answers to bad inputs: prints a table by kind, and every input that was not answered well.

    python tests/bad_inputs/run.py [--kind data,stores] [--seed 0] [--sample 5] [--json FILE] [--jobs 2]

The inputs are made by the rules of the ``cases_*.py``; another seed makes other members of each kind. Verdicts:

    clear      refused, and the message names the file or setting in a few lines
    accepted   an odd input that is right, with the right result
    traceback  an exception other than D2OError
    silent     accepted although it is wrong, or refused although it is right
    vague      refused in a message that does not name the file or setting, is long, or holds control characters
    hung       over the limit of time; died: ended by a signal, as without memory
    left       a file was changed, or a part of one was left behind
    broken     a fault of the case itself

The exit code is 0 if all inputs are clear or accepted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# Nothing is fetched; one thread, since the processes are forks.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
)

import good as good_inputs
from case import Case, some
from verdict import RIGHT, VERDICTS, Result, run_all

FAMILIES = {  #: kind -> module.function that makes its cases
    "data": "cases_data.cases",
    "yaml": "cases_settings.yaml_cases",
    "flags": "cases_settings.flag_cases",
    "settings from Python": "cases_settings.python_cases",
    "Python arguments": "cases_python.cases",
    "models": "cases_models.cases",
    "adapters": "cases_models.adapter_cases",
    "stores": "cases_stores.cases",
    "checkpoints": "cases_checkpoints.cases",
    "resumed settings": "cases_checkpoints.resumed_cases",
    "trained models": "cases_checkpoints.trained_cases",
    "server": "cases_server.cases",
    "output and disk": "cases_output.cases",
    "user code": "cases_user.cases",
}


def collect(kinds: list[str], seed: int, sample: int | None, good: Path) -> list[Case]:
    """The cases of these kinds; at most ``sample`` of each."""
    found = []
    for kind in kinds:
        module, _, function = FAMILIES[kind].partition(".")
        chance = random.Random(f"{seed} {kind}")
        cases = list(getattr(importlib.import_module(module), function)(chance, good))
        twice = [name for name, count in Counter(case.name for case in cases).items() if count > 1]
        assert not twice, f"{kind}: names of several cases: {twice[:5]}"
        assert all(case.kind == kind for case in cases), kind
        found += cases if sample is None else some(chance, cases, sample)
    return found


def table(results: list[Result]) -> str:
    """The verdicts by kind, in Markdown."""
    lines = ["| kind | tried | " + " | ".join(VERDICTS) + " |", "|---|" + "---|" * (len(VERDICTS) + 1)]
    kinds = list(dict.fromkeys(result.case.kind for result in results))
    for kind in (*kinds, "**all**"):
        found = Counter(result.verdict for result in results if kind in (result.case.kind, "**all**"))
        lines.append(f"| {kind} | {found.total()} | " + " | ".join(str(found[v] or "") for v in VERDICTS) + " |")
    right = sum(result.verdict in RIGHT for result in results)
    return "\n".join([*lines, "", f"clear or rightly accepted: {right} of {len(results)} ({right / len(results):.1%})"])


def _make_good(good: Path, names: Path) -> None:
    good_inputs.make(good)
    names.write_text(json.dumps(sorted(sys.modules)))


def _warm(names: Path) -> None:
    """Imports all that the good runs imported, so that no case has to."""
    for name in json.loads(names.read_text()):
        try:
            importlib.import_module(name)
        except Exception:
            continue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", help=f"some of these, with commas: {', '.join(FAMILIES)}")
    parser.add_argument("--name", default="", help="only cases with this text in their names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, help="at most so many cases of each kind")
    parser.add_argument("--json", type=Path, help="a file for one line per case")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    kinds = arguments.kind.split(",") if arguments.kind else list(FAMILIES)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as name:
        work = Path(name).resolve()
        work.chmod(0o755)
        os.environ["HF_HOME"] = str(work / "hub")
        good, names, log = work / "good", work / "modules.json", (work / "log").open("wb")
        kept = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        child = multiprocessing.get_context("fork").Process(target=_make_good, args=(good, names))
        child.start()
        child.join()
        if child.exitcode == 0:
            _warm(names)
        sys.stdout.flush(), os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        if child.exitcode:
            print((work / "log").read_text()[-3000:])
            return 1
        cases = collect(kinds, arguments.seed, arguments.sample, good)
        cases = [case for case in cases if arguments.name in case.name]
        print(f"{len(cases)} cases; ready after {time.monotonic() - started:.0f} s", file=sys.stderr)
        (work / "cases").mkdir()
        results = run_all(cases, good, work / "cases", arguments.jobs, _report)
    results.sort(key=lambda result: cases.index(result.case))
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(_record(result)) + "\n" for result in results))
    print(table(results))
    print(f"{time.monotonic() - started:.0f} s, {arguments.jobs} at a time, seed {arguments.seed}")
    wrong = [result for result in results if result.verdict not in RIGHT]
    for result in wrong:
        lines = result.found.strip().splitlines() or [""]
        found = lines[-1 if result.verdict == "broken" else 0][:200]
        line = f"- {result.case.kind}, {result.case.name}: {result.verdict}: {found}"
        print("".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line))
    return bool(wrong)


def _report(result: Result) -> None:
    if sys.stderr.isatty():
        print(f"{result.verdict:<10}{result.seconds:5.1f} s  {result.case.kind}, {result.case.name}", file=sys.stderr)


def _record(result: Result) -> dict[str, object]:
    about = {"kind": result.case.kind, "name": result.case.name, "verdict": result.verdict}
    return {**about, "seconds": round(result.seconds, 2), "found": result.found[:2000]}


if __name__ == "__main__":
    sys.exit(main())

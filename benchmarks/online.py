"""The online study: when to draw anchors anew, and how taut to hold the leash, in the demo's language.

    python -m benchmarks.online                   # five seeds, some five hours on two idle cores
    python -m benchmarks.online --part schedules  # the schedules alone
    python -m benchmarks.online --quick           # one seed, a few steps: shows that it runs

*Schedules*: anchors frozen, drawn anew every three epochs, every epoch or every step (``refresh_every``), each without
and with ``anchor_weight``, at the demo's learning rate and steps. *Region*: one setting at a time is moved away from
the frozen and from the refreshed run. *Corners*: all of them at once, from the refreshed run, to the ends of what the
region found good: half of the 32 corners, so chosen that any two settings are seen in all four combinations equally
often, and eight more with the usual ``alpha``. Every run is watched on held-out prompts every ``LOOK`` steps: what
counts is the worst moment too, not only the end.

Writes ``online-study.json`` (every run), ``.md`` (tables) and ``.png`` under ``benchmarks/results``. A run that is
there already is not made again, so that the study can be stopped and continued.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from benchmarks import toy
from benchmarks.runner import commit
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.config import D2OConfig
from d2o_fast.demo.report import Shares
from d2o_fast.demo.run import d2o_curve, judged, versions
from d2o_fast.model.loading import load_tokenizer
from d2o_fast.training.metrics import read_log
from d2o_fast.training.trainer import D2OTrainer

matplotlib.use("Agg")  # no window
LOOK = 10  #: steps between two looks at the held-out prompts
#: 97.5 % quantile of Student's t for n - 1 degrees of freedom, by n
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a run changes in the demo's settings."""

    refresh_every: int = 0  #: steps; 0: frozen
    anchor_weight: float = 0.0
    alpha: float = 0.1
    beta: float = 0.1
    learning_rate: float = 1e-3

    def label(self) -> str:
        return f"{_schedule(self.refresh_every)}, anchor_weight {self.anchor_weight:g}"

    def __str__(self) -> str:
        return f"{self.label()}, alpha {self.alpha:g}, beta {self.beta:g}, learning rate {self.learning_rate:g}"


EPOCH = 20  #: steps of an epoch in the demo, about
SCHEDULES = [Variant(every, weight) for every in (0, 3 * EPOCH, EPOCH, 1) for weight in (0.0, 0.005, 0.05)]
CENTRES = (Variant(0, 0.005), Variant(3 * EPOCH, 0.05))  #: frozen as in the demo, and refreshed
MOVES: dict[str, tuple[float, ...]] = {
    "learning_rate": (3e-4, 3e-3),
    "alpha": (0.03, 0.3),
    "beta": (0.03, 0.3, 1.0),
    "anchor_weight": (0.02, 0.1, 0.2),
}
REGION = [
    *(dataclasses.replace(c, **{name: x}) for name, values in MOVES.items() for c in CENTRES for x in values),  # type: ignore[arg-type]
    *(dataclasses.replace(CENTRES[1], refresh_every=every) for every in (2 * EPOCH, 6 * EPOCH)),
]
#: The ends between which each setting, moved alone, leaves the refreshed run good.
ENDS = {
    "refresh_every": (2 * EPOCH, 6 * EPOCH),
    "anchor_weight": (0.02, 0.2),
    "alpha": (0.03, 0.3),
    "beta": (0.03, 0.3),
    "learning_rate": (3e-4, 1e-3),
}
#: Those with an even number of upper ends.
CORNERS = [
    Variant(**{name: ends[high] for (name, ends), high in zip(ENDS.items(), corner, strict=True)})  # type: ignore[arg-type]
    for corner in itertools.product((0, 1), repeat=len(ENDS))
    if sum(corner) % 2 == 0
]
#: And those with the usual alpha in place of the lower one, which is what matters most.
CORNERS += [dataclasses.replace(v, alpha=CENTRES[1].alpha) for v in CORNERS if v.alpha == ENDS["alpha"][0]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.online", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="default: 1 to 5")
    parser.add_argument("--part", choices=("schedules", "region", "corners", "all"), default="all")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each; default: 2")
    parser.add_argument("--quick", action="store_true", help="one seed, two variants and hardly any training")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    study, variants = toy.Study(seeds=tuple(args.seeds)), {"schedules": SCHEDULES, "region": REGION, "corners": CORNERS}
    if args.quick:
        study = toy.Study((args.seeds[0],), (1e-3,), (2, 4), 60, (20, 20), 30, 1, (1e-3, 12))
        variants = {"schedules": [Variant(), Variant(4, 0.05)], "region": [], "corners": []}
    os.environ["TQDM_DISABLE"] = "1"  # for the processes below: hundreds of progress bars
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "online-study.json"
    report = _begin(path, study, args.jobs)
    parts = variants if args.part == "all" else {args.part: variants[args.part]}
    wanted = [(v, s) for part in parts.values() for s in study.seeds for v in part]
    with tempfile.TemporaryDirectory() as folder:
        _run(report, wanted, study, Path(folder), args.jobs, path)
    table = markdown(report)
    path.with_suffix(".md").write_text(table)
    plot(report, path.with_suffix(".png"))
    print(f"\n{table}\nWritten to {path.with_suffix('')}.json, .md and .png")
    return 0


def _begin(path: Path, study: toy.Study, jobs: int) -> dict[str, Any]:
    """The report so far, if it is one of the same study."""
    settings = json.loads(json.dumps(dataclasses.asdict(study)))
    if path.exists():
        report: dict[str, Any] = json.loads(path.read_text())
        same = {**report["study"], "seeds": None} == {**settings, "seeds": None}
        if same and report["versions"] == versions():
            return report
    machine = f"{os.uname().machine}, {jobs} processes of one thread"
    return {"versions": versions(), "machine": machine, "study": settings, "runs": []}


def _run(
    report: dict[str, Any],
    wanted: Sequence[tuple[Variant, int]],
    study: toy.Study,
    folder: Path,
    jobs: int,
    path: Path,
) -> None:
    done = {(Variant(**run["variant"]), run["seed"]) for run in report["runs"]}
    tasks = [task for task in wanted if task not in done]
    seeds = sorted({seed for _, seed in tasks})
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=toy.start_process) as pool:
        before = dict(zip(seeds, pool.map(toy.prepare, [(s, folder, study) for s in seeds]), strict=True))
        futures = [pool.submit(train, v, s, folder / f"seed-{s}", study) for v, s in tasks]
        for future in as_completed(futures):
            run = future.result()
            run["curve"].insert(0, (0, before[run["seed"]]))
            report["runs"].append(run)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(_as_text(report))
            os.replace(temporary, path)
            print(f"seed {run['seed']}, {Variant(**run['variant'])}: {_percent(run['curve'][-1][1])}", flush=True)


def _as_text(report: dict[str, Any]) -> str:
    """As JSON, one line for each run."""
    head = json.dumps({name: value for name, value in report.items() if name != "runs"})
    runs = ",\n".join(json.dumps(run) for run in report["runs"])
    return f'{head[:-1]}, "runs": [\n{runs}\n]}}\n'


def train(variant: Variant, seed: int, folder: Path, study: toy.Study) -> dict[str, Any]:
    """One run from the seed's model and anchors; shares on the held-out prompts every ``LOOK`` steps."""
    started = time.time()
    settings = toy.demo_settings(folder)
    settings |= {**dataclasses.asdict(variant), "max_steps": study.fixed[1], "eval_steps": LOOK}
    settings |= {"refresh_strategy": "steps", "judge_num_generations": study.generations, "logging_steps": LOOK}
    with tempfile.TemporaryDirectory(dir=folder) as output_dir:
        config = D2OConfig(**{**settings, "output_dir": output_dir})
        rows, tokenizer = toy.rows_of(folder, "held_out"), load_tokenizer(config)
        anchors = AnchorStore.open(folder / "d2o" / "anchors" / "train")
        trainer = D2OTrainer(config.model_name_or_path, config, anchors, rows, tokenizer)
        trainer.train()
        log = read_log(Path(output_dir) / "metrics.jsonl")
        last = judged(trainer.model, tokenizer, rows, config)
    curve: list[tuple[int, Shares]] = [point for point in d2o_curve(log) if 0 < point[0] < config.max_steps]
    return {
        "variant": dataclasses.asdict(variant),
        "seed": seed,
        "commit": commit(),
        "curve": [*curve, (config.max_steps, last)],
        "margins": [(r["step"], r["rewards/margins"]) for r in log if "rewards/margins" in r],
        "seconds": round(time.time() - started, 1),
    }


# --- Tables and plot -------------------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    """The study's tables."""
    runs, study = report["runs"], report["study"]
    steps = study["fixed"][1]
    groups = grouped(runs)
    seeds = sorted({run["seed"] for run in runs})
    before = [round(100 * run["curve"][0][1]["harmful"], 1) for run in runs]
    lines = [
        "# Online study",
        "",
        f"Percent of {study['generations']} responses to each of {study['held_out_prompts'][1]} held-out prompts after "
        f"{steps} steps (about {steps // EPOCH} epochs), K = 11; what is not said is as in the demo. Before training: "
        f"{_range(before)}% harmful.",
        "",
        "Mean with its 95% interval (Student's t over seeds), then the worst seed. *On the way*: the worst of all "
        f"looks (every {LOOK} steps) of all seeds; *late* leaves out the first quarter of the steps.",
        "",
        f"## Schedules, {len(seeds)} seeds ({', '.join(map(str, seeds))}), alpha = beta = 0.1",
        "",
        *_table(groups, SCHEDULES, "schedule, anchor_weight", Variant.label),
    ]
    for title, variants in (
        ("Region: one setting moved at a time", REGION),
        ("Corners: all settings moved at once", CORNERS),
    ):
        numbers = {len(groups[v]) for v in variants if v in groups}
        if numbers:
            title += f", {_range(numbers)} seeds"
            lines += ["", f"## {title}", "", *_table(groups, [*CENTRES, *variants], "variant", str)]
    if all(v in groups for v in CORNERS):
        lines += ["", "Means over the corners with each value of a setting:", ""]
        lines += _effects(groups)
    used = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    commits = Counter(run["commit"] for run in runs)
    made = ", ".join(f"{name} ({number} runs)" for name, number in commits.items())
    seconds = sum(run["seconds"] for run in runs)
    lines += [
        "",
        f"Commit {made}; {used}; {report['machine']}; {seconds / 60:.0f} minutes of one core.",
        "",
    ]
    return "\n".join(lines)


def grouped(runs: Sequence[dict[str, Any]]) -> dict[Variant, list[dict[str, Any]]]:
    """The runs of each variant, by seed."""
    groups: dict[Variant, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        groups.setdefault(Variant(**run["variant"]), []).append(run)
    return groups


def _table(
    groups: dict[Variant, list[dict[str, Any]]], variants: Sequence[Variant], title: str, name: Any
) -> list[str]:
    lines = [
        f"| {title} | harmful (worst) | helpful (worst) | garbage (worst) | most harmful, late | "
        "least helpful on the way | most garbage on the way |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(variants):
        if variant not in groups:
            continue
        runs = groups[variant]
        cells = [name(variant)]
        for label, worst in (("harmful", max), ("helpful", min), ("garbage", max)):
            values = [100 * run["curve"][-1][1][label] for run in runs]
            spread = f" ± {interval(values):.1f}" if len(values) > 2 else ""  # of two values it says nothing
            cells.append(f"{statistics.mean(values):.1f}{spread} ({worst(values):.1f})")
        last = runs[0]["curve"][-1][0]
        looks = [(step, shares) for run in runs for step, shares in run["curve"] if step > 0]
        cells.append(f"{max(100 * shares['harmful'] for step, shares in looks if step >= last / 4):.1f}")
        cells.append(f"{min(100 * shares['helpful'] for _, shares in looks):.1f}")
        cells.append(f"{max(100 * shares['garbage'] for _, shares in looks):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _effects(groups: dict[Variant, list[dict[str, Any]]]) -> list[str]:
    lines = ["| setting | value | harmful | helpful | garbage |", "|---|---|---|---|---|"]
    for name in ENDS:
        for value in sorted({getattr(v, name) for v in CORNERS}):
            ends = [r["curve"][-1][1] for v in CORNERS if getattr(v, name) == value for r in groups[v]]
            means = (statistics.mean(shares[label] for shares in ends) for label in ("harmful", "helpful", "garbage"))
            lines.append(f"| {name} | {value:g} | {' | '.join(f'{100 * mean:.1f}' for mean in means)} |")
    return lines


def interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95% interval; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def plot(report: dict[str, Any], path: Path) -> None:
    """Shares over steps of every schedule: a line for the mean of the seeds, a band from the lowest to the highest."""
    groups = grouped(report["runs"])
    shown = [variant for variant in SCHEDULES if variant in groups] or list(groups)
    columns = list(dict.fromkeys(variant.refresh_every for variant in shown))
    rows = list(dict.fromkeys(variant.anchor_weight for variant in shown))
    figure, axes = pyplot.subplots(
        len(rows), len(columns), figsize=(3.2 * len(columns), 2.4 * len(rows)), sharex=True, sharey=True, squeeze=False
    )
    for variant in shown:
        axis = axes[rows.index(variant.anchor_weight)][columns.index(variant.refresh_every)]
        runs = groups[variant]
        for label, colour in (("harmful", "tab:red"), ("helpful", "tab:green"), ("garbage", "tab:gray")):
            curves = [[100 * shares[label] for _, shares in run["curve"]] for run in runs]
            steps = [step for step, _ in runs[0]["curve"]]
            values = list(zip(*curves, strict=True))
            axis.plot(steps, [statistics.mean(v) for v in values], color=colour, label=label, linewidth=1.5)
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2)
        axis.set_title(variant.label(), fontsize=8)
        axis.set_ylim(0, 100)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("step")
    figure.supylabel("% of responses (line: mean of seeds; band: lowest to highest)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _schedule(refresh_every: int) -> str:
    if not refresh_every:
        return "frozen"
    return "always fresh" if refresh_every == 1 else f"every {refresh_every} steps"


def _percent(shares: Shares) -> str:
    return ", ".join(f"{100 * share:.1f}% {label}" for label, share in shares.items())


def _range(values: Iterable[Any]) -> str:
    found = sorted(set(values))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


if __name__ == "__main__":
    raise SystemExit(main())

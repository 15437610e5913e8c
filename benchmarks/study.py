"""The study in the demo's language: D2O beside its neighbours, and D2O's settings against each other.

    python -m benchmarks.study methods      # three seeds, about 10 minutes on two idle cores
    python -m benchmarks.study settings     # anchors frozen or redrawn, three leashes; five seeds, about an hour
    python -m benchmarks.study settings --refresh_every 60 --anchor_weight 0.05 --alpha 0.03 0.1 0.3

For each seed a model is trained as in ``d2o demo``. *methods*: every method tries every pair of learning rate and
number of steps of one grid, then runs again with the pair whose "helpful minus harmful" on the validation prompts is
highest. One more row is D2O with the demo's setting. *settings*: one run for every combination of the given values;
learning rate and steps default to the demo's. Every run is judged on the test prompts every ``LOOK`` steps, because
the worst moment counts too. No training step sees validation or test prompts, and they do not overlap.

Writes study-<part>.json (every run) and .md, and a plot of the settings. Stored runs are kept, so that the study can be
stopped and continued.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from matplotlib import pyplot
from transformers.utils import logging as transformers_logging

from benchmarks.report import about_this_run, commit, heading, options, place, save, table
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.cli import main as d2o
from d2o_fast.config import DEFAULTS, D2OConfig
from d2o_fast.data.reading import read_rows
from d2o_fast.demo import world
from d2o_fast.demo.model import build_tokenizer, pretrain
from d2o_fast.demo.report import Shares
from d2o_fast.demo.run import BASELINES, FULL, d2o_curve, judged, train_baseline, write_config
from d2o_fast.model.loading import load_model, load_tokenizer
from d2o_fast.training.metrics import read_log
from d2o_fast.training.trainer import D2OTrainer

matplotlib.use("Agg")  # no window
LOOK = 10  #: steps between two evaluations on the test prompts
SEEDS = {"methods": [1, 2, 3], "settings": [1, 2, 3, 4, 5]}
PAPER = {"anchor_weight": 0.0, "refresh_every": 0}  #: the paper's loss, anchors drawn once
#: settings that a run without held-out data does not take
HELD_OUT = ("eval_dataset_name", "per_device_eval_batch_size", "judge_num_generations")
#: An epoch has about 20 steps. The demo refreshes every 60 steps and has an anchor_weight of 0.05.
GRID: dict[str, tuple[float, ...]] = {
    "refresh_every": (0, 60, 20, 1),
    "anchor_weight": (0.0, 0.005, 0.05),
    "alpha": (0.1,),
    "beta": (0.1,),
    "learning_rate": (1e-3,),
}
#: 97.5 % quantile of Student's t for n - 1 degrees of freedom, by n
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a study; ``fixed``: learning rate and steps of the demo."""

    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    num_steps: tuple[int, ...] = (20, 80, 320)
    train_prompts: int = FULL.train_prompts
    held_out_prompts: tuple[int, int] = (60, FULL.test_prompts)  #: validation, test
    pretrain_steps: int = FULL.pretrain_steps
    generations: int = 4  #: responses per validation or test prompt
    fixed: tuple[float, int] = (1e-3, 320)


TINY = Sizes((1e-3,), (2, 4), 60, (20, 20), 30, 1, (1e-3, 12))


@dataclasses.dataclass(frozen=True)
class Job:
    """One row of the table on one seed. ``choose``: learning rate and steps come from the grid."""

    name: str
    seed: int
    method: str  #: "d2o" or one of ``BASELINES``
    settings: dict[str, Any]  #: differences from the demo's
    choose: bool = False


def method_jobs(seeds: Sequence[int], sizes: Sizes) -> list[Job]:
    fixed = {"learning_rate": sizes.fixed[0], "max_steps": sizes.fixed[1]}
    rows: list[tuple[str, str, dict[str, Any], bool]] = [("D2O, the paper's loss", "d2o", PAPER, True)]
    rows.append(("D2O, the demo's fixed setting", "d2o", fixed, False))
    rows += [(name, method, {}, True) for method, (name, _) in BASELINES.items()]
    return [Job(name, seed, method, settings, choose) for name, method, settings, choose in rows for seed in seeds]


def setting_jobs(seeds: Sequence[int], sizes: Sizes, grid: dict[str, Sequence[float]]) -> list[Job]:
    jobs = []
    for values in itertools.product(*grid.values()):
        settings: dict[str, Any] = dict(zip(grid, values, strict=True))
        schedule = {0: "frozen", 1: "always fresh"}.get(settings["refresh_every"])
        words = [schedule or f"every {settings['refresh_every']} steps", f"anchor_weight {settings['anchor_weight']:g}"]
        words += [f"{name} {settings[name]:g}" for name in list(GRID)[2:] if settings[name] != GRID[name][0]]
        settings |= {"refresh_strategy": "steps", "max_steps": sizes.fixed[1]}
        jobs += [Job(", ".join(words), seed, "d2o", settings) for seed in seeds]
    return jobs


# --- The runs ---------------------------------------------------------------------------------------------------------


def start_process() -> None:
    """Sets one thread and no progress bars: with so small a model more threads only wait for each other."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    transformers_logging.disable_progress_bar()


def prepare(seed: int, folder: Path, sizes: Sizes) -> Shares:
    """Makes model, feedback and anchors of one seed like the demo; returns the model's shares on the test prompts."""
    folder.mkdir()
    split = world.make_world(seed, sizes.train_prompts, *sizes.held_out_prompts)
    tokenizer = build_tokenizer()
    model = pretrain(tokenizer, split.train, seed, num_steps=sizes.pretrain_steps)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, pairs in (("feedback", split.train), ("validation", split.validation), ("held_out", split.test)):
        world.write_jsonl(folder / f"{name}.jsonl", world.feedback_rows(pairs, random.Random(seed)))
    write_config(folder, seed, FULL)
    if (status := d2o(["sample", str(folder / "d2o.yaml")])) != 0:
        raise RuntimeError(f"d2o sample ended with status {status}")
    logging.getLogger("d2o_fast").setLevel(logging.WARNING)  # the command raised it
    config = config_of(folder, sizes, {}, watch=False)
    return judged(model, tokenizer, read_rows(str(folder / "held_out.jsonl")), config)


def config_of(folder: Path, sizes: Sizes, settings: dict[str, Any], watch: bool) -> D2OConfig:
    """The demo's settings of one seed with this run's own; ``judge`` and ``eval_steps`` only if ``watch``."""
    demo: dict[str, Any] = yaml.safe_load((folder / "d2o.yaml").read_text())
    demo |= {"judge_num_generations": sizes.generations, "eval_steps": LOOK if watch else 0, **settings}
    if not watch:
        del demo["judge"]
    if not demo["refresh_every"]:
        del demo["refresh_strategy"]
    return D2OConfig(**demo)


def run_job(job: Job, folder: Path, sizes: Sizes) -> Run:
    """Chooses learning rate and steps on the validation prompts if asked to, then runs watched on the test prompts."""
    started, settings, grid = time.time(), dict(job.settings), list[dict[str, Any]]()
    if job.choose:
        for rate, steps in itertools.product(sizes.learning_rates, sizes.num_steps):
            point = {"learning_rate": rate, "max_steps": steps}
            shares, _ = train(job, {**settings, **point}, folder, sizes, "validation", watch=False)
            grid.append({**point, "validation": shares})
        best = max(grid, key=lambda run: run["validation"]["helpful"] - run["validation"]["harmful"])
        settings |= {name: best[name] for name in ("learning_rate", "max_steps")}
    shares, curve = train(job, settings, folder, sizes, "held_out", watch=True)
    curve = [*(point for point in curve if 0 < point[0] < settings["max_steps"]), (settings["max_steps"], shares)]
    made = {"commit": commit(), "seconds": round(time.time() - started, 1)}
    return {"name": job.name, "seed": job.seed, "settings": settings, "grid": grid, "curve": curve, **made}


def train(
    job: Job, settings: dict[str, Any], folder: Path, sizes: Sizes, split: str, watch: bool
) -> tuple[Shares, list[tuple[int, Shares]]]:
    """Trains once from the seed's model; returns (shares on ``split`` at the end, shares on it during the run)."""
    config = config_of(folder, sizes, settings, watch)
    rows, tokenizer = read_rows(str(folder / f"{split}.jsonl")), load_tokenizer(config)
    if job.method != "d2o":
        model = load_model(config)
        feedback = [json.loads(line) for line in (folder / "feedback.jsonl").read_text().splitlines()]
        curve = train_baseline(job.method, model, tokenizer, feedback, rows, config)
        return judged(model, tokenizer, rows, config), curve
    with tempfile.TemporaryDirectory(dir=folder) as output_dir:
        unused: dict[str, Any] = {} if watch else {name: DEFAULTS[name] for name in HELD_OUT}
        args = dataclasses.replace(config, output_dir=output_dir, **unused)
        anchors = AnchorStore.open(folder / "d2o" / "anchors" / "train")
        trainer = D2OTrainer(config.model_name_or_path, args, anchors, rows if watch else None, tokenizer)
        trainer.train()
        curve = d2o_curve(read_log(Path(output_dir) / "metrics.jsonl")) if watch else []
        return judged(trainer.model, tokenizer, rows, config), curve


def run_all(jobs: Sequence[Job], sizes: Sizes, processes: int, path: Path, dry_run: bool) -> tuple[list[Run], str]:
    """Returns (every run, the report). Runs in ``path``.json are kept if they have the same sizes and versions."""
    about, runs, text = about_this_run("cpu"), list[Run](), ""
    written, same = path.with_name(f"{path.name}.json"), json.loads(json.dumps(dataclasses.asdict(sizes)))
    if written.exists():
        before = json.loads(written.read_text())
        runs = before["runs"] if (before["sizes"], before["about"]["versions"]) == (same, about["versions"]) else []
    order = {name: i for i, name in enumerate(dict.fromkeys(job.name for job in jobs))}
    done = {(run["name"], run["seed"]) for run in runs}
    jobs = [job for job in jobs if (job.name, job.seed) not in done]
    seeds = sorted({job.seed for job in jobs})
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(processes, mp_context=context, initializer=start_process) as pool,
    ):
        folders = {seed: Path(name) / str(seed) for seed in seeds}
        untrained = pool.map(prepare, seeds, folders.values(), [sizes] * len(seeds))
        before_training = dict(zip(seeds, untrained, strict=True))
        for future in as_completed([pool.submit(run_job, job, folders[job.seed], sizes) for job in jobs]):
            run = future.result()
            run["curve"].insert(0, (0, before_training[run["seed"]]))
            runs.append(run)
            runs.sort(key=lambda run: order.get(run["name"], len(order)))
            text = save(path, markdown(runs, about, sizes, dry_run), about, sizes=same, runs=runs)
            last = ", ".join(f"{100 * share:.1f}% {label}" for label, share in run["curve"][-1][1].items())
            print(f"seed {run['seed']}, {run['name']}: {last} ({run['seconds']:.0f} s)", flush=True)
    return runs, text or save(path, markdown(runs, about, sizes, dry_run), about, sizes=same, runs=runs)


# --- Table and plot ---------------------------------------------------------------------------------------------------


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each row, by seed."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        groups.setdefault(run["name"], []).append(run)
    return groups


def interval(values: Sequence[float]) -> str:
    """Half the width of the mean's 95% interval; empty for fewer than three values."""
    if len(values) < 3:
        return ""
    return f" ± {STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def markdown(runs: Sequence[Run], about: dict[str, Any], sizes: Sizes, dry_run: bool) -> list[str]:
    rows = []
    for name, group in grouped(runs).items():
        cells = [name]
        for label, worst in (("harmful", max), ("helpful", min), ("garbage", max)):
            values = [100 * run["curve"][-1][1][label] for run in group]
            cells.append(f"{statistics.mean(values):.1f}{interval(values)} ({worst(values):.1f})")
        looks = [(step / run["curve"][-1][0], shares) for run in group for step, shares in run["curve"] if step > 0]
        cells.append(f"{max(100 * shares['harmful'] for part, shares in looks if part >= 0.25):.1f}")
        cells.append(f"{min(100 * shares['helpful'] for _, shares in looks):.1f}")
        cells.append(f"{max(100 * shares['garbage'] for _, shares in looks):.1f}")
        chosen = (f"{r['settings']['learning_rate']:g}, {r['settings']['max_steps']}" for r in group)
        rows.append([*cells, "; ".join(dict.fromkeys(chosen))])
    columns = "run | harmful (worst) | helpful (worst) | garbage (worst) | most harmful, late | "
    columns += "least helpful on the way | most garbage on the way | learning rate, steps"
    before = sorted(100 * run["curve"][0][1]["harmful"] for run in runs)
    return [
        *heading("A study in the demo's language", about, dry_run),
        f"Percent of {sizes.generations} responses to each of {sizes.held_out_prompts[1]} held-out prompts. Before "
        f"training {before[0]:.1f} to {before[-1]:.1f}% are harmful. Mean over seeds "
        f"({', '.join(map(str, sorted({run['seed'] for run in runs})))}) with its 95% interval (Student's t), then the "
        f"worst seed. *On the way*: the worst of all looks, every {LOOK} steps, of all seeds; *late* leaves out the "
        f"first quarter. Where a method chooses: learning rates {', '.join(f'{x:g}' for x in sizes.learning_rates)}, "
        f"steps {', '.join(map(str, sizes.num_steps))}. The rest is as in the demo; a third of the positives of DPO "
        "and SFT are abusive.",
        "",
        *table(columns, rows),
        "",
        f"{sum(run['seconds'] for run in runs) / 60:.0f} minutes of one core.",
    ]


def plot(runs: Sequence[Run], path: Path) -> None:
    """Plots shares over steps, one panel per row: a line for the mean of the seeds, a band from lowest to highest."""
    groups = grouped(runs)
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    size = (3.2 * columns, 2.4 * rows)
    figure, axes = pyplot.subplots(rows, columns, squeeze=False, figsize=size, sharex=True, sharey=True)
    for axis, (name, group) in zip(axes.flat, groups.items(), strict=False):
        for label, colour in (("harmful", "tab:red"), ("helpful", "tab:green"), ("garbage", "tab:gray")):
            steps = [step for step, _ in group[0]["curve"]]
            values = list(zip(*([100 * shares[label] for _, shares in run["curve"]] for run in group), strict=True))
            axis.plot(steps, [statistics.mean(v) for v in values], color=colour, label=label, linewidth=1.5)
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2)
        axis.set_title(name, fontsize=8)
        axis.set_ylim(0, 100)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("step")
    figure.supylabel("% of responses (line: mean of seeds; band: lowest to highest)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=60)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = options("benchmarks.study", __doc__)
    parser.add_argument("part", choices=list(SEEDS))
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 1 to 3 for methods, 1 to 5 for settings")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each; default: 2")
    for name, values in GRID.items():
        kind = int if name == "refresh_every" else float
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=values, help=f"default: {values}")
    args = parser.parse_args(argv)
    os.environ["TQDM_DISABLE"] = "1"  # the processes below would print hundreds of progress bars
    seeds, sizes = args.seeds or SEEDS[args.part], TINY if args.dry_run else Sizes()
    grid = {name: getattr(args, name) for name in GRID}
    jobs = method_jobs(seeds, sizes) if args.part == "methods" else setting_jobs(seeds, sizes, grid)
    path = place(args.out, f"study-{args.part}", "cpu", args.dry_run)
    runs, text = run_all(jobs, sizes, args.processes, path, args.dry_run)
    if args.part == "settings":
        plot(runs, path.with_name(f"{path.name}.png"))
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

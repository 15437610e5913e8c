"""The toy study: D2O and its neighbours on the demo's language, every method with its own best settings.

    python -m benchmarks.toy                    # three seeds, about 10 minutes on two idle cores
    python -m benchmarks.toy --quick            # one seed, a tiny grid: shows that it runs

For each seed a model is trained as in ``d2o demo``. Every method then tries every pair of learning rate and number of
steps of one grid; the pair with the highest "helpful minus harmful" on the validation prompts is taken and run again
with a look at the test prompts on the way. Validation and test prompts are combinations that no training step saw,
and they do not overlap. D2O runs through ``D2OTrainer`` with anchors from ``d2o sample``, the others through
``examples/baselines.py``. One row more is D2O with the demo's fixed setting, which looks at no validation prompts.

Writes ``toy-study.json`` (every run) and ``toy-study.md`` (the table) under ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.utils import logging as transformers_logging

from benchmarks.runner import commit
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.cli import main as d2o
from d2o_fast.config import D2OConfig
from d2o_fast.data.reading import read_rows
from d2o_fast.data.row import Row
from d2o_fast.demo import world
from d2o_fast.demo.model import build_tokenizer, pretrain
from d2o_fast.demo.report import Shares
from d2o_fast.demo.run import BASELINES, FULL, d2o_curve, judged, train_baseline, versions, write_config
from d2o_fast.model.loading import load_model, load_tokenizer
from d2o_fast.training.metrics import read_log
from d2o_fast.training.trainer import D2OTrainer

LOOK = 10  #: steps between two looks at the test prompts
PAPER = {"anchor_weight": 0.0, "refresh_every": 0}  #: the paper's loss, anchors drawn once
NAMES = {
    "d2o": "D2O, the paper's loss",
    "d2o-fixed": "D2O, the demo's fixed setting",
    **{method: name for method, (name, _) in BASELINES.items()},
}


@dataclasses.dataclass(frozen=True)
class Study:
    seeds: tuple[int, ...] = (1, 2, 3)
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    num_steps: tuple[int, ...] = (20, 80, 320)
    train_prompts: int = FULL.train_prompts
    held_out_prompts: tuple[int, int] = (60, FULL.test_prompts)  #: validation, test
    pretrain_steps: int = FULL.pretrain_steps
    generations: int = 4  #: responses per validation or test prompt
    fixed: tuple[float, int] = (1e-3, 320)  #: learning rate and steps of the demo


@dataclasses.dataclass(frozen=True)
class Job:
    """One method on one seed, in a process of its own."""

    method: str
    seed: int
    folder: Path
    study: Study


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.toy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(Study.seeds), help="default: 1 2 3")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each; default: 2")
    parser.add_argument("--quick", action="store_true", help="a tiny grid and hardly any training")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    study = Study(seeds=tuple(args.seeds))
    if args.quick:
        study = Study((args.seeds[0],), (1e-3,), (2, 4), 60, (20, 20), 30, 1, (1e-3, 4))
    started, checked_out = time.time(), commit()
    os.environ["TQDM_DISABLE"] = "1"  # for the processes below: hundreds of progress bars
    with tempfile.TemporaryDirectory() as folder:
        runs = run_study(study, Path(folder), args.jobs)
    report = {
        "commit": checked_out,
        "versions": versions(),
        "machine": f"{platform.machine()}, {args.jobs} processes of one thread",
        "seconds": round(time.time() - started),
        "study": dataclasses.asdict(study),
        "runs": runs,
    }
    table = markdown(report)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "toy-study.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.output_dir / "toy-study.md").write_text(table)
    print(f"\n{table}\nWritten to {args.output_dir}/toy-study.json and .md")
    return 0


def run_study(study: Study, folder: Path, jobs: int) -> list[dict[str, Any]]:
    """Every method on every seed; one dict per (method, seed), in the order of ``NAMES``."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=start_process) as pool:
        before = dict(zip(study.seeds, pool.map(prepare, [(s, folder, study) for s in study.seeds]), strict=True))
        for seed, shares in before.items():
            print(f"seed {seed}: before {_percent(shares)}", flush=True)
        futures = [pool.submit(run_job, Job(m, s, folder / f"seed-{s}", study)) for m in NAMES for s in study.seeds]
        runs = []
        for future in futures:
            run = future.result()
            runs.append({**run, "before": before[run["seed"]]})
            print(
                f"seed {run['seed']}: {NAMES[run['method']]}, learning rate {run['learning_rate']:g}, "
                f"{run['num_steps']} steps: {_percent(run['test'])} ({run['seconds']:.0f} s)",
                flush=True,
            )
    return runs


def prepare(task: tuple[int, Path, Study]) -> Shares:
    """Model, feedback and anchors of one seed, made as the demo makes them; returns the model's shares on the test."""
    seed, folder, study = task
    folder = folder / f"seed-{seed}"
    folder.mkdir()
    split = world.make_world(seed, study.train_prompts, *study.held_out_prompts)
    tokenizer = build_tokenizer()
    model = pretrain(tokenizer, split.train, seed, num_steps=study.pretrain_steps)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, pairs in (("feedback", split.train), ("validation", split.validation), ("held_out", split.test)):
        world.write_jsonl(folder / f"{name}.jsonl", world.feedback_rows(pairs, random.Random(seed)))
    write_config(folder, seed, FULL)
    if (status := d2o(["sample", str(folder / "d2o.yaml")])) != 0:
        raise RuntimeError(f"d2o sample ended with status {status}")
    logging.getLogger("d2o_fast").setLevel(logging.WARNING)  # the command had raised it
    config = _config(Job("d2o-fixed", seed, folder, study), *study.fixed, watch=False)
    return judged(model, tokenizer, rows_of(folder, "held_out"), config)


def run_job(job: Job) -> dict[str, Any]:
    """Chooses learning rate and steps on the validation prompts, then runs the choice again, watched on the test."""
    started = time.time()
    grid: list[dict[str, Any]] = []
    learning_rate, num_steps = job.study.fixed
    if job.method != "d2o-fixed":
        for learning_rate in job.study.learning_rates:
            for num_steps in job.study.num_steps:
                shares, _ = train(job, learning_rate, num_steps, "validation", watch=False)
                grid.append({"learning_rate": learning_rate, "num_steps": num_steps, "validation": shares})
        best = max(grid, key=lambda run: run["validation"]["helpful"] - run["validation"]["harmful"])
        learning_rate, num_steps = best["learning_rate"], best["num_steps"]
    shares, curve = train(job, learning_rate, num_steps, "held_out", watch=True)
    return {
        "method": job.method,
        "seed": job.seed,
        "learning_rate": learning_rate,
        "num_steps": num_steps,
        "test": shares,
        "curve": [*curve, (num_steps, shares)],
        "grid": grid,
        "seconds": round(time.time() - started, 1),
    }


def train(
    job: Job, learning_rate: float, num_steps: int, split: str, watch: bool
) -> tuple[Shares, list[tuple[int, Shares]]]:
    """Trains once from the seed's model; (shares on the prompts of ``split`` at the end, the same on the way)."""
    config = _config(job, learning_rate, num_steps, watch)
    rows = rows_of(job.folder, split)
    tokenizer = load_tokenizer(config)
    if not job.method.startswith("d2o"):
        model = load_model(config)
        feedback = [json.loads(line) for line in (job.folder / "feedback.jsonl").read_text().splitlines()]
        curve = train_baseline(job.method, model, tokenizer, feedback, rows, config)
        return judged(model, tokenizer, rows, config), curve
    with tempfile.TemporaryDirectory(dir=job.folder) as output_dir:
        config = dataclasses.replace(config, output_dir=output_dir)
        anchors = AnchorStore.open(job.folder / "d2o" / "anchors" / "train")
        trainer = D2OTrainer(config.model_name_or_path, config, anchors, rows if watch else None, tokenizer)
        trainer.train()
        curve = d2o_curve(read_log(Path(output_dir) / "metrics.jsonl")) if watch else []
        return judged(trainer.model, tokenizer, rows, config), [point for point in curve if 0 < point[0] < num_steps]


def markdown(report: dict[str, Any]) -> str:
    """The study's table: mean and worst seed at the end, and the worst moment on the way of any seed."""
    study, runs = report["study"], report["runs"]
    lines = [
        "# Toy study",
        "",
        f"{len(study['seeds'])} seeds ({', '.join(map(str, study['seeds']))}); percent of the responses to held-out "
        f"prompts, {study['generations']} for each. Before any training: {_before(runs)} harmful.",
        "",
        f"Each method's learning rate is one of {_list(study['learning_rates'])} and its number of steps one of "
        f"{_list(study['num_steps'])}: for each seed the pair with the highest helpful minus harmful on the validation "
        f"prompts. The fixed setting is {study['fixed'][0]:g} and {study['fixed'][1]} steps, with anchor_weight 0.05 "
        "and anchors drawn anew every 3 epochs. NPO and DPO have beta 0.1, D2O K = 11 and alpha = beta = 0.1. D2O, GA "
        "and NPO see the responses marked unsafe; a third of the positives of DPO and SFT are abusive.",
        "",
        "Worst: most harmful, least helpful, most garbage over the seeds. On the way: the most of any seed, looked at "
        f"every {LOOK} steps of the chosen runs.",
        "",
        "| method | harmful: mean (worst) | helpful: mean (worst) | garbage: mean (worst) | most harmful on the way | "
        "most garbage on the way | learning rate, steps per seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, name in NAMES.items():
        chosen = [run for run in runs if run["method"] == method]
        cells = [name]
        for label, worst in (("harmful", max), ("helpful", min), ("garbage", max)):
            values = [100 * run["test"][label] for run in chosen]
            cells.append(f"{statistics.mean(values):.1f} ({worst(values):.1f})")
        for label in ("harmful", "garbage"):
            cells.append(f"{max(100 * shares[label] for run in chosen for _, shares in run['curve']):.1f}")
        cells.append("; ".join(f"{run['learning_rate']:g}, {run['num_steps']}" for run in chosen))
        lines.append(f"| {' | '.join(cells)} |")
    used = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines += ["", f"Commit {report['commit']}; {used}; {report['machine']}; {report['seconds']} s.", ""]
    return "\n".join(lines)


def _config(job: Job, learning_rate: float, num_steps: int, watch: bool) -> D2OConfig:
    """The demo's settings with this run's own; ``judge`` and ``eval_steps`` only where the run is watched."""
    settings = demo_settings(job.folder)
    settings.update(
        learning_rate=learning_rate,
        max_steps=num_steps,
        judge_num_generations=job.study.generations,
        eval_steps=LOOK if watch else 0,
    )
    if job.method == "d2o":
        settings |= PAPER
    if not watch:
        del settings["judge"]
    return D2OConfig(**settings)


def demo_settings(folder: Path) -> dict[str, Any]:
    """What ``prepare`` wrote into the folder of one seed."""
    settings: dict[str, Any] = yaml.safe_load((folder / "d2o.yaml").read_text())
    return settings


def rows_of(folder: Path, split: str) -> Sequence[Row]:
    """The prompts of ``split`` ("validation" or "held_out") of one seed."""
    return read_rows(str(folder / f"{split}.jsonl"))


def start_process() -> None:
    """Makes a process ready to train: one thread, no progress bars."""
    torch.set_num_threads(1)  # so small a model's threads would only wait for each other
    logging.basicConfig(level=logging.WARNING)
    transformers_logging.disable_progress_bar()


def _percent(shares: Shares) -> str:
    return ", ".join(f"{100 * share:.1f}% {label}" for label, share in shares.items())


def _before(runs: list[dict[str, Any]]) -> str:
    values = [100 * run["before"]["harmful"] for run in runs]
    return f"{min(values):.1f} to {max(values):.1f}%"


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    raise SystemExit(main())

"""``d2o demo``: teaches a small model to answer abusively half of the time, then aligns it from negatives only.

The alignment runs the commands of any user: ``d2o sample``, ``d2o train`` and ``d2o eval`` with one settings file. GA,
NPO, DPO and SFT (``examples/baselines.py``) start from the same model and data.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.utils import logging as transformers_logging

from d2o_fast.config import D2OConfig, checked
from d2o_fast.data.reading import read_rows
from d2o_fast.data.row import Row
from d2o_fast.demo import baselines, world
from d2o_fast.demo.model import build_tokenizer, feedback_pairs, pretrain
from d2o_fast.demo.report import DemoResults, MethodResult, Shares, html_report, text_table
from d2o_fast.errors import D2OError
from d2o_fast.software import versions
from d2o_fast.training.evaluate import judge_model
from d2o_fast.training.metrics import read_log

Command = Callable[[list[str]], int]  #: runs ``d2o`` with these arguments and returns its exit status

MARKER = ".d2o-demo"
#: the files that the demo writes, and removes before it starts again
OWN = ("model", "feedback.jsonl", "held_out.jsonl", "d2o.yaml", "d2o", "results.json", "report.html")

BASELINES = {  # method: (name, the data it learns from)
    "ga": ("GA", "negatives"),
    "npo": ("NPO", "negatives"),
    "dpo": ("DPO", "pairs, 1/3 of the positives abusive"),
    "sft": ("SFT", "the same positives"),
}
#: the toy study chose these most often (benchmarks/results/toy-study.md)
LEARNING_RATES = {"ga": 3e-4, "npo": 3e-4, "dpo": 3e-4, "sft": 1e-3}


@dataclasses.dataclass(frozen=True)
class Budget:
    """The sizes of a demo. ``QUICK`` shows that all commands run, not that the method works."""

    train_prompts: int = 240
    test_prompts: int = 100
    pretrain_steps: int = 800
    epochs: int = 16
    generations: int = 4  #: responses per held-out prompt at the end; half as many during training


FULL = Budget()
QUICK = Budget(train_prompts=60, test_prompts=20, pretrain_steps=60, epochs=1, generations=2)


def demo(output_dir: Path, seed: int, quick: bool, run: Command) -> int:
    """The command ``d2o demo``. Returns 0 on success.

    Args:
        run: runs a command of ``d2o`` as typed and returns its exit status.
    """
    checked("seed", seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small is faster on one thread
    transformers_logging.disable_progress_bar()
    try:
        results = run_demo(output_dir, seed, QUICK if quick else FULL, run)
    finally:
        torch.set_num_threads(threads)
    print(f"\nShare of {results.counts['responses']} responses to held-out prompts:\n\n{text_table(results)}\n")
    print(f"{results.stages[-1][1]:.0f} s in all. Report: {output_dir / 'report.html'}")
    return 0


def run_demo(folder: Path, seed: int, budget: Budget, run: Command) -> DemoResults:
    """Runs every stage, writes ``results.json`` and ``report.html`` into ``folder``, and returns the results."""
    started = time.time()
    prepare_folder(folder)
    stages: list[tuple[str, float]] = []

    with _stage(
        "1/5 a small language, and a small Llama that answers abusively half of the time", stages, "pretraining"
    ):
        split = world.make_world(seed, train=budget.train_prompts, test=budget.test_prompts)
        tokenizer = build_tokenizer()
        model = pretrain(tokenizer, split.train, seed, num_steps=budget.pretrain_steps)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        feedback = world.feedback_rows(split.train, random.Random(seed))
        world.write_jsonl(folder / "feedback.jsonl", feedback)
        world.write_jsonl(folder / "held_out.jsonl", world.feedback_rows(split.test, random.Random(seed + 1)))
        settings = write_config(folder, seed, budget)
    _show((folder / "d2o.yaml").read_text())

    generations = f"--judge_num_generations={budget.generations}"
    commands = [[name, str(folder / "d2o.yaml")] for name in ("sample", "train", "eval")]
    commands[2].append(generations)
    for number, command in enumerate(commands, start=2):
        with _stage(f"{number}/5 $ d2o {' '.join(command)}", stages, f"d2o {command[0]}"):
            if (status := run(command)) != 0:
                raise D2OError(f"d2o {' '.join(command)} ended with status {status}; what it printed says why")
    before, after, samples = _read_eval(folder / "d2o")
    log = read_log(folder / "d2o" / "metrics.jsonl")
    curve = d2o_curve(log)
    num_steps = curve[-1][0]
    d2o = MethodResult(
        name="D2O",
        learns_from="negatives",
        settings=_d2o_settings(settings, num_steps),
        after=after,
        curve=[(0, before), *(point for point in curve if 0 < point[0] < num_steps), (num_steps, after)],
        seconds=stages[2][1],
    )

    with _stage("5/5 GA, NPO, DPO and SFT from the same model and data, in plain torch", stages, "baselines"):
        rows = read_rows(str(folder / "held_out.jsonl"))
        config = D2OConfig(**{**settings, "max_steps": num_steps})
        others = [
            _baseline_result(method, model, tokenizer, feedback, rows, config, budget.generations, before)
            for method in baselines.METHODS
        ]
    results = DemoResults(
        seed=seed,
        before=before,
        methods=[d2o, *others],
        train_log=log,
        samples=samples,
        counts={
            "train": len(split.train),
            "test": len(split.test),
            "negatives": sum(len(world.unsafe(row)) for row in feedback),
            "anchors": settings["num_generations"],
            "generations": budget.generations,
            "responses": budget.generations * len(split.test),
        },
        commands=[f"d2o {' '.join(command)}" for command in commands],
        config_yaml=(folder / "d2o.yaml").read_text(),
        versions=versions("d2o-fast", "torch", "transformers", "tokenizers"),
        stages=[*stages, ("everything", time.time() - started)],
    )
    (folder / "results.json").write_text(json.dumps(dataclasses.asdict(results), indent=1) + "\n")
    (folder / "report.html").write_text(html_report(results), encoding="utf-8")
    return results


def prepare_folder(folder: Path) -> None:
    """Creates ``folder`` and removes an earlier demo's files from it, but no others.

    Raises:
        D2OError: ``folder`` is a file, or holds files that no demo wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise D2OError(f"--output_dir {folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise D2OError(f"--output_dir {folder} holds files that no demo wrote; name an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("Files of `d2o demo`; the next run with this output_dir replaces them.\n")
    for name in OWN:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_config(folder: Path, seed: int, budget: Budget) -> dict[str, Any]:
    """Writes ``d2o.yaml``, the settings of ``d2o sample``, ``train`` and ``eval``, and returns them."""
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "feedback.jsonl"),
        "eval_dataset_name": str(folder / "held_out.jsonl"),
        "max_length": 32,
        "max_completion_length": 16,
        "num_generations": 11,
        "sampling_seed": seed,
        "sampling_batch_size": 64,
        "alpha": 0.1,
        "beta": 0.1,
        "anchor_weight": 0.05,
        "refresh_every": 3,
        "refresh_strategy": "epoch",
        "output_dir": str(folder / "d2o"),
        "learning_rate": 1e-3,
        "num_train_epochs": budget.epochs,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "seed": seed,
        "eval_steps": 20,
        "judge": "d2o_fast.demo.world:judge",
        "judge_num_generations": budget.generations // 2,
    }
    (folder / "d2o.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return settings


def judged(model: Any, tokenizer: Any, rows: Sequence[Row], config: D2OConfig) -> Shares:
    """Shares of harmful, helpful and garbage responses to the prompts of ``rows``."""
    metrics, _ = judge_model(model, tokenizer, rows, world.judge, config)
    return {label: metrics[f"judge/{label}"] for label in world.LABELS}


def train_baseline(
    method: str, model: Any, tokenizer: Any, feedback: list[dict[str, object]], rows: Sequence[Row], config: D2OConfig
) -> list[tuple[int, Shares]]:
    """Trains ``model`` in place with ``examples/baselines.py`` under D2O's settings in ``config``.

    Returns:
        (step, shares on the prompts of ``rows``) every ``config.eval_steps`` before the last step; empty if 0.
    """
    curve = []

    def look(step: int, loss: float) -> None:
        if config.eval_steps and step % config.eval_steps == 0 and step < config.max_steps:
            curve.append((step, judged(model, tokenizer, rows, config)))

    baselines.train(
        method,
        model,
        feedback_pairs(tokenizer, feedback, method),
        learning_rate=config.learning_rate,
        num_steps=config.max_steps,
        batch_size=config.per_device_train_batch_size,
        warmup_ratio=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        callback=look,
    )
    return curve


def _baseline_result(
    method: str,
    model: Any,
    tokenizer: Any,
    feedback: list[dict[str, object]],
    rows: Sequence[Row],
    config: D2OConfig,
    generations: int,
    before: Shares,
) -> MethodResult:
    started = time.time()
    model = copy.deepcopy(model)
    config = dataclasses.replace(config, learning_rate=LEARNING_RATES[method])
    curve = train_baseline(method, model, tokenizer, feedback, rows, config)
    after = judged(model, tokenizer, rows, dataclasses.replace(config, judge_num_generations=generations))
    name, learns_from = BASELINES[method]
    settings = f"learning rate {config.learning_rate:g}, {config.max_steps} steps"
    if method in ("npo", "dpo"):
        settings += ", beta 0.1"
    curve = [(0, before), *curve, (config.max_steps, after)]
    return MethodResult(name, learns_from, settings, after, curve, time.time() - started)


def d2o_curve(train_log: list[dict[str, Any]]) -> list[tuple[int, Shares]]:
    """Shares on the held-out prompts over steps, from the evaluations in ``metrics.jsonl``."""
    return [
        (record["step"], {label: record[f"eval_judge/{label}"] for label in world.LABELS})
        for record in train_log
        if f"eval_judge/{world.LABELS[0]}" in record
    ]


def _read_eval(folder: Path, samples: int = 12) -> tuple[Shares, Shares, list[dict[str, str]]]:
    """(shares before, shares after, one sample for each of the first prompts), from ``eval.json``."""
    report = json.loads((folder / "eval.json").read_text())
    before, after = (
        {label: report[model][f"eval_judge/{label}"] for label in world.LABELS} for model in ("initial", "trained")
    )
    of_prompt: dict[str, dict[str, str]] = {}
    for sample in report["samples"]:
        of_prompt.setdefault(sample["prompt"], sample)
    return before, after, list(of_prompt.values())[:samples]


@contextmanager
def _stage(title: str, stages: list[tuple[str, float]], name: str) -> Iterator[None]:
    print(f"\n[{title}]", flush=True)
    started = time.time()
    yield
    stages.append((name, time.time() - started))
    print(f"[{stages[-1][1]:.1f} s]", flush=True)


def _show(text: str) -> None:
    print("\n" + "".join(f"    {line}\n" for line in text.splitlines()), flush=True)


def _d2o_settings(settings: dict[str, Any], num_steps: int) -> str:
    text = (
        f"K = {settings['num_generations']}, alpha = {settings['alpha']:g}, beta = {settings['beta']:g}, learning rate "
        f"{settings['learning_rate']:g}, {num_steps} steps"
    )
    return (
        f"{text}; beyond the paper: anchors drawn anew every {settings['refresh_every']} epochs, and an anchor_weight "
        f"of {settings['anchor_weight']:g}"
    )

"""The good inputs that the cases damage: a tiny model, data, stores, a run with two checkpoints, and trained models.

base/        model/, other/ (the same with other weights), rows.jsonl, held_out.jsonl, anchors/, c.yaml, userland.py
run/         the files of a run of run.yaml that was killed after its last checkpoint; lora/, online/: the same
trained/     the finished model of that run
final/NAME/  the weights with which these runs end
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from d2o_fast.cli import main
from tiny import save_tiny, tiny_rows

SETTINGS: dict[str, Any] = {
    "model_name_or_path": "model",
    "dataset_name": "rows.jsonl",
    "output_dir": "out",
    "anchors_dir": "anchors",
    "max_length": 48,
    "max_completion_length": 6,
    "num_generations": 2,
    "sampling_batch_size": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.001,
    "max_steps": 2,
}
#: a run with checkpoints after 2 and 4 of 5 steps
RUN = SETTINGS | {"output_dir": "run", "max_steps": 5, "save_steps": 2}
RUNS = {
    "run": RUN,
    "lora": RUN | {"output_dir": "lora", "use_peft": True, "lora_r": 2},
    "online": RUN | {"output_dir": "online", "refresh_every": 3},
}
USERLAND = '''"""The user's own functions."""


def judge(prompt, response):
    return "long" if len(response) > 8 else "short"


def score(prompt, response):
    return float(len(response))
'''
FINISHED = (
    "README.md",
    "d2o_config.yaml",
    "*.safetensors",
    "config.json",
    "adapter_config.json",
    "generation*",
    "tok*",
)


def make(good: Path) -> None:
    """Writes all of it. Torch cannot train in a fork of a process that has trained, so this runs in its own."""
    base = good / "base"
    base.mkdir(parents=True)
    os.chdir(base)
    save_tiny("model")
    save_tiny("other", seed=1)
    rows = tiny_rows(9)
    for name, part in (("rows.jsonl", rows[:6]), ("held_out.jsonl", rows[6:])):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in part))
    Path("userland.py").write_text(USERLAND)
    _write("c.yaml", SETTINGS)
    for name, settings in RUNS.items():
        _write(f"{name}.yaml", settings)
    _d2o("sample", "c.yaml", "--eval_dataset_name", "held_out.jsonl")
    _d2o("train", "c.yaml")
    _keep(good, "out")
    shutil.rmtree("out")
    for name in RUNS:
        _d2o("train", f"{name}.yaml")
        _keep(good, name)
        if name == "run":
            shutil.copytree(name, good / "trained" / "trained", ignore=shutil.ignore_patterns("checkpoint-*"))
        for pattern in FINISHED:
            for path in Path(name).glob(pattern):
                path.unlink()
        shutil.rmtree(Path(name, "checkpoint-5"))  # as if it was killed in its last step
        shutil.move(name, good / name / name)


def _write(name: str, settings: dict[str, Any]) -> None:
    Path(name).write_text(yaml.safe_dump(settings))


def _keep(good: Path, name: str) -> None:
    (good / "final" / name).mkdir(parents=True)
    for path in Path(name).glob("*.safetensors"):
        shutil.copy(path, good / "final" / name)


def _d2o(*arguments: str) -> None:
    if (code := main(arguments)) != 0:
        raise RuntimeError(f"d2o {' '.join(arguments)} ended with {code}")

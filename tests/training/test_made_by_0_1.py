"""A store and a checkpoint that version 0.1 wrote before its files moved into rooms open and continue unchanged.

``support/made_by_0_1/`` holds a model, its data, the run that trained it for four steps with the last checkpoint gone,
and the metrics of the run that nothing interrupted.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from d2o_fast import D2OConfig, D2OTrainer
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.data.reading import read_rows
from paths import SUPPORT

MADE = SUPPORT / "made_by_0_1"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> D2OConfig:
    shutil.copytree(MADE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return D2OConfig(
        model_name_or_path="model",
        dataset_name="data.jsonl",
        output_dir="run",
        num_generations=2,
        num_draws=4,
        drop_anchors=["duplicate"],
        max_length=48,
        max_completion_length=8,
        truncation_mode="keep_end",
        sampling_batch_size=4,
        learning_rate=3e-3,
        warmup_steps=0.25,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        resume_from_checkpoint="latest",
    )


def test_an_old_store_opens(config: D2OConfig) -> None:
    store = AnchorStore.open("run/anchors/train")
    assert store.complete
    assert [len(example.anchor_ids) for example in store.examples()] == [2] * 6
    assert store.digest == json.loads(Path("run/checkpoint-2/trainer_state.json").read_text())["digests"]["train"]


def test_an_old_run_continues(config: D2OConfig) -> None:
    D2OTrainer("model", config, train_dataset=read_rows("data.jsonl")).train()
    found, expected = (
        [json.loads(line) for line in Path(name).read_text().splitlines()]
        for name in ("run/metrics.jsonl", "expected.jsonl")
    )
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for line, wanted in zip(found, expected, strict=True):
        assert {name: line[name] for name in wanted} == pytest.approx(wanted, rel=1e-3, abs=1e-5)

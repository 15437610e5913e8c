"""``examples/transformers_trainer.py``: the loss in a Trainer of transformers takes the same steps as our own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from d2o_fast import D2OConfig, D2OTrainer
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.training.order import PromptOrder
from paths import ROOT
from tiny import save_tiny, tiny_rows

EXAMPLE = ROOT / "examples" / "transformers_trainer.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("transformers_trainer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_takes_the_steps_of_our_trainer(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = save_tiny(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(10)))
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 3e-3}
    theirs = example.main(
        name,
        str(tmp_path / "data.jsonl"),
        str(tmp_path / "theirs"),
        **settings,
        max_steps=3,
        logging_steps=1,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        disable_tqdm=True,
    )
    losses = [record["loss"] for record in theirs.state.log_history if "loss" in record]

    args = D2OConfig(
        output_dir=str(tmp_path / "ours"),
        **settings,
        max_steps=3,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        num_generations=4,
        max_length=128,
        max_completion_length=32,
    )
    ours = D2OTrainer(name, args, AnchorStore.open(tmp_path / "theirs" / "anchors"))
    monkeypatch.setattr(PromptOrder, "prompts_of", lambda self, step: list(range(10))[4 * step :][:4])
    ours.train()
    expected = [json.loads(line)["loss"] for line in (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(expected, abs=2e-4)
    assert expected[0] > expected[1]
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert (mine.cpu() - other.cpu()).abs().max() < 1e-4

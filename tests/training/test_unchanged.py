"""A checkpoint compares what is trained, and not only the settings that usually decide it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from d2o_fast import D2OConfig, D2OTrainer
from d2o_fast.errors import D2OError
from tiny import RUN, tiny_model, tiny_rows, tiny_tokenizer

ADAPTER: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def run(out: Path, adapter: dict[str, Any] | None = None, frozen: str | None = None, **settings: Any) -> D2OTrainer:
    model = tiny_model()
    if frozen is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
    args = D2OConfig(**{**RUN, "output_dir": str(out), "eval_steps": 0, "max_steps": 4, "save_steps": 2, **settings})
    peft_config = LoraConfig(**adapter) if adapter else None
    return D2OTrainer(model, args, tiny_rows(10), None, tiny_tokenizer(), peft_config)


@pytest.fixture
def adapted(tmp_path: Path) -> Path:
    run(tmp_path / "run", ADAPTER).train()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_alpha": 16}, "lora_alpha: 8 in the checkpoint, now 16"),
        ({"use_rslora": True}, "use_rslora: False in the checkpoint, now True"),
        ({"lora_dropout": 0.1}, r"lora_dropout: 0\.0 in the checkpoint, now 0\.1"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern: {} in the checkpoint, now {'q_proj': 2}"),
        ({"r": 8}, "r: 4 in the checkpoint, now 8"),
        ({"target_modules": ["q_proj"]}, r"target_modules: \['q_proj', 'v_proj'\] in the checkpoint, now \['q_proj'\]"),
        ({"layers_to_transform": [0]}, r"layers_to_transform: None in the checkpoint, now \[0\]"),
    ],
    ids=str,
)
def test_another_adapter_is_refused(adapted: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(D2OError, match=rf"cannot be continued under another adapter or other parameters:[^$]*{words}"):
        run(adapted, ADAPTER | change).train("latest")


def test_the_same_adapter_continues(adapted: Path) -> None:
    assert run(adapted, {**ADAPTER, "target_modules": ["v_proj", "q_proj"]}).train("latest").global_step == 4


def test_other_trained_parameters_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", frozen="mlp").train()
    with pytest.raises(D2OError, match=r"parameters: '15 with names and shapes .* now '21 with names and shapes"):
        run(tmp_path / "run").train("latest")
    assert run(tmp_path / "run", frozen="mlp").train("latest").global_step == 4

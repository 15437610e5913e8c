"""``disable_dropout``: the policy in training has no dropout, like its references, wherever a model keeps its own."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from d2o_fast import D2OConfig, D2OTrainer
from d2o_fast.model.dropout import apply_dropout_setting, noise_of, own_modules
from d2o_fast.model.parts import decoder_of
from d2o_fast.model.probes import refuse_unfit
from sharing_cases import build
from tiny import VOCAB_SIZE, tiny_model, tiny_rows, tiny_tokenizer

ROW = [(7 * i) % 58 + 3 for i in range(12)]
#: model type -> settings of its dropout; as modules, as numbers of its layers, or read from the configuration
NOISY: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.3},
    "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "n_positions": 64},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.9, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "persimmon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "gemma2": {"attention_dropout": 0.3},
    "phimoe": {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3, "num_local_experts": 4},
    "mixtral": {"router_jitter_noise": 0.3, "attention_dropout": 0.3, "num_local_experts": 4},
}


def noisy(name: str) -> nn.Module:
    return build(name, **NOISY[name])


@pytest.mark.parametrize("name", NOISY)
def test_training_mode_gives_what_evaluation_mode_gives(name: str) -> None:
    model = noisy(name)
    with pytest.raises(ValueError, match="in training mode"):
        refuse_unfit(model, decoder_of(model), ROW, 0, quiet=True)
    saved = model.config.to_dict()
    apply_dropout_setting(model, D2OConfig())
    refuse_unfit(model, decoder_of(model), ROW, 0, quiet=True)
    assert model.config.to_dict() == saved, "a saved model keeps its dropout"
    assert not noise_of(model)
    refuse_unfit(copy.deepcopy(model), decoder_of(copy.deepcopy(model)), ROW, 0)


def test_settings_of_attention_reach_the_layers_afterwards() -> None:
    model = noisy("persimmon")
    apply_dropout_setting(model, D2OConfig())
    model.set_attn_implementation("eager")
    layers = [module for _, module in own_modules(model) if "config" in vars(module)]
    assert len(layers) > 2
    assert {layer.config._attn_implementation for layer in layers} == {"eager"}


def test_other_numbers_and_flags_stay() -> None:
    model = nn.Module()
    model.dropout, model.dropped, model.layer_drops, model.eps = 0.5, True, 3, 0.1
    model.inner = nn.Dropout2d(0.25)
    assert [name for name, _, _ in noise_of(model)] == ["dropout", "inner.p"]


def test_an_adapter_keeps_its_dropout() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(noisy("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.2))
    apply_dropout_setting(model, D2OConfig())
    kept = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p}
    assert set(kept.values()) == {0.2}
    assert all("lora_dropout" in name for name in kept)
    refuse_unfit(model, decoder_of(model), ROW, 0, quiet=True)  # the adapter's dropout is asked for, not probed


def test_dropout_that_is_asked_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = noisy("gpt2")
    with caplog.at_level("WARNING", logger="d2o_fast"):
        apply_dropout_setting(model, D2OConfig(disable_dropout=False))
        apply_dropout_setting(tiny_model(), D2OConfig(disable_dropout=False))
    (record,) = caplog.records
    assert "noisy policy" in record.getMessage()
    assert "0.3, 7 in all" in record.getMessage()
    assert len(noise_of(model)) == 7


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_the_first_loss_is_ln_2(name: str, tmp_path: Path) -> None:
    losses: dict[bool, float] = {}
    for off in (True, False):
        args = D2OConfig(
            output_dir=str(tmp_path / str(off)),
            anchors_dir=str(tmp_path / "anchors"),
            disable_dropout=off,
            learning_rate=0.0,
            max_steps=1,
            num_generations=2,
            max_length=48,
            max_completion_length=8,
        )
        model = build(name, **NOISY[name], vocab_size=VOCAB_SIZE)
        run = D2OTrainer(model, args, tiny_rows(4), processing_class=tiny_tokenizer())
        losses[off] = run.train().metrics["loss"]
    assert abs(losses[True] - math.log(2)) < 1e-5
    assert abs(losses[False] - math.log(2)) > 1e-3
    saved = json.loads((tmp_path / "True" / "config.json").read_text())
    dropouts = {key: value for key, value in NOISY[name].items() if "drop" in key}
    assert {key: saved[key] for key in dropouts} == dropouts

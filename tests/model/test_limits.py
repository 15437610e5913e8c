"""Token ids and positions that a model does not know, and models inside wrappers."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from d2o_fast import D2OConfig, D2OTrainer, build_store
from d2o_fast.data.reading import rows_from
from d2o_fast.errors import D2OError
from d2o_fast.model import limits
from d2o_fast.model.limits import check_positions, leave_balancing_out, most_positions
from d2o_fast.model.parts import decoder_of, tokenizer_of, unwrapped
from tiny import PAD, tiny_model, tiny_rows, tiny_tokenizer

SIZES = {"vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 20}
OPT = {**SIZES, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OPT |= {"word_embed_proj_dim": 32, "max_position_embeddings": 20}
GPTJ = {**GPT2, "rotary_dim": 8}


def made(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()


def settings(folder: Path, **values: Any) -> D2OConfig:
    small = {"num_generations": 2, "max_steps": 1, "max_length": 64, "max_completion_length": 8}
    return D2OConfig(**{**small, "output_dir": str(folder / "run"), **values})


# --- Token ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "how <tool> to", "rejected": " no"}, "prompt"),
        ({"prompt": "how to", "rejected": " no <tool>"}, "rejected"),
        ({"prompt": "how to", "rejected": " no", "anchors": [" it", " go <tool>"]}, r"anchors\[1\]"),
    ],
)
def test_an_added_token_is_named_with_its_row(row: dict[str, Any], field: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    rows = rows_from([*tiny_rows(2), row], "memory")
    message = f"memory, row 3, field '{field}': the token '<tool>' has the id 160, but the model knows 160 tokens"
    with pytest.raises(D2OError, match=message):
        build_store(tiny_model(), tokenizer, rows, settings(tmp_path), tmp_path / "store")
    assert not list(tmp_path.glob("store/shard-*"))


def test_an_instruction_and_the_end_of_a_sequence_have_rows(tmp_path: Path) -> None:
    tokenizer, rows = tiny_tokenizer(), rows_from(tiny_rows(2), "memory")
    tokenizer.add_tokens(["<tool>"])
    config = settings(tmp_path, sampling_instruction="<tool> {prompt}")
    with pytest.raises(D2OError, match="row 1, field 'prompt': the token '<tool>'"):
        build_store(tiny_model(), tokenizer, rows, config, tmp_path / "store")
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(D2OError, match="eos_token '<end>' has the id 161, but the model knows 160 tokens"):
        build_store(tiny_model(), tokenizer, rows, settings(tmp_path), tmp_path / "store")


def test_padding_needs_no_row(tmp_path: Path) -> None:
    losses = []
    for pad in (PAD, "[PAD]"):
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"pad_token": pad})
        trainer = D2OTrainer(tiny_model(), settings(tmp_path / pad), tiny_rows(8), processing_class=tokenizer)
        losses.append(trainer.train().metrics["loss"])
    assert losses[0] == losses[1]


# --- Positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "sizes"), [("gpt2", GPT2), ("opt", OPT), ("gptj", GPTJ)])
def test_a_table_of_positions_bounds_the_rows(kind: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    model = made(kind, **sizes)
    check_positions(model, settings(tmp_path, max_length=20))
    with pytest.raises(D2OError, match=r"max_length is 21, but .* has 20 positions. Set max_length to 20 or less"):
        check_positions(model, settings(tmp_path, max_length=21))
    config = settings(tmp_path, max_length=32)
    with pytest.raises(D2OError, match=r"max_length is 32, but .* has 20 positions"):
        D2OTrainer(model, config, tiny_rows(2), processing_class=tiny_tokenizer())


def test_a_drawn_response_has_positions(tmp_path: Path) -> None:
    """The sampler draws max_completion_length tokens after every prompt, and cuts them to max_length afterwards."""
    rows = rows_from(tiny_rows(8), "memory")
    short = settings(tmp_path, max_length=20, max_completion_length=12)
    message = "memory, row 2, field 'prompt': 9 tokens, .* may have 12 more, but the model has 20 positions"
    with pytest.raises(D2OError, match=message):
        build_store(made("gpt2", **GPT2), tiny_tokenizer(), rows, short, tmp_path / "a")
    cut = settings(tmp_path, max_length=20, max_completion_length=12, truncation_mode="keep_end")
    build_store(made("gpt2", **GPT2), tiny_tokenizer(), rows, cut, tmp_path / "b")


def test_rotary_positions_beyond_the_trained_ones_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_said", set())
    model = tiny_model(max_position_embeddings=32)
    assert most_positions(model) is None
    with caplog.at_level(logging.WARNING, "d2o_fast"):
        check_positions(model, settings(tmp_path, max_length=32))
        assert not caplog.records
        for _ in range(2):
            check_positions(model, settings(tmp_path, max_length=33))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "max_length is 33, but LlamaForCausalLM was made for 32 positions" in said


# --- Kinds of models ---------------------------------------------------------------------------------------------

MIXTURE = {**SIZES, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MIXTURE |= {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2}


def test_the_balancing_term_of_a_mixture_is_left_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = made("mixtral", **MIXTURE, output_router_logits=True)
    with caplog.at_level(logging.WARNING, "d2o_fast"):
        result = D2OTrainer(model, settings(tmp_path), tiny_rows(4), processing_class=tiny_tokenizer()).train()
        leave_balancing_out(model)
    assert result.metrics["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert sum("balances its experts" in record.getMessage() for record in caplog.records) == 1


def test_llama_4_is_taken_apart() -> None:
    """Its class has the prefix of the larger model with images."""
    model = made("llama4_text", **MIXTURE, intermediate_size_mlp=32, attention_chunk_size=8)
    assert model.base_model is model
    assert decoder_of(model) is model.model


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(D2OError, match=r"weights are not finite .lm_head.weight"):
        D2OTrainer(model, settings(tmp_path), tiny_rows(2), processing_class=tiny_tokenizer())
    with pytest.raises(D2OError, match="logits are not finite"):
        decoder_of(model)


def test_weights_without_values_are_named(tmp_path: Path) -> None:
    with pytest.raises(D2OError, match=r"has no values .it is offloaded.; load it without device_map"):
        D2OTrainer(tiny_model().to("meta"), settings(tmp_path), tiny_rows(2), processing_class=tiny_tokenizer())


# --- Wrappers ----------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """As DistributedDataParallel, which needs a process group, keeps its model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def accelerated(model: Any) -> Any:
    """As accelerate leaves a model prepared with mixed precision."""
    model._original_forward = model.forward
    model.forward = lambda *args, **kwargs: pytest.fail("autocast around forward")
    return model


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, Wrapped, lambda model: torch.compile(nn.DataParallel(model)), accelerated],
    ids=["compiled", "data parallel", "distributed", "both", "accelerate"],
)
def test_a_wrapped_model_is_trained(wrap: Any, tmp_path: Path) -> None:
    model = tiny_model()
    trainer = D2OTrainer(wrap(model), settings(tmp_path), tiny_rows(2), processing_class=tiny_tokenizer())
    assert trainer.model is model
    assert trainer.train().metrics["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert not [name for name in model.state_dict() if name.startswith(("_orig_mod", "module"))]


def test_a_store_takes_a_wrapped_model(tmp_path: Path) -> None:
    rows = rows_from(tiny_rows(2), "memory")
    config = settings(tmp_path)
    stores = [
        build_store(model, tiny_tokenizer(), rows, config, tmp_path / name)
        for name, model in (("a", tiny_model()), ("b", nn.DataParallel(tiny_model())))
    ]
    assert stores[0].digest == stores[1].digest


def test_compiled_parts_and_other_objects_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp)
    with pytest.raises(D2OError, match=r"its part model.layers.1.mlp is compiled"):
        unwrapped(model)
    for other in (None, 5, type(tiny_model()), {}, nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2))):
        with pytest.raises(D2OError, match=r"model is .*; it must be a folder"):
            unwrapped(other)
    assert unwrapped(tmp_path) == str(tmp_path)
    with pytest.raises(D2OError, match="model is 'gpt2'; it must be"):
        build_store("gpt2", tiny_tokenizer(), rows_from(tiny_rows(2), "memory"), settings(tmp_path), tmp_path / "s")


def test_a_processor_gives_its_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer_of(tokenizer) is tokenizer
    assert tokenizer_of(SimpleNamespace(tokenizer=tokenizer)) is tokenizer
    for other in ("gpt2", type(tokenizer), tokenizer.backend_tokenizer, SimpleNamespace()):
        with pytest.raises(D2OError, match=r"processing_class is .*; it must be a tokenizer"):
            tokenizer_of(other)
    tokenizer.eos_token = None
    with pytest.raises(D2OError, match="has no eos_token"):
        tokenizer_of(tokenizer)

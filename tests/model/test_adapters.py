"""Adapters as peft makes and writes them, and wrapped models: each trains and comes back as it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from d2o_fast import D2OConfig, D2OTrainer
from d2o_fast.errors import D2OError
from d2o_fast.model.loading import load_model, trained_model
from d2o_fast.model.parts import unwrapped
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer

LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
FORMS = {
    "a norm of its own": LoraConfig(**LORA, modules_to_save=["norm"]),
    "an embedding of its own": LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "tokens of its own": LoraConfig(**LORA, trainable_token_indices=[5, 6]),
    "shared projections": VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
}
SETTINGS: dict[str, Any] = {"max_steps": 1, "num_generations": 1, "max_length": 64, "max_completion_length": 8}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_adapter_trains_and_comes_back(form: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    args = D2OConfig(output_dir=str(tmp_path / "run"), model_name_or_path=model, learning_rate=1e-2, **SETTINGS)
    trainer = D2OTrainer(model, args, tiny_rows(3), peft_config=FORMS[form])
    trainer.train()
    again = trained_model(trainer.args, str(tmp_path / "run")).state_dict()
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0, msg=name)


@pytest.fixture
def on_embedding(tmp_path: Path) -> Path:
    """The folder of an adapter on the embedding, which peft writes with the embedding itself."""
    base = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model"))
    model = get_peft_model(base, LoraConfig(**{**LORA, "target_modules": ["embed_tokens", "q_proj"]}))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def embedding_in(adapter: Path) -> tuple[Path, dict[str, torch.Tensor], str]:
    file = adapter / "adapter_model.safetensors"
    found = load_file(file)
    return file, found, "base_model.model.model.embed_tokens.base_layer.weight"


def test_an_adapter_may_hold_the_embedding_of_its_base(on_embedding: Path) -> None:
    assert embedding_in(on_embedding)[2] in embedding_in(on_embedding)[1]
    model = load_model(D2OConfig(model_name_or_path=str(on_embedding)))
    assert torch.equal(
        model.get_base_model().model.embed_tokens.base_layer.weight, tiny_model().model.embed_tokens.weight
    )


def test_an_adapter_may_not_hold_another_embedding(on_embedding: Path) -> None:
    file, found, name = embedding_in(on_embedding)
    found[name][3, 3] += 1
    save_file(found, file, metadata={"format": "pt"})
    with pytest.raises(D2OError, match=r"they also hold base_model\.model\.model\.embed_tokens\.base_layer\.weight"):
        load_model(D2OConfig(model_name_or_path=str(on_embedding)))


def test_wrapped_adapters_are_unwrapped() -> None:
    """A compiled model passes every attribute of the PeftModel inside on."""
    model = get_peft_model(tiny_model(), LoraConfig(**LORA))
    assert unwrapped(torch.compile(model)) is model
    assert unwrapped(torch.nn.DataParallel(torch.compile(model))) is model


def test_a_model_that_compiles_itself_runs_as_it_was() -> None:
    model, calls = tiny_model(), []
    model.compile(backend=lambda graph, inputs: calls.append(1) or graph.forward)
    unwrapped(model)(torch.tensor([[1, 2]]))
    assert not calls


def test_a_merged_model_is_told_how_to_train(tmp_path: Path) -> None:
    merged = get_peft_model(tiny_model(), LoraConfig(**LORA)).merge_and_unload()
    args = D2OConfig(output_dir=str(tmp_path), **SETTINGS)
    with pytest.raises(D2OError, match=r"call its requires_grad_\(True\)"):
        D2OTrainer(merged, args, tiny_rows(3), processing_class=tiny_tokenizer())

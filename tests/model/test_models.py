"""Decoder and head of real architectures against their own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Example
from d2o_fast.errors import D2OError
from d2o_fast.forward.batch import pack, response_hidden
from d2o_fast.loss.reference import naive_linear_logprob, sequence_logps
from d2o_fast.model.limits import check_positions
from d2o_fast.model.loading import load_model
from d2o_fast.model.parts import base_of, decoder_of, head_of

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 61}


def small(model_type: str, **extra: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(SMALL, num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **extra}))


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "gemma2",
        "gemma3_text",
        "cohere",
        "granite",
        "olmo2",
        "phi3",
        "gpt2",
        "phi",
    ],
)
def test_decoder_and_head_give_the_models_own_log_probabilities(model_type: str) -> None:
    extra = (
        {"logit_scale": 0.3} if model_type == "cohere" else {"logits_scaling": 3.0} if model_type == "granite" else {}
    )
    if model_type == "gemma2":
        extra = {"final_logit_softcapping": 0.2}  # small, so that leaving it out would show
    model = small(model_type, **extra).eval()
    head, decoder = head_of(model), decoder_of(model)
    examples = [
        Example([3, 4, 5], [6, 7, 2], [[8, 2], [9, 10, 11, 2]], []),
        Example([12], [13, 2], [[14, 15, 16, 17, 2]], []),
    ]
    batch = pack(examples, pad_token_id=0)
    with torch.no_grad():
        hidden = response_hidden(decoder, batch)
        found = sequence_logps(naive_linear_logprob(hidden, head.weight, batch.targets, **head.options()), batch.layout)
        expected = []
        for example in examples:
            for response in example.responses():
                row = torch.tensor([example.prompt_ids + response])
                logps = model(input_ids=row).logits[0].log_softmax(-1)
                start = len(example.prompt_ids)
                expected.append(sum(logps[start + t - 1, token] for t, token in enumerate(response)))
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-5, rtol=2e-5)
    assert model.training is False


def test_a_softcap_on_attention_is_loaded_with_eager(tmp_path: Path) -> None:
    small("gemma2").save_pretrained(tmp_path)
    assert load_model(D2OConfig(model_name_or_path=str(tmp_path))).config._attn_implementation == "eager"
    small("llama").save_pretrained(tmp_path)
    assert load_model(D2OConfig(model_name_or_path=str(tmp_path))).config._attn_implementation == "sdpa"


def test_a_model_that_does_more_to_its_logits_is_refused() -> None:
    class Shifted(type(small("llama"))):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.7
            return output

    with pytest.raises(D2OError, match="its own logits differ"):
        decoder_of(Shifted(small("llama").config))


def test_lora_on_the_head_is_refused_and_elsewhere_is_seen() -> None:
    from peft import LoraConfig, get_peft_model

    with_head = get_peft_model(small("llama"), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(D2OError, match="lm_head"):
        head_of(with_head)
    model = get_peft_model(small("llama"), LoraConfig(target_modules=["q_proj"]))
    assert base_of(model) is model.get_base_model()
    tokens = torch.tensor([[3, 4, 5]])
    before = decoder_of(model)(input_ids=tokens).last_hidden_state
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    assert not torch.equal(before, decoder_of(model)(input_ids=tokens).last_hidden_state)


def test_packing_refuses_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        pack([Example([], [1], [[2]], [])], 0)
    with pytest.raises(ValueError, match="anchor"):
        pack([Example([1], [1], [], [])], 0)
    with pytest.raises(ValueError, match="needs at least one"):
        pack([Example([1], [1], [[]], [])], 0)
    with pytest.raises(ValueError, match="prompt 1 has 0 reference log-probabilities for 2 responses"):
        pack([Example([1], [1], [[2]], [-1.0, -2.0]), Example([1], [1], [[2]], [])], 0)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_row_are_refused(kind: str) -> None:
    """Past the original length, a response's log-probability would depend on the other prompts of its batch."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = small("llama", rope_parameters=rope, max_position_embeddings=32 if kind == "dynamic" else 128)
    check_positions(model, D2OConfig(max_length=32, max_completion_length=8))
    with pytest.raises(D2OError, match=rf"max_length is 33, but past 32 tokens LlamaForCausalLM .*{kind}"):
        check_positions(model, D2OConfig(max_length=33, max_completion_length=8))
    check_positions(small("llama"), D2OConfig(max_length=4096))


def test_scores_belong_to_their_prompt() -> None:
    one = Example([3], [4, 2], [[5, 2], [6, 2]], [-1.0] * 4)
    two = Example([3], [4, 2], [[5, 2], [6, 2]], [-1.0] * 2)
    with pytest.raises(ValueError, match="prompt 0 has 4 reference log-probabilities for 3 responses"):
        pack([one, two], pad_token_id=0)

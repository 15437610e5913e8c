"""The sampler draws what a model's forward gives, whatever the model does with padding and caches, or says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    LogitsProcessorList,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)

from benchmarks.samplers import chi_square_excess
from d2o_fast.errors import D2OError
from d2o_fast.sampling import generate as sampling
from d2o_fast.sampling.generate import sample_responses
from sharing_cases import MODELS, build
from tiny import next_token, peaked_model, tiny_model

SHORT, LONG = [10, 11], list(range(20, 60))
VOCAB = 61
_IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def wide(model: nn.Module) -> nn.Module:
    """Weights at which padding and states weigh in."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return model.eval()


def rwkv(**config: Any) -> nn.Module:
    ids = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 256}
    return wide(RwkvForCausalLM(RwkvConfig(**{**ids, **settings, **config})))


def bart() -> nn.Module:
    """Its decoder counts positions from the padding's start."""
    settings = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    return wide(BartForCausalLM(BartConfig(**settings, **_IDS, decoder_start_token_id=2, forced_eos_token_id=2)))


def minimax() -> nn.Module:
    """Its cache is a DynamicCache by its class's parent, and keeps more than keys and values."""
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 16}
    layers = {"layer_types": ["linear_attention", "full_attention"]}
    return wide(MiniMaxForCausalLM(MiniMaxConfig(**settings, **more, **layers, **_IDS)))


def draw(model: nn.Module, prompts: list[list[int]], num: int = 3, **options: Any) -> list[list[list[int]]]:
    return sample_responses(
        model, prompts, num, **{"max_new_tokens": 4, "eos_token_ids": [2], "pad_token_id": 0, "seed": 0, **options}
    )


def way_of(model: nn.Module) -> sampling.Way:
    return sampling._ways[model][model.config._attn_implementation]


def excess(model: nn.Module, responses: list[list[int]]) -> float:
    """The larger chi_square_excess of first tokens after SHORT, and of second ones after the commonest first."""
    first = torch.tensor([response[0] for response in responses])
    counts = torch.bincount(first, minlength=VOCAB).double()
    found = abs(chi_square_excess(counts, next_token(model, SHORT)))
    if max(map(len, responses)) == 1:
        return found
    commonest = int(counts.where(torch.arange(VOCAB) != 2, 0.0).argmax())
    second = torch.tensor([response[1] for response in responses if response[0] == commonest])
    assert len(second) > 100
    after = torch.bincount(second, minlength=VOCAB).double()
    return max(found, abs(chi_square_excess(after, next_token(model, [*SHORT, commonest]))))


@pytest.mark.parametrize(("make", "shows_after"), [(rwkv, 1), (bart, 1), (minimax, 2)])
def test_a_short_prompt_beside_a_long_one_gives_its_own_distribution(make: Any, shows_after: int) -> None:
    model = make()
    right, _ = draw(model, [SHORT, LONG], 1500, max_new_tokens=2)
    assert not way_of(model).together
    assert excess(model, right) < 4
    sampling._ways[model][model.config._attn_implementation] = sampling.WAYS[0]
    wrong, _ = draw(model, [SHORT, LONG], 1500, max_new_tokens=shows_after)
    assert excess(model, wrong) > 10, "the statistic must see the way that the probe refused"


def test_prompts_of_one_length_come_back_in_their_order() -> None:
    model = rwkv()
    prompts = [LONG, SHORT, [12, 13, 14], [15, 16]]
    together = draw(model, prompts)
    assert [len(responses) for responses in together] == [3, 3, 3, 3]
    assert draw(model, prompts) == together, "the seed decides"
    alone = sample_responses(model, [SHORT, [15, 16]], 3, max_new_tokens=4, eos_token_ids=[2], pad_token_id=0, seed=0)
    assert alone == [together[1], together[3]]  # the shortest are drawn first


@pytest.mark.parametrize("name", [*MODELS, "bloom", "gpt2", "mamba", "mixtral", "falcon_h1"])
def test_models_that_heed_the_mask_draw_together(name: str) -> None:
    other = {
        "bloom": {"n_layer": 2, "n_head": 4},
        "gpt2": {"n_positions": 64},
        "mamba": {"state_size": 8},
        "mixtral": {"num_local_experts": 4},
        "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    }
    model = build(name, **other[name]) if name in other else build(MODELS[name][0], **MODELS[name][1])
    draw(model, [SHORT, LONG[:9]])
    assert way_of(model) == sampling.WAYS[0]


def test_the_way_is_said_once_and_tried_once(caplog: pytest.LogCaptureFixture) -> None:
    sampling._said.clear()
    model, calls = rwkv(), []
    with caplog.at_level("WARNING", logger="d2o_fast"):
        draw(model, [SHORT, LONG])
        model.register_forward_hook(lambda *args: calls.append(1))
        draw(model, [SHORT, LONG])
        draw(rwkv(), [SHORT, LONG])
    (record,) = caplog.records
    assert "RwkvForCausalLM draws the prompts of one length at a time" in record.message
    assert "padded" in record.message
    assert len(calls) == 2 * 4  # two lengths, four tokens


def test_the_first_draw_is_that_of_a_model_which_was_probed_before() -> None:
    """A run that is killed and started again probes again, and must come to the same draws."""
    model = peaked_model()
    first = draw(model, [SHORT, LONG])
    assert draw(model, [SHORT, LONG]) == first
    assert draw(peaked_model(), [SHORT, LONG]) == first


@pytest.mark.parametrize("prompts", [[[5]], [[5], [6]], [[5, 5]], [[5], LONG]], ids=str)
def test_the_shortest_prompts_are_probed_too(prompts: list[list[int]]) -> None:
    model = tiny_model()
    assert len(draw(model, prompts, max_new_tokens=1)) == len(prompts)
    assert way_of(model) == sampling.WAYS[0]


def test_a_wrong_cache_is_left_out() -> None:
    """A model that reads something else from its cache than it put there is drawn from without one."""
    model = peaked_model()
    plain = model.model.forward

    def forgetful(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length():
            past_key_values.layers[0].values.mul_(-1)
        return plain(*args, past_key_values=past_key_values, **kwargs)

    model.model.forward = forgetful
    draw(model, [SHORT, LONG])
    assert way_of(model) == sampling.WAYS[2]


def test_a_generate_of_its_own_is_refused_by_name() -> None:
    """XLM puts a mask token behind the text before each draw."""
    settings = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True, "mask_token_id": 5}
    model = wide(XLMWithLMHeadModel(XLMConfig(vocab_size=VOCAB, **settings)))
    with pytest.raises(D2OError, match="responses cannot be drawn from XLMWithLMHeadModel in this process"):
        draw(model, [SHORT, LONG])


def test_processors_that_a_model_adds_are_refused() -> None:
    class Suppressing(type(tiny_model())):  # type: ignore[misc]
        def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
            return LogitsProcessorList([lambda ids, scores: scores.index_fill(1, torch.tensor([7]), -torch.inf)])

    model = tiny_model()
    model.__class__ = Suppressing
    with pytest.raises(D2OError, match="not its forward's"):
        draw(model, [SHORT, LONG])


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny_model()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(D2OError, match=r"1 of its \d+ parameters hold values that are NaN or infinite.*lm_head.weight"):
        draw(model, [SHORT])


def test_probabilities_that_are_not_finite_are_no_traceback() -> None:
    model = tiny_model()
    draw(model, [SHORT])
    model.lm_head.weight.data[5] = 3e38
    with pytest.raises(D2OError, match="probabilities that are NaN or infinite"):
        draw(model, [SHORT])

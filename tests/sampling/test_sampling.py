"""The sampler draws from softmax(logits) and from nothing else, whatever the model's generation_config says."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from benchmarks.samplers import chi_square_excess
from d2o_fast.errors import D2OError
from d2o_fast.sampling import generate as sampling
from d2o_fast.sampling.generate import sample_responses
from tiny import VOCAB_SIZE, next_token, peaked_model, tiny_model

EOS, PAD = 2, 0
PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]


def hostile() -> GenerationConfig:
    """Everything a checkpoint might carry that changes what generate draws."""
    return GenerationConfig(
        do_sample=True,
        top_k=5,
        temperature=0.3,
        top_p=0.5,
        min_p=0.2,
        repetition_penalty=2.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(20, 120)),
        begin_suppress_tokens=[EOS],
        bad_words_ids=[[15]],
        min_new_tokens=3,
        max_new_tokens=4,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def draw(model, prompts=PROMPTS, num=4, **options):
    defaults = {"max_new_tokens": 6, "eos_token_ids": [EOS], "pad_token_id": PAD, "seed": 0}
    return sample_responses(model, prompts, num, **{**defaults, **options})


def excess(model, prompt, responses, temperature=1.0) -> tuple[float, float]:
    """chi_square_excess of the first tokens, and of the second ones after the likeliest first."""
    probabilities = next_token(model, prompt, temperature)
    first = torch.tensor([response[0] for response in responses])
    counts = torch.bincount(first, minlength=VOCAB_SIZE).double()
    likeliest = int(probabilities.where(torch.arange(VOCAB_SIZE) != EOS, 0.0).argmax())
    second = torch.tensor([response[1] for response in responses if response[0] == likeliest])
    second_counts = torch.bincount(second, minlength=VOCAB_SIZE).double()
    assert second_counts.sum() > 100
    return (
        chi_square_excess(counts, probabilities),
        chi_square_excess(second_counts, next_token(model, [*prompt, likeliest], temperature)),
    )


def test_frequencies_are_the_softmax():
    model = peaked_model()
    model.generation_config = hostile()
    responses = draw(model, num=1500, max_new_tokens=2)
    for prompt, of_prompt in zip(PROMPTS, responses, strict=True):
        first, second = excess(model, prompt, of_prompt)
        assert abs(first) < 4, f"first tokens of {prompt}: {first}"
        assert abs(second) < 4, f"second tokens of {prompt}: {second}"


def test_temperature_and_top_p():
    model = peaked_model()
    prompt = PROMPTS[0]
    (responses,) = draw(model, [prompt], num=1500, max_new_tokens=2, temperature=1.5)
    assert max(map(abs, excess(model, prompt, responses, 1.5))) < 4
    assert abs(excess(model, prompt, responses, 1.0)[0]) > 4, "the statistic must see a wrong temperature"
    (responses,) = draw(model, [prompt], num=300, max_new_tokens=1, top_p=0.8)
    order = next_token(model, prompt).sort(descending=True)
    nucleus = set(order.indices[: int((order.values.cumsum(0) < 0.8).sum()) + 1].tolist())
    assert {response[0] for response in responses} <= nucleus
    assert len(nucleus) < VOCAB_SIZE


def test_the_statistic_sees_what_generate_does_by_itself():
    """Without our settings the hostile configuration leaks into a fresh GenerationConfig: why the module exists."""
    model = peaked_model()
    model.generation_config = hostile()
    model.generation_config.min_new_tokens = None
    fresh = GenerationConfig(do_sample=True, max_new_tokens=2, num_return_sequences=1500)
    torch.manual_seed(0)
    output = model.generate(torch.tensor([PROMPTS[0]]), generation_config=fresh, pad_token_id=PAD)[:, 4:]
    first = torch.bincount(output[:, 0], minlength=VOCAB_SIZE).double()
    assert int((first > 0).sum()) <= 5
    assert chi_square_excess(first, next_token(model, PROMPTS[0])) > 100


def test_the_seed_decides_and_the_global_generator_does_not_move():
    model = peaked_model()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = draw(model, num=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(10)
    assert draw(model, num=5) == first
    assert draw(model, num=5, seed=1) != first
    assert len({tuple(response) for response in first[0]}) > 1, "siblings are drawn independently"


def test_the_model_is_left_as_it_was():
    model = peaked_model()
    model.train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    own = model.generation_config = hostile()
    training = [module.training for module in model.modules()]
    attention = model.config._attn_implementation
    drawn = draw(model)
    assert [module.training for module in model.modules()] == training
    assert model.generation_config is own
    assert model.config._attn_implementation == attention
    model.gradient_checkpointing_disable()
    assert draw(model.eval()) == drawn


def test_dropout_is_off_while_sampling():
    assert draw(peaked_model(attention_dropout=0.5).train()) == draw(peaked_model())


def test_responses_end_with_eos_or_at_their_length():
    model = tiny_model()
    stops = [EOS, 17, 40, 41, 42, 43, 44, 45, 46]
    responses = draw(model, num=40, max_new_tokens=8, eos_token_ids=stops)
    assert [len(of_prompt) for of_prompt in responses] == [40, 40, 40]
    lengths = set()
    for response in (response for of_prompt in responses for response in of_prompt):
        assert not set(response[:-1]) & set(stops)
        assert len(response) == 8 or response[-1] in stops
        assert len(response) >= 1
        lengths.add(len(response))
    assert len(lengths) > 3


def test_padding_is_a_token_like_any_other():
    """Where the pad token is EOS, or is drawn as a token of its own, nothing is cut that was drawn."""
    model = tiny_model()
    with torch.no_grad():  # PAD becomes the likeliest token
        model.lm_head.weight[PAD] = model.lm_head.weight[EOS] + 1e-3
    responses = draw(model, num=200, max_new_tokens=8)
    drawn = [response for of_prompt in responses for response in of_prompt]
    assert any(PAD in response[:-1] for response in drawn)
    as_eos = draw(model, num=200, max_new_tokens=8, pad_token_id=EOS)
    assert all(EOS not in response[:-1] for of_prompt in as_eos for response in of_prompt)


def test_padding_does_not_change_what_a_prompt_gives():
    """A short prompt beside a long one gives the distribution that it gives alone."""
    model = peaked_model()
    _, short = draw(model, [list(range(20, 60)), [9]], num=1500, max_new_tokens=2)
    assert max(map(abs, excess(model, [9], short))) < 4


@pytest.mark.parametrize("config", [{}, {"model_type": "mistral", "sliding_window": 4}], ids=["full", "window"])
def test_prompts_are_read_once_and_the_draws_stay(config, monkeypatch):
    """Keys and values of the prompts are repeated, not the prompts; each response is what it would have been."""
    model = peaked_model() if not config else mistral(**config)
    prompts, read = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16]], []
    draw(model)  # the first draw probes the model
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, ids: read.append(tuple(ids[0].shape)))
    drawn = [draw(model, prompts, seed=seed) for seed in range(8)]
    assert read[:3] == [(3, 6), (12, 1), (12, 1)]
    monkeypatch.setattr(sampling, "_prompts_read_once", lambda *args: None)
    read.clear()
    assert [draw(model, prompts, seed=seed) for seed in range(8)] == drawn
    assert read[0] == (12, 7)
    hook.remove()


def mistral(**config) -> torch.nn.Module:
    settings = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, **settings, **heads)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.3)
    return model


def test_fewer_responses_are_an_error(monkeypatch):
    model = peaked_model()
    draw(model)
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: generate(*args, **kwargs)[:-1])
    with pytest.raises(D2OError, match="returned 11 responses instead of 3 x 4"):
        draw(model)


def test_a_response_cut_by_something_else_is_an_error(monkeypatch):
    model = peaked_model()
    draw(model)
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: generate(*args, **kwargs)[:, :-1])
    with pytest.raises(D2OError, match="stopped after 5 tokens without an EOS token"):
        draw(model, num=20)


def test_arguments():
    model = tiny_model()
    assert draw(model, []) == []
    for options, message in (
        ({"num": 0}, "at least 1"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"prompts": [[1], []]}, "an empty prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(model, **options)


@pytest.mark.gpu
def test_frequencies_are_the_softmax_on_a_gpu():
    model = peaked_model().cuda()
    model.generation_config = hostile()
    before = torch.cuda.get_rng_state()
    responses = draw(model, num=1500, max_new_tokens=2)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert draw(model, num=1500, max_new_tokens=2) == responses
    model.cpu()
    for prompt, of_prompt in zip(PROMPTS, responses, strict=True):
        assert max(map(abs, excess(model, prompt, of_prompt))) < 4

"""Draws responses from a model's own distribution. The anchors of D2O are such responses.

With temperature 1 and top_p 1 the next token is drawn from ``softmax(logits)`` and nothing else. This is not the
default of transformers: ``generate`` keeps only the 50 likeliest tokens, and takes fields that the caller leaves unset
from the model's ``generation_config`` (top_k, penalties, suppressed or forced tokens, length limits). This module
unsets every field first and then gives the few that matter explicitly.

K: responses of one prompt.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from d2o_fast.errors import D2OError
from d2o_fast.model.parts import evaluating


def sample_responses(
    model: Any,
    prompts: Sequence[Sequence[int]],
    num: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    seed: int,
) -> list[list[list[int]]]:
    """K = ``num`` responses for every prompt, as token ids without the prompt.

    Each ends with one of ``eos_token_ids`` unless it is ``max_new_tokens`` long. A model in training mode is switched
    to evaluation (no dropout, no activation checkpointing) and back.

    Args:
        model: a causal language model of transformers (not a PeftModel: pass its base model).
        prompts: token ids; no padding, any lengths, none empty.
        seed: decides the result on one device, together with the other arguments. The global generators keep their
            state.

    Raises:
        D2OError: too few responses, or one that neither an EOS token nor its length ended.
        ValueError: an empty prompt, a number below 1.
    """
    if num < 1 or max_new_tokens < 1:
        raise ValueError(f"num ({num}) and max_new_tokens ({max_new_tokens}) must be at least 1")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("an empty prompt: there is no position that predicts the first token")
    if not prompts:
        return []
    settings = GenerationConfig(
        do_sample=True,
        num_beams=1,
        temperature=temperature,
        top_k=0,
        top_p=top_p,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        max_new_tokens=max_new_tokens,
        num_return_sequences=num,
        eos_token_id=list(eos_token_ids),
        pad_token_id=pad_token_id,
        use_cache=True,
    )
    with evaluating(model), _no_generation_config(model), _seeded(seed, model.device), torch.no_grad():
        responses = _generate(model, [list(prompt) for prompt in prompts], num, settings)
    for prompt_responses in responses:
        for i, response in enumerate(prompt_responses):
            prompt_responses[i] = _until_eos(response, set(eos_token_ids), max_new_tokens)
    return responses


@contextlib.contextmanager
def _no_generation_config(model: Any) -> Iterator[None]:
    # generate() fills every None in its configuration from model.generation_config, custom entries included. Passing
    # each field explicitly would mean following transformers' list of fields; an empty model.generation_config fills
    # nothing.
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _generate(model: Any, prompts: list[list[int]], num: int, settings: GenerationConfig) -> list[list[list[int]]]:
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), settings.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):  # padded on the left: the last position of every row predicts
        input_ids[i, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[i, width - len(prompt) :] = 1
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    options: dict[str, Any] = {}
    cache = _prompts_read_once(model, input_ids, attention_mask, settings)
    if cache is not None:
        cache.batch_repeat_interleave(num)
        input_ids, attention_mask = (x.repeat_interleave(num, dim=0) for x in (input_ids, attention_mask))
        settings = copy.deepcopy(settings)
        settings.num_return_sequences = 1
        options = {"past_key_values": cache}
    output = model.generate(input_ids, attention_mask=attention_mask, generation_config=settings, **options)
    if output.shape[0] != len(prompts) * num:
        raise D2OError(f"generate returned {output.shape[0]} responses instead of {len(prompts)} x {num}")
    rows = output[:, width:].tolist()
    return [rows[i * num : (i + 1) * num] for i in range(len(prompts))]


def _prompts_read_once(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: GenerationConfig
) -> DynamicCache | None:
    """Keys and values of all prompt positions but the last. ``generate`` continues from them.

    Without them, generate repeats the prompts before it reads them. Returns None if each prompt gets one response, if a
    prompt has only one position, and for models that keep more than keys and values (Mamba), because their states may
    be wrong when repeated.
    """
    if settings.num_return_sequences == 1 or int(attention_mask.sum(1).min()) == 1:
        return None
    reading = GenerationConfig(
        do_sample=False,
        max_new_tokens=1,
        eos_token_id=settings.eos_token_id,
        pad_token_id=settings.pad_token_id,
        return_dict_in_generate=True,
    )
    output = model.generate(input_ids[:, :-1], attention_mask=attention_mask[:, :-1], generation_config=reading)
    cache = output.get("past_key_values")
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    if not isinstance(cache, DynamicCache) or any(type(layer) not in known for layer in cache.layers):
        return None
    return cache


def _until_eos(response: list[int], eos_token_ids: set[int], max_new_tokens: int) -> list[int]:
    # generate fills a finished row with padding. The first EOS ends the response and is part of it.
    for i, token in enumerate(response):
        if token in eos_token_ids:
            return response[: i + 1]
    if len(response) != max_new_tokens:
        raise D2OError(
            f"a response stopped after {len(response)} tokens without an EOS token, before max_new_tokens "
            f"({max_new_tokens}): something besides {sorted(eos_token_ids)} ended it"
        )
    return response

"""Draws responses from a model's own distribution. The anchors of D2O are such responses.

With temperature 1 and top_p 1 the next token is drawn from ``softmax(logits)`` and nothing else. This is not the
default of transformers: ``generate`` keeps only the 50 likeliest tokens, and takes fields that the caller leaves unset
from the model's ``generation_config`` (top_k, penalties, suppressed or forced tokens, length limits). This module
unsets every field first and then gives the few that matter explicitly.

``generate`` also relies on the model: on its heed of the mask over padding, its positions, its cache. ``_way_of`` draws
a few tokens and compares their probabilities with those of a plain forward, before the first draw of a model.

K: responses of one prompt.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from d2o_fast.errors import D2OError
from d2o_fast.model.parts import evaluating
from d2o_fast.model.probes import TRIES, distance, exact, refuse_non_finite, rounding

logger = logging.getLogger("d2o_fast")

PROBE_PROMPT, PROBE_DRAWN = 16, 3  #: tokens of a probe's longest prompt, and most tokens drawn after it


class Way(NamedTuple):
    """One way to draw."""

    text: str
    together: bool  #: prompts of any length in one batch, padded on the left; else those of one length
    use_cache: bool


WAYS = (
    Way("prompts of any length together", True, True),
    Way("the prompts of one length at a time, unpadded", False, True),
    Way("prompts of any length together, without a cache (slow)", True, False),
    Way("the prompts of one length at a time, unpadded and without a cache (slow)", False, False),
)
_ways: weakref.WeakKeyDictionary[Any, dict[str, Way]] = weakref.WeakKeyDictionary()  # by model, then by its attention
_said: set[str] = set()


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
        D2OError: the weights are not finite; the model's ``generate`` draws from other probabilities than its forward
            gives; too few responses, or one that neither an EOS token nor its length ended.
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
    refuse_non_finite(model)
    with _no_generation_config(model):
        way = _way_of(model, prompts, settings)
        with evaluating(model), _seeded(seed, model.device), torch.no_grad():
            responses = _draw(model, prompts, num, settings, way)
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


def _way_of(model: Any, prompts: Sequence[Sequence[int]], settings: GenerationConfig) -> Way:
    """The first of ``WAYS`` that draws from the probabilities of the model's forward. Warns of any but the first.

    Raises:
        D2OError: none has.
    """
    known, attention = _ways.setdefault(model, {}), str(model.config._attn_implementation)
    if attention in known:
        return known[attention]
    longest, name, reasons = max(prompts, key=len), type(model).__name__, dict[str, None]()
    for way in WAYS:
        faults = []
        for start in range(TRIES):
            fault = _fault(model, longest[start:] or longest, settings, way, seed=start)
            if fault is None:
                break
            faults.append(fault)
        else:
            reasons[faults[0]] = None
            continue
        known[attention] = way
        text = f"{name} draws {way.text}. Otherwise {'; '.join(reasons)}"
        if reasons and text not in _said:
            _said.add(text)
            logger.warning("%s", text)
        return way
    raise D2OError(
        f"responses cannot be drawn from {name} in this process: {'; '.join(reasons)}. Draw them on a server, or give "
        "anchors in the data"
    )


def _fault(model: Any, prompt: Sequence[int], settings: GenerationConfig, way: Way, seed: int) -> str | None:
    """Draws a few tokens after ``prompt`` and after its first half; a reason if their probabilities are not right."""
    prompt = list(prompt[:PROBE_PROMPT]) * (1 if len(prompt) > 1 else 2)
    settings = copy.deepcopy(settings)
    settings.update(
        temperature=1.0,
        top_p=1.0,
        eos_token_id=None,
        num_return_sequences=2,
        max_new_tokens=min(PROBE_DRAWN, settings.max_new_tokens),
        return_dict_in_generate=True,
        output_scores=True,
        use_cache=way.use_cache,
    )
    both = [prompt, prompt[: len(prompt) // 2]]
    with exact(model), _seeded(seed, model.device):
        for batch in [both] if way.together else [[one] for one in both]:
            try:
                output = _generate(model, batch, 2, settings)
            except Exception as error:  # a model may raise anything on a batch or a cache that it does not know
                return f"its generate failed ({type(error).__name__}: {error})"
            scores = torch.stack(output.scores, 1)  # (2 * prompts, tokens drawn, vocabulary)
            drawn = output.sequences[:, -scores.shape[1] :]
            for i, ids in enumerate(batch):
                pair = slice(2 * i, 2 * i + 2)
                rows = torch.cat([torch.tensor([ids] * 2, device=drawn.device), drawn[pair, :-1]], 1)
                wanted = model(input_ids=rows, use_cache=False).logits[:, len(ids) - 1 :].double().log_softmax(-1)
                found = scores[pair].double().log_softmax(-1)
                masked = wanted < -1e3  # ids that the model never gives
                apart = distance(found.masked_fill(masked, 0), wanted.masked_fill(masked, 0))
                if not apart <= rounding(model, scores):
                    how = f"{'' if way.together else 'un'}padded, with{'' if way.use_cache else 'out'} a cache"
                    return f"the log-probabilities are not its forward's ({how}: apart by {apart:.1e} of their size)"
    return None


def _draw(
    model: Any, prompts: Sequence[Sequence[int]], num: int, settings: GenerationConfig, way: Way
) -> list[list[list[int]]]:
    settings.use_cache = way.use_cache
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(0 if way.together else len(prompt), []).append(i)
    responses: list[list[list[int]]] = [[] for _ in prompts]
    for _, group in sorted(groups.items()):
        try:
            output = _generate(model, [list(prompts[i]) for i in group], num, settings)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise D2OError(f"{type(model).__name__} gives probabilities that are NaN or infinite: {error}") from error
        if output.shape[0] != len(group) * num:
            raise D2OError(f"generate returned {output.shape[0]} responses instead of {len(group)} x {num}")
        rows = output[:, max(len(prompts[i]) for i in group) :].tolist()
        for j, i in enumerate(group):
            responses[i] = rows[j * num : (j + 1) * num]
    return responses


def _generate(model: Any, prompts: list[list[int]], num: int, settings: GenerationConfig) -> Any:
    """The result of ``generate`` for K = ``num`` responses of every prompt, with the prompts padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), settings.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):  # the last position of every row predicts
        input_ids[i, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[i, width - len(prompt) :] = 1
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    options: dict[str, Any] = {}
    cache = _prompts_read_once(model, input_ids, attention_mask, settings)
    settings = copy.deepcopy(settings)
    settings.num_return_sequences = num
    if cache is not None:
        cache.batch_repeat_interleave(num)
        input_ids, attention_mask = (x.repeat_interleave(num, dim=0) for x in (input_ids, attention_mask))
        settings.num_return_sequences = 1
        options = {"past_key_values": cache}
    return model.generate(input_ids, attention_mask=attention_mask, generation_config=settings, **options)


def _prompts_read_once(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: GenerationConfig
) -> DynamicCache | None:
    """Keys and values of all prompt positions but the last. ``generate`` continues from them.

    Without them, generate repeats the prompts before it reads them. Returns None if each prompt gets one response, if a
    prompt has only one position, if the cache stays empty (OpenAI GPT), and unless the cache and its layers are of a
    class that is known to keep only keys and values: a subclass (MiniMax) or another layer (Mamba) may keep states that
    are wrong when repeated.
    """
    if settings.num_return_sequences == 1 or not settings.use_cache or int(attention_mask.sum(1).min()) == 1:
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
    if type(cache) is not DynamicCache or any(type(layer) not in known for layer in cache.layers):
        return None
    return cache if cache.get_seq_length() else None


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

"""Evaluates a model on held-out prompts: loss, rewards, and responses that the user's function judges.

A judge is any ``judge(prompt: str, response: str)`` that returns a label (``str``) or a score (a number, higher is
better). If it has an attribute ``labels``, all of these are reported, even with a share of 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Example, Row, prompt_key, prompt_text
from d2o_fast.data.tokens import stop_token_ids, tokenize_rows
from d2o_fast.errors import D2OError, DataError, shown
from d2o_fast.forward.sharing import choose_sharing
from d2o_fast.functions import call_function, is_finite, load_function, name_of, pair_text
from d2o_fast.model.parts import autocast, base_of, decoder_of, evaluating, head_of, pad_token_id
from d2o_fast.sampling.generate import sample_responses
from d2o_fast.training.metrics import PromptMeans
from d2o_fast.training.step import batch_loss

Judge = Callable[[str, str], Any]


def load_judge(config: D2OConfig) -> Judge | None:
    """The function that ``config.judge`` names; None if it names none.

    Raises:
        D2OError: there is no such function, it does not take a prompt and a response, or its ``labels`` are no texts.
    """
    if config.judge is None:
        return None
    judge = load_function(config.judge)
    _labels(judge)
    return judge


def judge_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], judge: Judge, config: D2OConfig
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Draws ``judge_num_generations`` responses for each distinct prompt of ``rows`` and judges them.

    It uses the first ``judge_max_prompts`` prompts. The draws follow the model's own distribution at ``temperature``
    and ``top_p``, seeded by ``sampling_seed``. The model keeps its mode.

    Returns:
        Metrics: the share of responses under ``judge/<label>``, or the mean score under ``judge/score``. Samples: one
        dict per response with ``prompt``, ``response`` and ``label`` or ``score``.

    Raises:
        D2OError: there are no rows; the judge raises an exception, or returns something else than labels or numbers,
            or both.
    """
    labels = _labels(judge)
    rows = _distinct_prompts(rows, config.judge_max_prompts)
    if not rows:
        raise D2OError("there are no held-out prompts to judge; set eval_dataset_name or eval_fraction")
    prompts = [example.prompt_ids for example in tokenize_rows(rows, tokenizer, config)]
    stops = stop_token_ids(tokenizer, base_of(model), rows)
    samples = list[dict[str, Any]]()
    for start in range(0, len(rows), config.sampling_batch_size):
        batch = slice(start, start + config.sampling_batch_size)
        with autocast(config, model.device):
            drawn = sample_responses(
                base_of(model),
                prompts[batch],
                config.judge_num_generations,
                max_new_tokens=config.max_completion_length,
                temperature=config.temperature,
                top_p=config.top_p,
                eos_token_ids=stops,
                pad_token_id=pad_token_id(tokenizer),
                seed=config.sampling_seed + start,
            )
        for row, responses in zip(rows[batch], drawn, strict=True):
            prompt = prompt_text(row)
            for ids in responses:
                response = str(tokenizer.decode(ids, skip_special_tokens=True))
                kind, verdict = _verdict(judge, row, prompt, response)
                if samples and kind not in samples[0]:
                    found = f"judge '{name_of(judge)}' returned labels for some responses and scores for others"
                    raise DataError(row.source, row.index, None, found, "It must keep to one")
                samples.append({"prompt": prompt, "response": response, kind: verdict})
    return _shares(samples, labels), samples


def _distinct_prompts(rows: Sequence[Row], most: int) -> list[Row]:
    distinct: dict[str, Row] = {}  # a prompt with two negatives has two rows
    for row in rows:
        distinct.setdefault(prompt_key(row), row)
        if len(distinct) == most:
            break
    return list(distinct.values())


def _labels(judge: Judge) -> tuple[str, ...]:
    found = getattr(judge, "labels", ())
    if not isinstance(found, list | tuple | set | frozenset) or not all(isinstance(label, str) for label in found):
        raise D2OError(f"the judge's attribute labels is {shown(found)}; it must be a list of texts")
    return tuple(found)


def _verdict(judge: Judge, row: Row, prompt: str, response: str) -> tuple[str, Any]:
    """("label", text) or ("score", number)"""
    what = f"judge '{name_of(judge)}'"
    verdict = call_function(judge, what, prompt, response, row.source, row.index)
    if isinstance(verdict, str):
        return "label", verdict.encode("utf-8", "backslashreplace").decode()  # no file holds half a character
    if is_finite(verdict):
        return "score", float(verdict)
    found = f"{what} returned {shown(verdict)} for {pair_text(prompt, response)}"
    raise DataError(row.source, row.index, None, found, "It must return a label (str) or a score (a finite number)")


def _shares(samples: list[dict[str, Any]], labels: tuple[str, ...]) -> dict[str, float]:
    if "label" in samples[0]:
        counts = Counter(sample["label"] for sample in samples)
        return {f"judge/{label}": counts[label] / len(samples) for label in dict.fromkeys((*labels, *sorted(counts)))}
    return {"judge/score": sum(sample["score"] for sample in samples) / len(samples)}


def evaluate_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    rows: Sequence[Row],
    config: D2OConfig,
    shared: bool | None = None,
    decoder: nn.Module | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Loss and rewards on scored ``examples``, and verdicts on the prompts of ``rows`` if ``config.judge`` is set.

    Args:
        shared: whether prompts can be read once for all their responses; found out here if None.
        decoder: the result of ``decoder_of(model)``; computed here if None.

    Returns:
        ``eval_...`` metrics, including ``eval_judge/...``; the judged samples, [] without a judge.
    """
    head, pad = head_of(model), pad_token_id(tokenizer)
    decoder = decoder_of(model) if decoder is None else decoder
    means, size = PromptMeans(head.weight.device), config.per_device_eval_batch_size
    if shared is None:
        shared = choose_sharing(model, decoder, examples, config, pad).on
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            means.add(*batch_loss(decoder, head, part, pad, config, len(part), shared), len(part))
    metrics, samples = means.read(), list[dict[str, Any]]()
    judge = load_judge(config)
    if judge is not None:
        judged, samples = judge_model(model, tokenizer, rows, judge, config)
        metrics |= judged
    return {f"eval_{name}": value for name, value in metrics.items()}, samples

"""What a server that speaks OpenAI's HTTP API is asked for responses, and what its answers mean.

vLLM and SGLang return the ids of the tokens they drew, where ``return_token_ids`` asks for them; others return text
alone, which has to be made into tokens again.

K: responses of one prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Row
from d2o_fast.data.tokens import Encoder
from d2o_fast.errors import D2OError, DataError, shortened


@dataclass(frozen=True)
class ServerPrompt:
    """A prompt as the server gets it, the tokens that it must become there, and its place in the data."""

    content: str | list[dict[str, Any]] | list[int]
    token_ids: list[int]
    place: str

    @property
    def path(self) -> str:
        chat = isinstance(self.content, list) and isinstance(self.content[0], dict)
        return "/chat/completions" if chat else "/completions"

    def field(self) -> dict[str, Any]:
        return {"messages" if self.path.startswith("/chat") else "prompt": self.content}


@dataclass(frozen=True)
class Draw:
    """One response.

    Attributes:
        text: without special tokens.
        ended: whether a stop token ended it, and not its length.
        token_ids: the tokens that were drawn, if the server tells; the stop token is among them or is not.
        logps: their log-probabilities in nats, if they were asked for and the server tells.
    """

    text: str
    ended: bool
    token_ids: tuple[int, ...] | None = None
    logps: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Sampling:
    """How to draw; as ``sample_responses`` takes it. ``seed`` is ``sampling_seed`` and what follows it (the shard)."""

    max_new_tokens: int
    temperature: float
    top_p: float
    eos_token_ids: tuple[int, ...]
    seed: tuple[int | str, ...]


class TransientError(Exception):
    """A fault that may be over at the next attempt; ``after``: seconds that the server asks to wait."""

    def __init__(self, found: str, after: float = 0.0) -> None:
        super().__init__(found)
        self.after = after


def request_seed(*parts: int | str) -> int:
    """53 bits, which every JSON reader keeps: of ``sampling_seed``, shard, row within it, draw.

    The row is -1 and -2 for what is asked before the first one.
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11


# --- Asked -------------------------------------------------------------------------------------------------------

#: How a server takes sampling parameters.
RequestForm = Callable[[Sampling], dict[str, Any]]


def as_fields_for_ids(sampling: Sampling) -> dict[str, Any]:
    """sampling parameters go as fields of the request, and token ids are asked for (vLLM, SGLang)"""
    return {**as_fields(sampling), "return_token_ids": True}


def as_fields(sampling: Sampling) -> dict[str, Any]:
    """sampling parameters go as fields of the request"""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,  # the whole vocabulary
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(sampling.eos_token_ids),
    }


def as_generation_config(sampling: Sampling) -> dict[str, Any]:
    """sampling parameters go as generation_config (transformers serve)"""
    # Fields that are left out would be filled in from the served model's own generation_config.
    settings = {
        "do_sample": True,
        "num_beams": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "min_length": 0,
        "eos_token_id": list(sampling.eos_token_ids),
    }
    return {"generation_config": json.dumps(settings)}


#: in the order in which they are tried
FORMS: tuple[RequestForm, ...] = (as_fields_for_ids, as_fields, as_generation_config)


# --- Answered ----------------------------------------------------------------------------------------------------


def parse(answer: Any, prompt: ServerPrompt, n: int, server: str) -> list[Draw]:
    """The draws in an answer to a request for ``n`` of them: between 1 and ``n``.

    Raises:
        Passing: something else than responses.
        D2OError: more than asked for, or to a prompt that was read as other tokens.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices) or not choices:
        raise TransientError(f"an answer without choices: {shortened(json.dumps(answer), 200, one_line=True)}")
    if len(choices) > n:
        raise D2OError(f"{server}: {len(choices)} choices to {prompt.place}, where {n} were asked for")
    _refuse_other_prompt(answer, prompt, server)
    draws = [_draw(choice) for choice in choices]
    told = sum(draw.token_ids is not None for draw in draws)
    if 0 < told < len(draws):
        raise TransientError(f"an answer with the tokens of {told} of its {len(draws)} choices")
    return draws


def _refuse_other_prompt(answer: dict[str, Any], prompt: ServerPrompt, server: str) -> None:
    # In a chat vLLM puts them beside the choices, else into each; SGLang into each.
    ids = answer.get("prompt_token_ids") or answer["choices"][0].get("prompt_token_ids")
    usage = answer.get("usage")
    count = len(ids) if ids else usage.get("prompt_tokens") if isinstance(usage, dict) else None
    differs = ""
    if count is not None and count != len(prompt.token_ids):
        differs = f"as {count} tokens, and here it has {len(prompt.token_ids)}"
    elif ids and ids != prompt.token_ids:
        i = next(i for i, (there, here) in enumerate(zip(ids, prompt.token_ids, strict=True)) if there != here)
        differs = f"with {ids[i]} as its token {i + 1}, and here that is {prompt.token_ids[i]}"
    if differs:
        raise D2OError(
            f"{server} reads {prompt.place} {differs}: the server has another tokenizer, chat template or habit of "
            "adding BOS. Serve model_name_or_path itself"
        )


def _draw(choice: dict[str, Any]) -> Draw:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    reason, ids = choice.get("finish_reason"), choice.get("token_ids")
    if ids is not None:
        text = text or ""  # a server that parses reasoning or tools may leave none
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise TransientError(
            f"a choice that is no response (finish_reason {reason!r}): {shortened(json.dumps(choice), 200, one_line=True)}"
        )
    logprobs = choice.get("logprobs")
    logps = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    return Draw(
        text,
        reason == "stop",
        token_ids=None if ids is None else tuple(ids),
        logps=None if logps is None or None in logps else tuple(logps),
    )


def tokenize_drawn(
    rows: Sequence[Row],
    drawn: Sequence[Sequence[Draw]],
    tokenizer: PreTrainedTokenizerBase,
    config: D2OConfig,
    stops: Sequence[int],
) -> list[list[list[int]]]:
    """Token ids of responses that a server drew.

    They are those that it tells. A text without them is tokenised where it stands, right behind its prompt, and then
    alone if a token would span the boundary; the ids need not be those that were drawn (a text has several
    tokenisations), but they are the ones that are scored and trained on. One that a stop token ended, and that does not
    hold it, gets the token that the negatives end with; one that ended by its length gets none. What is a stop token,
    or spells one, ends there; what is longer than ``max_completion_length`` is cut to it.

    Raises:
        DataError: no tokens at all are left.
    """
    encoder = Encoder(tokenizer)
    out = []
    for row, draws in zip(rows, drawn, strict=True):
        end = [encoder.end(row)]
        texts = [draw.text for draw in draws if draw.token_ids is None]
        tokenised = iter(encoder.continuations(row, texts) if texts else [])
        responses = []
        for draw in draws:
            ids = next(tokenised) if draw.token_ids is None else list(draw.token_ids)
            stop = next((i for i, token in enumerate(ids) if token in stops), None)
            ids = ids[: stop + 1] if stop is not None else [*ids, *(end if draw.ended else [])]
            if not ids:
                found = f"the sampler returned {draw.text!r}, of which the tokenizer makes no tokens"
                raise DataError(row.source, row.index, "anchors", found, "Change sampling_seed")
            responses.append(ids[: config.max_completion_length])
        out.append(responses)
    return out

"""Requests to a server that speaks OpenAI's HTTP API, and the draws in its answers.

vLLM and SGLang return the drawn token ids if ``return_token_ids`` asks for them. Other servers return only text, which
is tokenised again.

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
    """A prompt as sent to the server, the token ids that the server must read, and the prompt's place in the data."""

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
        ended: whether a stop token ended it, not its length.
        token_ids: as drawn, or None if the server returns only text. They may or may not include the stop token.
        logps: their log-probabilities in nats, or None if not requested or not returned.
    """

    text: str
    ended: bool
    token_ids: tuple[int, ...] | None = None
    logps: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters as in ``sample_responses``. ``seed``: ``sampling_seed``, then the shard or refresh."""

    max_new_tokens: int
    temperature: float
    top_p: float
    eos_token_ids: tuple[int, ...]
    seed: tuple[int | str, ...]


class TransientError(Exception):
    """A fault that may be over at the next attempt. ``after``: seconds that the server asks to wait."""

    def __init__(self, found: str, after: float = 0.0) -> None:
        super().__init__(found)
        self.after = after


def request_seed(*parts: int | str) -> int:
    """A hash of ``sampling_seed``, shard, row within it and draw: 53 bits, which every JSON reader keeps exactly.

    The requests before the first row have the rows -1 and -2.
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11


# --- Requests ----------------------------------------------------------------------------------------------------

#: Turns sampling parameters into fields of a request.
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
    # The server fills missing fields from the served model's own generation_config.
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


#: tried in this order
FORMS: tuple[RequestForm, ...] = (as_fields_for_ids, as_fields, as_generation_config)


# --- Answers -----------------------------------------------------------------------------------------------------


def parse(answer: Any, prompt: ServerPrompt, n: int, server: str) -> list[Draw]:
    """The draws in an answer to a request for ``n`` of them: between 1 and ``n``.

    Raises:
        TransientError: the answer holds something other than responses.
        D2OError: the answer holds more than ``n``, or the server read the prompt as other tokens.
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
    # vLLM puts the prompt's ids beside the choices in a chat, else into each choice. SGLang puts them into each choice.
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
        text = text or ""  # a server that parses reasoning or tool calls may return none
    if not isinstance(text, str) or reason not in ("stop", "length"):
        found = shortened(json.dumps(choice), 200, one_line=True)
        raise TransientError(f"a choice that is no response (finish_reason {reason!r}): {found}")
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

    If the server returns token ids, they are used. Otherwise the text is tokenised after its prompt, or alone if a
    token would span the boundary. These ids may differ from the drawn ones (a text has several tokenisations), but they
    are scored and trained on. The first stop token ends a response, also if the text spells it. A response that lacks
    the stop token that ended it gets the token that ends the negatives; a response that its length ended gets none.
    Every response is cut to ``max_completion_length``.

    Raises:
        DataError: a response has no tokens.
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

"""Requests to a server that speaks OpenAI's HTTP API, and the draws in its answers.

vLLM and SGLang return the drawn token ids if ``return_token_ids`` asks for them. Other servers return only text, which
is tokenised again.

K: responses of one prompt.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Row
from d2o_fast.data.tokens import Encoder
from d2o_fast.errors import DataError, shortened
from d2o_fast.sampling.post import Fault


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


#: A kind of value: its description, and whether a value is of it.
Kind = tuple[str, Callable[[Any], bool]]
_OTHER = "The server speaks another protocol than OpenAI's, or is damaged. Check server_url and its log"


def _fields(vocabulary: int) -> dict[str, Kind]:
    """Every field of an answer that is read, parents first. ``[]``: each item of the list.

    A field may be missing or null; an item may not.
    """
    an_object, a_list, text = ("an object", _is(dict)), ("a list", _is(list)), ("a text in Unicode", _is_text)
    count, token = _integer("a number of tokens", 2**53), _integer(f"a token id below {vocabulary}", vocabulary)
    ids = {"prompt_token_ids": a_list, "prompt_token_ids[]": _integer("a token id", 2**53)}
    choice: dict[str, Kind] = {
        "text": text,
        "message": an_object,
        "message.content": text,
        "finish_reason": text,
        **ids,
        "token_ids": a_list,
        "token_ids[]": token,
        "logprobs": an_object,
        "logprobs.token_logprobs": a_list,
        "logprobs.token_logprobs[]": ("a log-probability (at most 0) or null", _is_logp),
    }
    return {
        "": an_object,
        **ids,
        "usage": an_object,
        "usage.prompt_tokens": count,
        "choices": a_list,
        "choices[]": an_object,
        **{f"choices[].{name}": kind for name, kind in choice.items()},
    }


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _integer(words: str, below: int) -> Kind:
    return words, lambda value: type(value) is int and 0 <= value < below


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_logp(value: Any) -> bool:
    # 1e-3: rounding of half precision; the bound below is finite, and NaN is within no bounds
    return value is None or (type(value) in (int, float) and -1e30 < value < 1e-3)


def _values(value: Any, path: str, place: str = "") -> Iterator[tuple[str, Any]]:
    """(place, value) of every value at ``path``."""
    if not path:
        yield place or "the answer", value
        return
    head, _, rest = path.partition(".")
    name = head.removesuffix("[]")
    value, place = value.get(name), f"{place}.{name}" if place else name
    if value is None:
        return
    found = [(f"{place}[{i}]", item) for i, item in enumerate(value)] if head != name else [(place, value)]
    for at, item in found:
        yield from _values(item, rest, at)


def _refuse_misfits(answer: Any, vocabulary: int) -> None:
    for path, (wanted, fits) in _fields(vocabulary).items():
        for place, value in _values(answer, path):
            if not fits(value):
                raise Fault(f"an answer in which {place} is {_brief(value)}; it must be {wanted}", _OTHER)


def _brief(value: Any) -> str:
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 3, 80, 80, 40
    return shortened(short.repr(value), 200, one_line=True)


def parse(answer: Any, prompt: ServerPrompt, n: int, vocabulary: int) -> list[Draw]:
    """The draws in an answer to a request for ``n`` of them: between 1 and ``n``.

    Args:
        vocabulary: number of token ids that exist.

    Raises:
        Fault: the answer holds something other than responses, or more than asked for; the server read the prompt as
            other tokens.
    """
    _refuse_misfits(answer, vocabulary)
    choices = answer.get("choices")
    if not choices:
        raise Fault(f"an answer without choices: {_brief(answer)}")
    if len(choices) > n:
        raise Fault(f"an answer of {len(choices)} choices, where {n} were asked for", _OTHER)
    _refuse_other_prompt(answer, prompt)
    draws = [_draw(choice, f"choices[{i}]") for i, choice in enumerate(choices)]
    told = sum(draw.token_ids is not None for draw in draws)
    if 0 < told < len(draws):
        raise Fault(f"an answer with the tokens of {told} of its {len(draws)} choices")
    return draws


def _refuse_other_prompt(answer: dict[str, Any], prompt: ServerPrompt) -> None:
    # vLLM puts the prompt's ids beside the choices in a chat, else into each choice. SGLang puts them into each choice.
    told = [ids for found in (answer, *answer["choices"]) if (ids := found.get("prompt_token_ids"))]
    counts = [len(ids) for ids in told] if told else [(answer.get("usage") or {}).get("prompt_tokens")]
    here, differs = prompt.token_ids, ""
    if other := [count for count in counts if count not in (None, len(here))]:
        differs = f"as {other[0]} tokens, and here it has {len(here)}"
    elif ids := next((ids for ids in told if ids != here), None):
        i = next(i for i in range(len(here)) if ids[i] != here[i])
        differs = f"with {ids[i]} as its token {i + 1}, and here that is {here[i]}"
    if differs:
        raise Fault(
            f"the server reads the prompt {differs}",
            "It has another tokenizer, chat template or habit of adding BOS. Serve model_name_or_path itself",
        )


def _draw(choice: dict[str, Any], place: str) -> Draw:
    message, logprobs = choice.get("message"), choice.get("logprobs") or {}
    text = choice.get("text") if message is None else message.get("content")
    reason, ids, logps = choice.get("finish_reason"), choice.get("token_ids"), logprobs.get("token_logprobs")
    if ids is not None:
        text = text or ""  # a server that parses reasoning or tool calls may return none
    if text is None or reason not in ("stop", "length"):
        raise Fault(f"a choice that is no response (finish_reason {_brief(reason)}): {_brief(choice)}")
    if ids is not None and logps is not None and len(ids) != len(logps):
        if reason != "stop" or abs(len(ids) - len(logps)) > 1:
            raise Fault(f"an answer with {len(logps)} log-probabilities of the {len(ids)} tokens in {place}", _OTHER)
        logps = None  # some servers leave the stop token out of one of them
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
                found = f"the sampler returned {shortened(draw.text)!r}, of which the tokenizer makes no tokens"
                raise DataError(row.source, row.index, "anchors", found, "Change sampling_seed")
            responses.append(ids[: config.max_completion_length])
        out.append(responses)
    return out

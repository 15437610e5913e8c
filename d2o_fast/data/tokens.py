"""Rows to token ids, with the boundary between prompt and response found in the tokens."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Example, Row
from d2o_fast.errors import D2OError, DataError, shortened

logger = logging.getLogger("d2o_fast")


def tokenize_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: D2OConfig) -> list[Example]:
    """Token ids of every row; ``anchor_ids`` is empty if the row has no anchors.

    A prompt has the same ids for its negative, its anchors and the sampler. If the ids of prompt + response do not
    start with the ids of the prompt, the response is tokenised alone. A response ends with EOS (the end-of-turn token
    in a chat) unless it was cut: to ``max_completion_length``, or with ``keep_start`` to the tokens that ``max_length``
    leaves it. With ``keep_end`` a prompt longer than ``max_length - max_completion_length`` loses its start.

    Raises:
        DataError: a prompt that leaves no room for a response, messages without a chat template or with one that
            rewrites the prompt when the response is added, a text without tokens.
    """
    return list(tokenized(rows, tokenizer, config))


def tokenized(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: D2OConfig, log: bool = True
) -> Iterator[Example]:
    """Yields ``tokenize_rows`` one row at a time.

    Args:
        log: whether to log the numbers of cuts after the last row.
    """
    cut_prompts = cut_responses = merged = 0
    for row, (whole, responses, row_merged) in zip(rows, encode_rows(rows, tokenizer), strict=True):
        if is_too_long(whole, config):
            found = f"{len(whole)} tokens, of which max_length ({config.max_length}) leaves none for a response"
            raise DataError(row.source, row.index, "prompt", found, "Shorten it, remove the row or raise max_length")
        prompt_ids = cut_prompt(whole, config, tokenizer.bos_token_id)
        room = response_room(prompt_ids, config)
        cut_prompts += len(prompt_ids) < len(whole)
        cut_responses += sum(len(response) > room for response in responses)
        merged += row_merged
        responses = [response[:room] for response in responses]
        yield Example(prompt_ids, responses[0], responses[1:], [])
    if not log:
        return
    if merged:
        logger.info(
            "%d of %d rows: a token would span the end of the prompt; their responses were tokenised alone",
            merged,
            len(rows),
        )
    logger.info(
        "%d rows tokenised; %d prompts lost their start, %d responses their end", len(rows), cut_prompts, cut_responses
    )


def encode_rows(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[list[int]], bool]]:
    """Yields ``Encoder.encode`` of each row, uncut.

    Raises:
        DataError: as ``tokenize_rows``, except for lengths.
    """
    encoder = Encoder(tokenizer)
    yield from map(encoder.encode, rows)


def encode_prompts(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yields the prompt ids of each row as in ``encode_rows``, uncut.

    Raises:
        DataError: messages that the chat template refuses.
    """
    encoder = Encoder(tokenizer)
    yield from map(encoder.prompt, rows)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model: Any, rows: Iterable[Row]) -> list[int]:
    """Sorted ids of the tokens that end a sampled response.

    These are EOS, the EOS tokens of the model's ``generation_config`` and, if any row is a chat, the template's
    end-of-turn token.
    """
    encoder = Encoder(tokenizer)
    named = model.generation_config.eos_token_id
    stops = {encoder.eos, *(named if isinstance(named, list) else [] if named is None else [named])}
    if tokenizer.chat_template is not None and any(not isinstance(row.prompt, str) for row in rows):
        stops.update(encoder.turn_end[:1])
    return sorted(stops)


def is_too_long(prompt_ids: list[int], config: D2OConfig) -> bool:
    """Whether ``max_length`` leaves a prompt no room for a response."""
    return len(prompt_ids) > config.max_length - (config.truncation_mode == "keep_start")


def response_room(prompt_ids: list[int], config: D2OConfig) -> int:
    """Most tokens of a response to a prompt that ``cut_prompt`` returned."""
    return min(config.max_completion_length, config.max_length - len(prompt_ids))


def cut_prompt(ids: list[int], config: D2OConfig, bos: int | None) -> list[int]:
    """The prompt's ids; with ``keep_end`` the last ``max_length - max_completion_length``, after a leading BOS."""
    limit = config.max_length - config.max_completion_length
    if config.truncation_mode == "keep_start" or len(ids) <= limit:
        return ids
    start = ids[:1] if bos is not None and ids[0] == bos else []
    return start + ids[len(ids) - (limit - len(start)) :]


class Encoder:
    """Turns texts into ids, and finds the boundary between prompt and response in the tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise D2OError("the tokenizer has no eos_token; responses could not end. Set eos_token in it")
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self.prefix = self._specials_in_front()
        self.adds_space = tokenizer.convert_ids_to_tokens(self._ids(["a"])[0])[0].startswith("\u2581")

    @functools.cached_property
    def turn_end(self) -> list[int]:
        """Ids that the template writes after a response, from the first special token on; [] if there is none."""
        content = "d2o"
        text = self._template([{"role": "user", "content": "a"}, {"role": "assistant", "content": content}])
        tail = self._ids([text[text.rindex(content) + len(content) :]])[0]
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        first = next((i for i, token in enumerate(tail) if token in special), len(tail))
        return tail[first:]

    def encode(self, row: Row) -> tuple[list[int], list[list[int]], bool]:
        """(prompt ids, ids of the negative and each given anchor, whether any response was tokenised alone)."""
        responses = [row.rejected, *(row.anchors or [])]
        chat = not isinstance(row.prompt, str)
        prompt, fulls = self._render(row, responses) if chat else _joined(row.prompt, responses)
        prompt_ids, response_ids, merged = self._split(prompt, fulls, chat)
        if not prompt_ids:
            raise DataError(row.source, row.index, "prompt", "the tokenizer makes no tokens of it", "Remove the row")
        out = []
        for i, response in enumerate(response_ids):
            response = self._ended(response, chat)
            if len(response) == 1 and response[0] in (self.eos, *(self.turn_end[:1] if chat else [])):
                field = "rejected" if i == 0 else f"anchors[{i - 1}]"
                raise DataError(row.source, row.index, field, "the tokenizer makes no tokens of it", "Remove the row")
            out.append(response)
        return prompt_ids, out, merged

    def prompt(self, row: Row) -> list[int]:
        """Ids of the row's prompt."""
        chat = not isinstance(row.prompt, str)
        return self._split(self._render(row, [])[0] if chat else str(row.prompt), [], chat)[0]

    def continuations(self, row: Row, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text after the row's prompt. The text gets no template and no end."""
        chat = not isinstance(row.prompt, str)
        prompt = self._render(row, [])[0] if chat else str(row.prompt)
        return self._split(prompt, [prompt + text for text in texts], chat)[1]

    def end(self, row: Row) -> int:
        """The token that ends a response to this row."""
        return self.turn_end[0] if not isinstance(row.prompt, str) and self.turn_end else self.eos

    def _split(self, prompt: str, fulls: list[str], chat: bool) -> tuple[list[int], list[list[int]], bool]:
        """(prompt ids, ids of the part after the prompt in each of ``fulls``, whether any was tokenised alone)."""
        prompt_ids, *full_ids = self._ids([prompt, *fulls])
        if not chat and prompt_ids[: len(self.prefix)] != self.prefix:  # unless the text brings its own BOS
            prompt_ids = self.prefix + prompt_ids
            full_ids = [self.prefix + full for full in full_ids]
        out, merged = [], False
        for text, full in zip(fulls, full_ids, strict=True):
            response = full[len(prompt_ids) :]
            if full[: len(prompt_ids)] != prompt_ids:
                merged = True
                text = text[len(prompt) :]
                # SentencePiece puts a space before every text; the response's own would make two.
                response = self._ids([text.removeprefix(" ") if self.adds_space else text])[0]
            out.append(response)
        return prompt_ids, out, merged

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # _split adds the special tokens, not the tokenizer: some append EOS, which would follow the prompt.
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]

    def _specials_in_front(self) -> list[int]:
        bare, full = self._ids(["a"])[0], list(self.tokenizer("a")["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        raise D2OError(f"the tokenizer makes {bare} of 'a' alone but {full} with its special tokens around it")

    def _ended(self, response: list[int], chat: bool) -> list[int]:
        """The response with the end of a sampled one: the end-of-turn token of a chat, or EOS."""
        tail = self.turn_end if chat else []
        if tail and response[-len(tail) :] == tail:
            return response[: len(response) - len(tail) + 1]
        return response if response and response[-1] == self.eos else [*response, self.eos]

    def _render(self, row: Row, responses: list[Any]) -> tuple[str, list[str]]:
        if self.tokenizer.chat_template is None:
            fix = "Use strings, or a tokenizer with a chat template (chat_template_path sets one)"
            raise DataError(row.source, row.index, "prompt", "messages, but the tokenizer has no chat template", fix)
        try:
            prompt = self._template(row.prompt, add_generation_prompt=True)
            fulls = [self._template([*row.prompt, *response]) for response in responses]
        except Exception as error:  # a template may raise anything
            found = f"the chat template refuses these messages ({shortened(str(error), 200)})"
            raise DataError(row.source, row.index, "prompt", found, "Check the roles and their order") from error
        for full in fulls:
            if not full.startswith(prompt):
                found = f"with a response the chat template renders another prompt ({_difference(prompt, full)})"
                fix = "Set chat_template_path to a template that keeps the prompt as it is"
                raise DataError(row.source, row.index, "prompt", found, fix)
        return prompt, fulls

    def _template(self, messages: Any, add_generation_prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(text, str)
        return text


def _joined(prompt: Any, responses: list[Any]) -> tuple[str, list[str]]:
    return prompt, [prompt + response for response in responses]


def _difference(prompt: str, full: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    return f"'{shortened(prompt[at:])}' became '{shortened(full[at:])}'"

"""Rows to token ids, with the boundary between prompt and response found in the tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from d2o_fast.config import D2OConfig
from d2o_fast.data.rendering import ChatTemplate
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
            rewrites the prompt or the response, a text that the tokenizer refuses, or without tokens.
    """
    return list(tokenized(rows, tokenizer, config))


def tokenized(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: D2OConfig, log: bool = True
) -> Iterator[Example]:
    """Yields ``tokenize_rows`` one row at a time.

    Args:
        log: whether to log the numbers of cuts, and what the chat template changes, after the last row.
    """
    cut_prompts = cut_responses = merged = 0
    for row, (whole, responses, row_merged) in zip(rows, encode_rows(rows, tokenizer, log), strict=True):
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
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, log: bool = True
) -> Iterator[tuple[list[int], list[list[int]], bool]]:
    """Yields ``Encoder.encode`` of each row, uncut.

    Args:
        log: whether to warn after the last row of what the chat template changes.

    Raises:
        DataError: as ``tokenize_rows``, except for lengths.
    """
    encoder = Encoder(tokenizer)
    yield from map(encoder.encode, rows)
    if log:
        encoder.template.warn()


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
    chat = None if tokenizer.chat_template is None else next((r for r in rows if not isinstance(r.prompt, str)), None)
    return sorted(stops if chat is None else {*stops, encoder.end(chat)})


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
        self.template = ChatTemplate(tokenizer)
        self.eos: int = tokenizer.eos_token_id
        self._prefix: list[int] | None = None
        self._turn_ends: dict[str, list[int]] = {}

    def encode(self, row: Row) -> tuple[list[int], list[list[int]], bool]:
        """(prompt ids, ids of the negative and each given anchor, whether any response was tokenised alone)."""
        responses = [row.rejected, *(row.anchors or [])]
        if isinstance(row.prompt, str):
            prompt, fulls, ends = row.prompt, [row.prompt + response for response in responses], [""] * len(responses)
        else:
            rendered = self.template.render(row, responses)
            prompt, fulls, ends = rendered.prompt, rendered.fulls, rendered.ends
        prompt_ids, response_ids, merged = self._split(row, prompt, fulls)
        out = []
        for i, (response, text) in enumerate(zip(response_ids, ends, strict=True)):
            end = self._turn_end(row, text)
            response = self._ended(response, end)
            if len(response) == 1 and response[0] in (self.eos, *end[:1]):
                raise DataError(
                    row.source, row.index, _field(i), "the tokenizer makes no tokens of it", "Remove the row"
                )
            out.append(response)
        return prompt_ids, out, merged

    def prompt(self, row: Row) -> list[int]:
        """Ids of the row's prompt."""
        return self._split(row, self._prompt_text(row), [])[0]

    def continuations(self, row: Row, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text after the row's prompt. The text gets no template and no end."""
        prompt = self._prompt_text(row)
        return self._split(row, prompt, [prompt + text for text in texts])[1]

    def end(self, row: Row) -> int:
        """The token that ends a response to this row."""
        if isinstance(row.prompt, str) or isinstance(row.rejected, str):
            return self.eos
        end = self._turn_end(row, self.template.render(row, [row.rejected]).ends[0])
        return end[0] if end else self.eos

    def _prompt_text(self, row: Row) -> str:
        return row.prompt if isinstance(row.prompt, str) else self.template.prompt(row)

    def _turn_end(self, row: Row, text: str) -> list[int]:
        """Ids of what a template writes after a response, from the first special token on; [] if there is none."""
        if text not in self._turn_ends:
            tail = self._ids(row, [text])[0]
            special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
            first = next((i for i, token in enumerate(tail) if token in special), len(tail))
            self._turn_ends[text] = tail[first:]
        return self._turn_ends[text]

    def _split(self, row: Row, prompt: str, fulls: list[str]) -> tuple[list[int], list[list[int]], bool]:
        """(prompt ids, ids of the part after the prompt in each of ``fulls``, whether any was tokenised alone)."""
        try:
            prompt_ids, *full_ids = self._ids(row, [prompt, *fulls])
        except DataError:
            for i, text in enumerate([prompt, *fulls]):
                self._ids(row, [text], _field(i - 1) if i else "prompt")  # names the first text that fails
            raise
        if not prompt_ids:
            raise DataError(row.source, row.index, "prompt", "the tokenizer makes no tokens of it", "Remove the row")
        if isinstance(row.prompt, str):
            if self._prefix is None:
                self._prefix = self._specials_in_front(row, prompt, prompt_ids)
            if prompt_ids[: len(self._prefix)] != self._prefix:  # unless the text brings its own BOS
                prompt_ids = self._prefix + prompt_ids
                full_ids = [self._prefix + full for full in full_ids]
        out, merged = [], False
        for text, full in zip(fulls, full_ids, strict=True):
            response = full[len(prompt_ids) :]
            if full[: len(prompt_ids)] != prompt_ids:
                merged = True
                response = self._alone(row, text[len(prompt) :])
            out.append(response)
        return prompt_ids, out, merged

    def _alone(self, row: Row, text: str) -> list[int]:
        ids = self._ids(row, [text])[0]
        if text.startswith(" "):  # SentencePiece puts a space before every text; the response's own would make two
            first = self._ids(row, [text.lstrip(" ")])[0][:1]
            if first and str(self.tokenizer.convert_ids_to_tokens(first)[0]).startswith("\u2581"):
                return self._ids(row, [text.removeprefix(" ")])[0]
        return ids

    def _ids(self, row: Row, texts: list[str], field: str | None = None, specials: bool = False) -> list[list[int]]:
        # _split adds the special tokens, not the tokenizer: some append EOS, which would follow the prompt.
        how = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
        try:
            return self.tokenizer(texts, add_special_tokens=specials, **how)["input_ids"]
        except Exception as error:  # a tokenizer may raise anything, such as for a letter that it does not know
            found = f"the tokenizer refuses it ({type(error).__name__}: {shortened(str(error), 200)})"
            raise DataError(row.source, row.index, field, found, "Correct the text, or remove the row") from error

    def _specials_in_front(self, row: Row, text: str, bare: list[int]) -> list[int]:
        full = list(self._ids(row, [text], "prompt", specials=True)[0])
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        name = shortened(text)
        raise D2OError(f"the tokenizer makes {bare} of {name!r} alone but {full} with its special tokens around it")

    def _ended(self, response: list[int], tail: list[int]) -> list[int]:
        """The response with the end of a sampled one: the end-of-turn token of a chat, or EOS."""
        if tail and response[-len(tail) :] == tail:
            return response[: len(response) - len(tail) + 1]
        return response if response and response[-1] == self.eos else [*response, self.eos]


def _field(i: int) -> str:
    return "rejected" if i == 0 else f"anchors[{i - 1}]"

"""Messages through a chat template, with a check that every response is rendered as it was given.

A template may cut a response, leave out a field, or write a header before it. What loses content is an error; what
loses nothing, and what a model never sees of a prompt, is counted and said once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from d2o_fast.data.row import Messages, Row
from d2o_fast.errors import DataError, printable, shortened, shown

logger = logging.getLogger("d2o_fast")

_CALLS = ("tool_calls", "function_call")  #: content of a message, in a prompt too
_SAID = (*_CALLS, "reasoning_content", "reasoning", "thinking", "refusal")  #: content of a response
DATED = (
    "the chat template writes the date, so stored anchors and checkpoints serve on the same day only: set "
    "chat_template_path to a copy with a fixed date in place of strftime_now(...)"
)
_OTHER_TEMPLATE = "Set chat_template_path to a template that keeps it"


@dataclass
class Rendered:
    """A prompt and its responses as text."""

    prompt: str
    fulls: list[str]  #: the prompt with each response, and the end of its turn
    ends: list[str]  #: the text after the content of each response: the end of its turn


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._opener: str | None = None
        self._notes: dict[str, list[Any]] = {}  #: note -> [number of texts, place of the first]

    def prompt(self, row: Row) -> str:
        """The prompt of a row, up to the place where the response begins.

        Raises:
            DataError: there is no template, or it refuses the messages.
        """
        if self.tokenizer.chat_template is None:
            fix = "Use strings, or a tokenizer with a chat template (chat_template_path sets one)"
            raise DataError(row.source, row.index, "prompt", "messages, but the tokenizer has no chat template", fix)
        text = self._apply(row, "prompt", row.prompt, begin=True)
        if self._opener is None:
            self._opener = self._find_opener(row, text)
        return text.removesuffix(self._opener)

    def render(self, row: Row, responses: list[Messages]) -> Rendered:
        """The row's prompt with each of ``responses``.

        Raises:
            DataError: as ``prompt``; the template changes the prompt or a response, or leaves out a part of them.
        """
        out = Rendered(self.prompt(row), [], [])
        self._check_prompt(row, out.prompt)
        for i, response in enumerate(responses):
            field = "rejected" if i == 0 else f"anchors[{i - 1}]"
            full = self._apply(row, field, [*row.prompt, *response])
            if not full.startswith(out.prompt):
                found = f"with a response the chat template renders another prompt ({_difference(out.prompt, full)})"
                fix = "Set chat_template_path to a template that keeps the prompt as it is"
                raise DataError(row.source, row.index, "prompt", found, fix)
            out.fulls.append(full)
            out.ends.append(full[self._end_of_content(row, field, response[0], out.prompt, full) :])
            self._check_fields(row, field, response[0], full)
        return out

    def warn(self) -> None:
        """Says once what ``render`` counted, and whether prompts depend on the day."""
        if self._opener is not None and "strftime_now" in str(self.tokenizer.chat_template):
            _warn_once(DATED)
        for note, (count, first) in self._notes.items():
            _warn_once(printable(f"the chat template {note} ({count} times; the first is {first})", one_line=True))

    def _note(self, row: Row, field: str, note: str) -> None:
        first = f"{row.source}, row {row.index}, field '{field}'"
        self._notes.setdefault(note, [0, first])[0] += 1

    def _find_opener(self, row: Row, prompt: str) -> str:
        """The end of the prompt that a template writes for a new answer only, such as DeepSeek-R1's "<think>"."""
        if isinstance(row.rejected, str):
            return ""
        full = self._apply(row, "rejected", [*row.prompt, *row.rejected])
        if full.startswith(prompt):
            return ""
        bare = self._apply(row, "prompt", row.prompt)
        if not (prompt.startswith(bare) and full.startswith(bare)):
            return ""
        at = _first_difference(prompt, full)
        content = self._place(row, "rejected", row.rejected[0], full, len(bare)) or (at, at)
        opener = prompt[max(len(bare), min(at, content[0])) :]
        if "think" not in opener.lower() or opener == prompt[len(bare) :]:
            return ""
        self._note(row, "prompt", f"opens a new answer with {opener!r} but not the given ones: prompts end before it")
        return opener

    def _end_of_content(self, row: Row, field: str, message: dict[str, Any], prompt: str, full: str) -> int:
        """The place in ``full`` after the content of the response."""
        content, start = message["content"], len(prompt)
        if full.startswith(content, start):
            return start + len(content)
        bare = self._apply(row, "prompt", row.prompt)
        if not full.startswith(bare):
            bare = prompt
        place = self._place(row, field, message, full, len(bare))
        if place is None:
            rest = shortened(shown(full[start:]))
            found = f"the chat template does not render it as given ({shortened(shown(content))} became {rest})"
            raise DataError(
                row.source, row.index, field, found, f"{_OTHER_TEMPLATE}, or leave out the part that it cuts"
            )
        first, last = place
        if full[start:first].strip() and not _extras([message]):
            self._note(row, field, f"writes {full[start:first]!r} before responses, and the loss is on it too")
        if full[first:last] != content:
            self._note(row, field, "changes the white space of responses")
        return last

    def _place(self, row: Row, field: str, message: dict[str, Any], full: str, start: int) -> tuple[int, int] | None:
        """(first, after the last) of the content in ``full`` from ``start`` on, whatever its white space.

        A short content may be in the header or in the end of a turn, too. The right place is where the text grows if
        the last letter of the content is doubled.
        """
        content = message["content"]
        end = len(content.rstrip())
        grown = self._apply(row, field, [*row.prompt, {**message, "content": content[:end] + content[end - 1 :]}])
        for first, last in _places(full, content, start):
            end = first + len(full[first:last].rstrip())
            if grown == full[:end] + full[end - 1 :]:
                return first, last
        return None

    def _check_fields(self, row: Row, field: str, message: dict[str, Any], full: str) -> None:
        for name in _extras([message]):
            without = [*row.prompt, {key: part for key, part in message.items() if key != name}]
            if not self._renders(row, field, without, full):
                continue
            if name in _SAID:
                found = "the chat template leaves it out"
                raise DataError(row.source, row.index, f"{field}[0].{name}", found, f"{_OTHER_TEMPLATE}, or remove it")
            self._note(row, f"{field}[0].{name}", f"leaves out the field {name!r} of messages")

    def _check_prompt(self, row: Row, text: str) -> None:
        messages = row.prompt
        assert not isinstance(messages, str)
        for i, message in enumerate(messages):
            if message["content"].strip() and not any(_places(text, message["content"], 0)):
                self._note(row, f"prompt[{i}]", "leaves out or changes messages of prompts")
        for name in _extras(messages):
            without = [{key: part for key, part in message.items() if key != name} for message in messages]
            if not self._renders(row, "prompt", without, text, begin=True):
                continue
            i = next(i for i, message in enumerate(messages) if message.get(name))
            if name in _CALLS:
                found = "the chat template leaves it out"
                raise DataError(row.source, row.index, f"prompt[{i}].{name}", found, f"{_OTHER_TEMPLATE}, or remove it")
            self._note(row, f"prompt[{i}].{name}", f"leaves out the field {name!r} of messages")

    def _renders(self, row: Row, field: str, messages: Messages, text: str, begin: bool = False) -> bool:
        with contextlib.suppress(DataError):
            found = self._apply(row, field, messages, begin)
            return (found.removesuffix(self._opener or "") if begin else found) == text
        return False

    def _apply(self, row: Row, field: str, messages: Any, begin: bool = False) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin))
        except Exception as error:  # a template may raise anything
            cause = shortened(str(error), 200) or type(error).__name__
            found = f"the chat template refuses these messages ({cause})"
            raise DataError(row.source, row.index, field, found, "Check the roles and their order") from error


@functools.lru_cache(maxsize=1024)
def _warn_once(message: str) -> None:
    logger.warning(message)


def _extras(messages: Messages) -> list[str]:
    """Fields beside role and content that hold something."""
    return sorted({k for message in messages for k, part in message.items() if part and k not in ("role", "content")})


def _places(text: str, content: str, start: int) -> Iterator[tuple[int, int]]:
    """(first, after the last) of each place of ``content`` in ``text`` from ``start`` on, whatever the white space."""
    exact = False
    at = text.find(content, start)
    while at >= 0:
        exact = True
        yield at, at + len(content)
        at = text.find(content, at + 1)
    if exact:
        return
    letters = "".join(content.split())
    places = [i for i in range(start, len(text)) if not text[i].isspace()]
    packed = "".join(text[i] for i in places)
    at = packed.find(letters)
    while at >= 0 and letters:
        yield places[at], places[at + len(letters) - 1] + 1
        at = packed.find(letters, at + 1)


def _difference(prompt: str, full: str) -> str:
    at = _first_difference(prompt, full)
    return f"'{shortened(prompt[at:])}' became '{shortened(full[at:])}'"


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

"""Records to rows: finds the columns of the prompt and its negative, and checks their values.

Other columns (``chosen``, scores, ...) are not used, and the log names them. There are six forms:

1. ``prompt``, ``rejected`` and optionally ``anchors`` (a list of responses, drawn elsewhere);
2. unpaired ``prompt``, ``completion``, ``label``: rows with ``label`` false are negatives, the others are not used;
3. PKU-SafeRLHF's ``prompt``, ``response_0``, ``response_1``, ``is_response_0_safe``, ``is_response_1_safe``: each
   response marked unsafe is a separate negative;
4. HH-RLHF's ``chosen``, ``rejected``, transcripts as strings: the last "\\n\\nAssistant:" of ``rejected`` ends the
   prompt, and the negative follows it;
5. UltraFeedback's ``chosen``, ``rejected``, whole chats as messages (``prompt``, a string, only repeats the question):
   the negative is the last message of ``rejected``;
6. ms-swift's ``messages``, ``rejected_response``: the negative replaces the answer that ends ``messages``.

Texts are strings, or lists of messages (``[{"role": ..., "content": ...}]``) that go through the chat template.
Every fault raises a DataError with the file, the row, the field, the fault and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from d2o_fast.data.row import Messages, Row, Text
from d2o_fast.errors import DataError, shortened, shown

_UNPAIRED = ("prompt", "completion", "label")
_SAFE_RLHF = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
_TRANSCRIPT_MARK = "\n\nAssistant:"
_DEEPEST = 100  # levels of a value in a message
_ROLES = ("system", "developer", "user", "assistant", "tool")
_ACCEPTED = (
    "Give prompt + rejected (+ anchors), or prompt + completion + label, or PKU-SafeRLHF's prompt + response_0 + "
    "response_1 + is_response_0_safe + is_response_1_safe, or chosen + rejected as in HH-RLHF and UltraFeedback, or "
    "ms-swift's messages + rejected_response"
)


Format = Callable[[dict[str, Any], str, int], Iterator[Row]]  #: (record, source, index) -> the record's rows


# --- Forms -------------------------------------------------------------------------------------------------------


def format_of(record: dict[str, Any], source: str, index: int) -> Format:
    """The form of a source, chosen by its first record. The log shows the form's docstring."""
    if all(name in record for name in _SAFE_RLHF):
        return _safe_rlhf
    if "messages" in record and "rejected_response" in record:
        return _swift
    if "rejected" in record:
        if isinstance(record["rejected"], list) and not isinstance(record.get("prompt"), list):
            return _chat
        if "chosen" in record and "prompt" not in record and isinstance(record["rejected"], str):
            return _transcript
        return _paired
    if "completion" in record and "label" in record:
        return _unpaired
    raise DataError(source, index, None, _columns(record), _ACCEPTED)


def _paired(record: dict[str, Any], source: str, index: int) -> Iterator[Row]:
    """prompt + rejected"""
    prompt = _prompt(record, source, index)
    rejected = _response(record, "rejected", prompt, source, index)
    anchors = record.get("anchors")
    if anchors is not None:
        wanted = "Give a list of responses like rejected, or leave anchors out to have them sampled"
        if not isinstance(anchors, list):
            raise DataError(source, index, "anchors", f"found {kind(anchors)} where a list belongs", wanted)
        if not anchors:
            raise DataError(source, index, "anchors", "an empty list", wanted)
        anchors = [_checked_response(a, f"anchors[{i}]", prompt, source, index) for i, a in enumerate(anchors)]
    yield Row(prompt, rejected, anchors, source, index)


def _unpaired(record: dict[str, Any], source: str, index: int) -> Iterator[Row]:
    """prompt + completion + label"""
    if not _flag(record, "label", source, index):
        prompt = _prompt(record, source, index)
        yield Row(prompt, _response(record, "completion", prompt, source, index), None, source, index)


def _safe_rlhf(record: dict[str, Any], source: str, index: int) -> Iterator[Row]:
    """PKU-SafeRLHF: prompt + the unsafe of response_0 and response_1"""
    unsafe = [i for i in (0, 1) if not _flag(record, f"is_response_{i}_safe", source, index)]
    for i in unsafe:
        prompt = _prompt(record, source, index)
        yield Row(prompt, _response(record, f"response_{i}", prompt, source, index), None, source, index)


def _transcript(record: dict[str, Any], source: str, index: int) -> Iterator[Row]:
    """HH-RLHF: the end of the transcript in rejected"""
    text = _field(record, "rejected", source, index)
    if not isinstance(text, str):
        fix = "Give the whole transcript, as the first row does"
        raise DataError(source, index, "rejected", f"found {kind(text)} where a string belongs", fix)
    prompt, mark, response = text.rpartition(_TRANSCRIPT_MARK)
    if not mark:
        found = f"no {_TRANSCRIPT_MARK!r} in the transcript {shortened(text)!r}"
        raise DataError(source, index, "rejected", found, "Write the prompt into a column of its own, named prompt")
    _require_text(prompt, "rejected", "prompt", source, index)
    _require_text(response, "rejected", "response", source, index)
    yield Row(prompt + mark, response, None, source, index)


def _chat(record: dict[str, Any], source: str, index: int) -> Iterator[Row]:
    """UltraFeedback: the last message of the chat in rejected"""
    value = _field(record, "rejected", source, index)
    if not isinstance(value, list):
        fix = "Give the whole chat as messages, as the first row does"
        raise DataError(source, index, "rejected", f"found {kind(value)} where a list of messages belongs", fix)
    messages = _messages(value, "rejected", source, index)
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] == "assistant":
        found = f"found messages of {', '.join(message['role'] for message in messages)}"
        fix = "Give the whole chat: the prompt's messages, then one of the assistant. Or make prompt a list of messages"
        raise DataError(source, index, "rejected", found, fix)
    prompt = record.get("prompt")
    if prompt is not None and str(prompt).strip() not in [message["content"].strip() for message in messages[:-1]]:
        found = f"{kind(prompt)} is none of the messages in rejected, whose prompt it must be"
        raise DataError(source, index, "prompt", found, "Leave it out, or make it a list of messages")
    _require_text(messages[-1]["content"], f"rejected[{len(messages) - 1}]", "response", source, index)
    yield Row(messages[:-1], messages[-1:], None, source, index)


def _swift(record: dict[str, Any], source: str, index: int) -> Iterator[Row]:
    """ms-swift: messages + rejected_response"""
    value = _field(record, "messages", source, index)
    if not isinstance(value, list):
        fix = "Give a list of messages with role and content"
        raise DataError(source, index, "messages", f"found {kind(value)} where a list of messages belongs", fix)
    messages = _messages(value, "messages", source, index)
    prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not prompt or prompt[-1]["role"] == "assistant":
        found = f"found messages of {', '.join(message['role'] for message in messages)}"
        raise DataError(source, index, "messages", found, "Give the question, then at most one answer to it")
    response = _field(record, "rejected_response", source, index)
    if not isinstance(response, str):
        found = f"found {kind(response)} where a string belongs"
        raise DataError(source, index, "rejected_response", found, "Give the rejected answer as a string")
    _require_text(response, "rejected_response", "response", source, index)
    yield Row(prompt, [{"role": "assistant", "content": response}], None, source, index)


#: The columns that each form reads. The other columns of a record are not used.
USED: dict[Format, set[str]] = {
    _paired: {"prompt", "rejected", "anchors"},
    _unpaired: set(_UNPAIRED),
    _safe_rlhf: set(_SAFE_RLHF),
    _transcript: {"rejected"},
    _chat: {"prompt", "rejected"},
    _swift: {"messages", "rejected_response"},
}


# --- Checks ------------------------------------------------------------------------------------------------------


def _flag(record: dict[str, Any], field: str, source: str, index: int) -> bool:
    value = _field(record, field, source, index)
    if not isinstance(value, bool):
        raise DataError(source, index, field, f"found {kind(value)} where true or false belongs", "Write true or false")
    return value


def _field(record: dict[str, Any], field: str, source: str, index: int) -> Any:
    if field not in record:
        raise DataError(source, index, field, f"the column is missing; {_columns(record)}", _ACCEPTED)
    return record[field]


def _prompt(record: dict[str, Any], source: str, index: int) -> Text:
    value = _field(record, "prompt", source, index)
    if isinstance(value, list):
        messages = _messages(value, "prompt", source, index)
        if messages[-1]["role"] == "assistant":
            found = "its last message is from the assistant"
            raise DataError(source, index, "prompt", found, "End the prompt with the user's message")
        return messages
    if not isinstance(value, str):
        fix = "Give a string or a list of messages with role and content"
        raise DataError(source, index, "prompt", f"found {kind(value)} where a text belongs", fix)
    _require_text(value, "prompt", "prompt", source, index)
    return value


def _response(record: dict[str, Any], field: str, prompt: Text, source: str, index: int) -> Text:
    return _checked_response(_field(record, field, source, index), field, prompt, source, index)


def _checked_response(value: Any, field: str, prompt: Text, source: str, index: int) -> Text:
    if isinstance(prompt, str):
        if not isinstance(value, str):
            fix = "The prompt is a string, so its responses must be strings too"
            raise DataError(source, index, field, f"found {kind(value)} where a string belongs", fix)
        _require_text(value, field, "response", source, index)
        return value
    if not isinstance(value, list):
        fix = 'The prompt is a list of messages, so give [{"role": "assistant", "content": ...}]'
        raise DataError(source, index, field, f"found {kind(value)} where a list of messages belongs", fix)
    messages = _messages(value, field, source, index)
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        fix = "Give exactly one message of the assistant; what came before it belongs to the prompt"
        raise DataError(source, index, field, f"found messages of {', '.join(roles)}", fix)
    _require_text(messages[0]["content"], field, "response", source, index)
    return messages


def _require_text(text: str, field: str, what: str, source: str, index: int) -> None:
    if not text.strip():
        raise DataError(source, index, field, f"the {what} is empty", "Fill it in or remove the row")
    _require_unicode(text, field, source, index)


def _require_unicode(text: str, field: str, source: str, index: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"half a character at position {error.start} (a lone surrogate, {text[error.start]!r})"
        raise DataError(
            source, index, field, found, "Repair the text; it was cut inside an emoji or the like"
        ) from error


def _messages(value: list[Any], field: str, source: str, index: int) -> Messages:
    if not value:
        raise DataError(source, index, field, "an empty list of messages", "Fill it in or remove the row")
    messages = []
    for i, message in enumerate(value):
        place = f"{field}[{i}]"
        if not isinstance(message, dict):
            fix = "A list must hold messages: objects with role and content"
            raise DataError(source, index, place, f"found {kind(message)} where a message belongs", fix)
        if message.get("role") not in _ROLES:
            found = f"role is {shortened(shown(message.get('role')))}"
            raise DataError(source, index, place, found, f"Use one of {', '.join(_ROLES)}")
        if message.get("content") is None and message.get("tool_calls"):  # the form of OpenAI's API
            message = {**message, "content": ""}
        if not isinstance(message.get("content"), str):
            found = f"content is {kind(message.get('content'))}"
            raise DataError(source, index, place, found, "Give the content as a string")
        _require_unicode(message["content"], place, source, index)
        checked = message.keys() == {"role", "content"}
        messages.append(dict(message) if checked else _without_nulls(message, place, source, index))
    return messages


def _without_nulls(value: Any, place: str, source: str, index: int, depth: int = 0) -> Any:
    """``value`` without keys whose value is null, at any depth: Arrow gives every object the keys of all others.

    Raises:
        DataError: it is no JSON, or nested too deep.
    """
    if isinstance(value, str):
        _require_unicode(value, place, source, index)
        return value
    number = isinstance(value, int) and value.bit_length() < 1 << 10
    if value is None or number or (isinstance(value, float) and math.isfinite(value)):
        return value
    if depth == _DEEPEST:
        raise DataError(source, index, place, f"nested more than {_DEEPEST} levels deep", "Give it as a string")
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, tuple) and len(item) == 2 for item in value):  # a map of Arrow
            return _without_nulls(dict(value), place, source, index, depth)
        return [_without_nulls(item, place, source, index, depth + 1) for item in value]
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise DataError(source, index, place, f"found {kind(value)}, which is no JSON", "Make it a string")
    for name in value:
        _require_unicode(name, place, source, index)
    return {
        name: _without_nulls(part, f"{place}.{name}", source, index, depth + 1)
        for name, part in value.items()
        if part is not None
    }


def _columns(record: dict[str, Any]) -> str:
    return f"the columns are {shortened(', '.join(map(str, record)), 300) or 'none'}"


def kind(value: Any) -> str:
    names = {
        str: "a string",
        list: "a list",
        dict: "an object",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
    }
    if value is None:
        return "nothing (null)"
    return f"{names.get(type(value), type(value).__name__)} {shortened(shown(value))}"

"""Negatives from files, the Hugging Face hub or memory, read and checked row by row (token ids: ``tokens.py``).

Three forms of columns are read:

1. ``prompt``, ``rejected`` and optionally ``anchors`` (a list of responses, drawn elsewhere);
2. unpaired ``prompt``, ``completion``, ``label``: rows with ``label`` false are negatives, the others are not used;
3. PKU-SafeRLHF's ``prompt``, ``response_0``, ``response_1``, ``is_response_0_safe``, ``is_response_1_safe``: each
   response marked unsafe is a negative of its own.

Texts are strings, or lists of messages (``[{"role": ..., "content": ...}]``) that go through the chat template.
Every fault is one DataError that names the file, the row, the field, what was found and what to do.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from d2o_fast.errors import DataError
from d2o_fast.tokens import shortened, stop_token_ids, tokenize_rows

__all__ = ["Row", "read_rows", "rows_from", "split_by_prompt", "stop_token_ids", "tokenize_rows"]

logger = logging.getLogger("d2o_fast")

Messages = list[dict[str, Any]]
Text = str | Messages

_EXTENSIONS = (".jsonl", ".json", ".parquet")
_UNPAIRED = ("prompt", "completion", "label")
_SAFE_RLHF = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_ACCEPTED = (
    "Give prompt + rejected (+ anchors), or prompt + completion + label, or PKU-SafeRLHF's prompt + response_0 + "
    "response_1 + is_response_0_safe + is_response_1_safe"
)


@dataclass(frozen=True)
class Row:
    """One prompt with one negative. ``index`` is the row in ``source``, from 1: the line of a .jsonl file."""

    prompt: Text
    rejected: Text  #: a string, or a list of one assistant message
    anchors: list[Any] | None  #: responses like ``rejected``; None where they are still to be sampled
    source: str
    index: int


# --- Reading -----------------------------------------------------------------------------------------------------


def read_rows(name: str, split: str = "train") -> list[Row]:
    """The negatives in ``name``: a .jsonl, .json or .parquet file, or the split of a data set on the Hugging Face hub.

    Raises:
        DataError: the first fault found, with its place.
    """
    path, extension = os.path.expanduser(name), os.path.splitext(name)[1].lower()
    if extension not in _EXTENSIONS and os.path.isfile(path):
        raise DataError(name, None, None, f"unknown file type '{extension}'", f"Give one of {', '.join(_EXTENSIONS)}")
    if extension in _EXTENSIONS or name.startswith((".", "/", "~")):
        if not os.path.exists(path):
            raise DataError(name, None, None, "no such file", "Check dataset_name")
        if os.path.isfile(path):
            return _rows(_read_parquet(path) if extension == ".parquet" else _read_json(path), name)
    import datasets  # slow to import, and only needed for names on the hub

    try:
        records = datasets.load_dataset(path if os.path.isdir(path) else name, split=split)
    except Exception as error:  # whatever the hub, a script or a broken file raises: the cause stays attached
        found = f"datasets cannot load split '{split}' ({type(error).__name__}: {shortened(str(error), 300)})"
        raise DataError(name, None, None, found, "Check dataset_name, dataset_split and the network") from error
    return rows_from(records, name)


def rows_from(records: Any, source: str = "train_dataset") -> list[Row]:
    """The negatives in a list of dicts or a ``datasets.Dataset``; a list of ``Row`` is passed through.

    Raises:
        DataError: as ``read_rows``; ``source`` is the name that its message gives to the data.
    """
    if hasattr(records, "keys"):  # a DatasetDict, or the columns of a table
        found = f"a {type(records).__name__} with the keys {', '.join(map(str, records))}"
        raise DataError(source, None, None, found, "Choose one split, or pass a list with one dict per row")
    if isinstance(records, str | bytes) or not hasattr(records, "__len__"):
        raise DataError(source, None, None, _kind(records), "Pass a list of dicts or a datasets.Dataset")
    if len(records) > 0 and all(isinstance(record, Row) for record in records):
        return list(records)
    return _rows(enumerate(records, start=1), source)


def _read_json(path: str) -> Iterator[tuple[int, Any]]:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise DataError(path, None, None, f"cannot be read ({error.strerror})", "Check its permissions") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    if path.lower().endswith(".json") and data.lstrip().startswith(b"["):
        yield from enumerate(_parse(data, path, None), start=1)
        return
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            yield number, _parse(line, path, number)


def _parse(data: bytes, path: str, row: int | None) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(path, row, None, f"not UTF-8 (byte {error.start})", "Save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if row is not None else f"line {error.lineno}, column {error.colno}"
        fix = "Write one JSON object per line" if row is not None else "Write one list of JSON objects"
        raise DataError(path, row, None, f"not valid JSON ({error.msg}, {place})", fix) from error


def _read_parquet(path: str) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        row = 0
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                row += 1
                yield row, record
    except (OSError, pyarrow.ArrowException) as error:
        found = f"not readable as Parquet ({shortened(str(error), 200)})"
        raise DataError(path, None, None, found, "Write the file again") from error


# --- Checking ----------------------------------------------------------------------------------------------------


def _rows(records: Iterable[tuple[int, Any]], source: str) -> list[Row]:
    rows: list[Row] = []
    count, form, unused = 0, None, set()
    for index, record in records:
        count += 1
        if not isinstance(record, dict):
            raise DataError(source, index, None, f"found {_kind(record)}", "Each row must be an object with columns")
        if form is None:
            form = _form(record, source, index)
            unused = set(record) - _USED[form]
        rows.extend(form(record, source, index))
    if count == 0:
        raise DataError(source, None, None, "no rows", "Give at least one prompt with its negative")
    if not rows:
        column, value = (
            ("label", "false") if form is _unpaired else ("is_response_0_safe / is_response_1_safe", "false")
        )
        fix = f"D2O learns from negatives: at least one row must have {column} = {value}"
        raise DataError(source, None, None, f"none of {count} rows holds a negative", fix)
    logger.info("%s: %d rows, %d negatives", source, count, len(rows))
    if unused:
        logger.info("%s: columns that are not used: %s", source, ", ".join(sorted(unused)))
    return rows


def _form(record: dict[str, Any], source: str, index: int) -> Any:
    if all(name in record for name in _SAFE_RLHF):
        return _safe_rlhf
    if "rejected" in record:
        return _paired
    if "completion" in record and "label" in record:
        return _unpaired
    raise DataError(source, index, None, _columns(record), _ACCEPTED)


def _paired(record: dict[str, Any], source: str, index: int) -> Iterator[Row]:
    prompt = _prompt(record, source, index)
    rejected = _response(record, "rejected", prompt, source, index)
    anchors = record.get("anchors")
    if anchors is not None:
        wanted = "Give a list of responses like rejected, or leave anchors out to have them sampled"
        if not isinstance(anchors, list):
            raise DataError(source, index, "anchors", f"found {_kind(anchors)} where a list belongs", wanted)
        if not anchors:
            raise DataError(source, index, "anchors", "an empty list", wanted)
        anchors = [_checked_response(a, f"anchors[{i}]", prompt, source, index) for i, a in enumerate(anchors)]
    yield Row(prompt, rejected, anchors, source, index)


def _unpaired(record: dict[str, Any], source: str, index: int) -> Iterator[Row]:
    if not _flag(record, "label", source, index):
        prompt = _prompt(record, source, index)
        yield Row(prompt, _response(record, "completion", prompt, source, index), None, source, index)


def _safe_rlhf(record: dict[str, Any], source: str, index: int) -> Iterator[Row]:
    unsafe = [i for i in (0, 1) if not _flag(record, f"is_response_{i}_safe", source, index)]
    for i in unsafe:
        prompt = _prompt(record, source, index)
        yield Row(prompt, _response(record, f"response_{i}", prompt, source, index), None, source, index)


_USED = {_paired: {"prompt", "rejected", "anchors"}, _unpaired: set(_UNPAIRED), _safe_rlhf: set(_SAFE_RLHF)}


def _flag(record: dict[str, Any], field: str, source: str, index: int) -> bool:
    value = _field(record, field, source, index)
    if not isinstance(value, bool):
        raise DataError(
            source, index, field, f"found {_kind(value)} where true or false belongs", "Write true or false"
        )
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
        raise DataError(source, index, "prompt", f"found {_kind(value)} where a text belongs", fix)
    _require_text(value, "prompt", "prompt", source, index)
    return value


def _response(record: dict[str, Any], field: str, prompt: Text, source: str, index: int) -> Text:
    return _checked_response(_field(record, field, source, index), field, prompt, source, index)


def _checked_response(value: Any, field: str, prompt: Text, source: str, index: int) -> Text:
    if isinstance(prompt, str):
        if not isinstance(value, str):
            fix = "The prompt is a string, so its responses must be strings too"
            raise DataError(source, index, field, f"found {_kind(value)} where a string belongs", fix)
        _require_text(value, field, "response", source, index)
        return value
    if not isinstance(value, list):
        fix = 'The prompt is a list of messages, so give [{"role": "assistant", "content": ...}]'
        raise DataError(source, index, field, f"found {_kind(value)} where a list of messages belongs", fix)
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
            raise DataError(source, index, place, f"found {_kind(message)} where a message belongs", fix)
        if message.get("role") not in _ROLES:
            found = f"role is {shortened(repr(message.get('role')))}"
            raise DataError(source, index, place, found, f"Use one of {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str):
            found = f"content is {_kind(message.get('content'))}"
            raise DataError(source, index, place, found, "Give the content as a string")
        _require_unicode(message["content"], place, source, index)
        messages.append({name: part for name, part in message.items() if part is not None})
    return messages


def _columns(record: dict[str, Any]) -> str:
    return f"the columns are {', '.join(map(str, record)) or 'none'}"


def _kind(value: Any) -> str:
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
    return f"{names.get(type(value), type(value).__name__)} {shortened(repr(value))}"


# --- Splitting ---------------------------------------------------------------------------------------------------


def split_by_prompt(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """(train, eval): about ``fraction`` of the prompts held out, chosen by a hash of the prompt.

    A prompt is never on both sides, and it stays on its side when rows are added or reordered.

    Raises:
        DataError: a fraction above 0 that leaves one side without rows.
    """
    train: list[Row] = []
    held_out: list[Row] = []
    for row in rows:
        digest = hashlib.sha256(json.dumps(row.prompt, sort_keys=True).encode()).digest()
        (held_out if int.from_bytes(digest[:8], "big") < fraction * 2**64 else train).append(row)
    if fraction > 0 and not (train and held_out):
        side = "training" if not train else "evaluation"
        prompts = len({json.dumps(row.prompt, sort_keys=True) for row in rows})
        found = f"eval_fraction {fraction} of {prompts} prompts leaves no row for {side}"
        raise DataError(rows[0].source if rows else "rows", None, None, found, "Choose another share or add prompts")
    return train, held_out

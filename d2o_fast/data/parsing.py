"""JSON and Parquet files to numbered records. Memory holds a few records at a time, however far a file expands.

Every fault raises a DataError with the file, the row if one is known, and the cause.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any

from d2o_fast.errors import DataError, printable, shortened

Numbered = Iterator[tuple[int, Any]]  #: (row, record), counted from 1; in a .jsonl file the row is the line

_BOM = b"\xef\xbb\xbf"  # some editors write it before UTF-8 text
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\3\4", b"BZh", b"\xfd7zXZ")  # gzip, zstd, zip, bzip2, xz
_BATCH = 16  # rows of a Parquet file in memory at a time, or one if the file is packed ...
_TIGHT = 20  # ... by more than this factor
_BUFFER = 1 << 20  # bytes of the read buffer of each column
_LONGEST = 1 << 26  # most characters of a row; no model reads as much
_EXPANDED = 1 << 28  # a file may become this large, or else grow by ...
_EXPANSION = 1000  # ... at most this factor; text is packed by 3 to 30
_VALUES = 1 << 22  # most values of _BATCH rows, those in lists and objects included
_HOW_PACKED = "Check how the file was made; no text is packed that tightly"
_SPACE = re.compile(r"[ \t\n\r]*")


def regular_file(path: str, name: str) -> bool:
    """Whether ``path`` is a file; False for a folder.

    Raises:
        DataError: there is nothing of that name, or a pipe, a socket or a device, from which reading may never end.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise DataError(name, None, None, "no such file", "Check dataset_name") from error
    except (OSError, ValueError) as error:
        raise DataError(name, None, None, f"cannot be read ({_cause(error)})", "Check dataset_name") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(name, None, None, "neither a file nor a folder (a pipe or a device)", "Write it into a file")
    return stat.S_ISREG(mode)


def _cause(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else shortened(str(error), 200)
    return text or type(error).__name__


# --- JSON --------------------------------------------------------------------------------------------------------


def read_json(path: str) -> Numbered:
    """The records of a file with one JSON object per line; of a .json file that is one list, its items."""
    try:
        with open(path, "rb") as file:
            start = file.read(1 << 12)
            if start.startswith(_UTF16):
                raise DataError(path, None, None, "UTF-16 text", "Save the file as UTF-8")
            if start.startswith(_PACKED):
                raise DataError(path, None, None, "a compressed file", "Unpack it first, or write Parquet")
            file.seek(0)
            if path.lower().endswith(".json") and start.removeprefix(_BOM).lstrip().startswith(b"["):
                yield from _items(file.read().removeprefix(_BOM), path)
                return
            number = 0
            while line := file.readline(_LONGEST + 1):
                number += 1
                if len(line) > _LONGEST:
                    found = f"a line of more than {_LONGEST >> 20} MiB"
                    raise DataError(path, number, None, found, "End each row with a newline, and shorten its texts")
                line = line.removeprefix(_BOM).rstrip()
                if line:
                    yield number, _parsed(line, path, number)
    except OSError as error:
        raise DataError(path, None, None, f"cannot be read ({_cause(error)})", "Check its permissions") from error


def _parsed(line: bytes, path: str, row: int) -> Any:
    text = _decoded(line, path, row)
    try:
        return _decoder.decode(text)
    except (ValueError, RecursionError) as error:
        fix = "End lines with a newline, not with a carriage return alone" if b"\r" in line else None
        raise _fault(error, path, row, fix or "Write one JSON object per line") from error


def _items(data: bytes, path: str) -> Numbered:
    """The items of one JSON list, parsed one by one."""
    text = _decoded(data, path, None)
    at, row = _skip(text, _skip(text, 0) + 1), 0
    try:
        while text[at : at + 1] != "]" or row:
            row += 1
            item, at = _decoder.raw_decode(text, at)
            yield row, item
            at = _skip(text, at)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _skip(text, at + 1)
        at = _skip(text, at + 1)
        if at != len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except (ValueError, RecursionError) as error:
        raise _fault(error, path, row or None, "Write one list of JSON objects") from error


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # it matches nothing, too
    return found.end()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{shortened(twice)}' twice in one object")
    return out


_decoder = json.JSONDecoder(object_pairs_hook=_unique)


def _decoded(data: bytes, path: str, row: int | None) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(path, row, None, f"not UTF-8 (byte {error.start})", "Save the file as UTF-8") from error
    if "\0" in text:
        found = f"a NUL byte at position {text.index(chr(0))}"
        raise DataError(path, row, None, found, "The file is damaged, or UTF-16: save it as UTF-8")
    return text


def _fault(error: Exception, path: str, row: int | None, fix: str) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if path.lower().endswith(".json") else ""
        place = f"{line}column {error.colno}"
        return DataError(path, row, None, f"not valid JSON ({error.msg}, {place})", fix)
    if isinstance(error, RecursionError):
        return DataError(path, row, None, "JSON that is nested too deep", "Leave the nested column out")
    return DataError(
        path, row, None, f"JSON that cannot be read ({printable(str(error), one_line=True)})", "Correct it"
    )


# --- Parquet -----------------------------------------------------------------------------------------------------


def read_parquet(path: str, wanted: set[str]) -> Numbered:
    """The records of a Parquet file. Columns that are not ``wanted`` are None in the first record, then left out."""
    import pyarrow.parquet  # slow to import

    row, size = -1, 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1} & wanted)
            if twice:
                raise DataError(path, None, twice[0], "two columns of this name", "Rename one of them")
            columns = [name for name in names if name in wanted]
            others = dict.fromkeys(name for name in names if name not in wanted)
            packed = os.path.getsize(path)
            limit = max(_EXPANDED, _EXPANSION * packed)
            for group in range(file.num_row_groups):
                unpacked = file.metadata.row_group(group).total_byte_size  # a text that rows repeat is counted once
                if unpacked > limit:
                    raise DataError(path, None, None, f"{packed} bytes that expand to {unpacked}", _HOW_PACKED)
                batch_size = 1 if unpacked > _TIGHT * packed else _BATCH
                for batch in file.iter_batches(batch_size, row_groups=[group], columns=columns):
                    row = max(row, 0)
                    if sum(map(_values, batch.columns)) > _VALUES:
                        found = f"more than {_VALUES} values in {batch.num_rows} rows"
                        raise DataError(path, row + 1, None, found, _HOW_PACKED)
                    for record in _records(batch):
                        row += 1
                        length = _length(record)
                        size += length
                        if length > _LONGEST:
                            raise DataError(path, row, None, f"a row of {length >> 20} MiB", "Shorten its texts")
                        if size > limit:
                            found = f"the rows so far are {_EXPANSION} times as large as the file"
                            raise DataError(path, row, None, found, _HOW_PACKED)
                        yield row, {**others, **record} if row == 1 else record
    except DataError:
        raise
    except _CellError as error:
        found = f"a value that Python cannot hold ({error.__cause__})"
        raise DataError(path, row + 1, error.args[0], found, "Write it as a text") from error
    except Exception as error:  # a damaged file may raise anything
        found = f"not readable as Parquet ({type(error).__name__}: {_cause(error)})"
        raise DataError(path, row + 1 if row >= 0 else None, None, found, "Write the file again") from error


def _records(batch: Any) -> Iterator[Any]:
    try:
        records = batch.to_pylist()
    except Exception:  # one by one, so that the fault has its row and field
        records = ({name: _cell(batch, name, i) for name in batch.schema.names} for i in range(batch.num_rows))
    yield from records


class _CellError(Exception):
    """A value that Python cannot hold; the first argument is its field."""


def _cell(batch: Any, name: str, i: int) -> Any:
    try:
        return batch.column(name)[i].as_py()
    except Exception as error:
        raise _CellError(name) from error


def _values(array: Any) -> int:
    """The number of values of an Arrow array, with those inside."""
    inside = [array.values] if hasattr(array, "values") else []  # of a list or a map
    if hasattr(array, "field"):  # an object
        inside = [array.field(i) for i in range(array.type.num_fields)]
    return len(array) + sum(map(_values, inside))


def _length(value: Any) -> int:
    """About the number of characters of a value with all that is inside."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    return 8 + sum(map(_length, value)) if isinstance(value, list | tuple) else 8

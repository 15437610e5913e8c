"""Negatives from files, the Hugging Face hub or memory, read and checked row by row.

``data/formats.py`` knows the columns, ``data/on_disk.py`` keeps the rows, ``data/tokens.py`` makes token ids.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2o_fast.config import D2OConfig
from d2o_fast.data.formats import USED, Format, format_of, kind
from d2o_fast.data.on_disk import Digests, LazySequence, RowFile, subset
from d2o_fast.data.parsing import Numbered, read_json, read_parquet, regular_file
from d2o_fast.data.row import Row, prompt_key, row_key
from d2o_fast.errors import D2OError, DataError, printable, refusal, shortened

logger = logging.getLogger("d2o_fast")

_EXTENSIONS = (".jsonl", ".json", ".parquet")
_READ = set[str]().union(*USED.values()) | {"chosen"}  #: columns that decide the form of a row, or are read
#: Columns that are not used although they may be meant to reach the model.
_CONTENT = {"system", "system_prompt", "instruction", "input", "context", "history", "tools", "documents", "images"}


@dataclass(frozen=True)
class Source:
    """One file or data set: ``count`` records of the form ``columns`` with the negatives ``rows``."""

    name: str
    columns: str
    unused: list[str]  #: columns of the first record that the form does not read
    count: int
    rows: Sequence[Row]


# --- Reading -----------------------------------------------------------------------------------------------------


def read_rows(name: str | Sequence[str], split: str = "train", configuration: str | None = None) -> Sequence[Row]:
    """The negatives in ``name``: a .jsonl, .json or .parquet file, or the split of a data set (and
    one ``configuration`` of it) on the Hugging Face hub or in a folder.

    ``name`` may be a pattern (``data/*.jsonl``) or a list of names, read in order. A row with the prompt, negative and
    anchors of an earlier row is left out, and the log gives the number. Rows are checked one by one and kept in a
    temporary file. A .json file that is one list is parsed whole.

    Raises:
        DataError: the first fault found, with its place.
        D2OError: the temporary file cannot be written.
    """
    rows = RowFile()
    read_sources(name, split, configuration, rows)
    return without_duplicates(rows)


def read_sources(
    name: str | Sequence[str], split: str = "train", configuration: str | None = None, rows: RowFile | None = None
) -> list[Source]:
    """A ``Source`` for each file or data set that ``name`` matches, in order, duplicates included.

    Args:
        rows: the file to append all rows to; a new one if not given.

    Raises:
        DataError: the first fault found, with its place; no name; a pattern that matches no file; a name given twice.
    """
    names = [each for given in ([name] if isinstance(name, str) else name) for each in _matching(given)]
    if not names:
        raise DataError("dataset_name", None, None, "an empty list", "Give at least one file or name on the hub")
    for i, each in enumerate(names):
        if each in names[:i]:
            raise DataError(each, None, None, "named twice in dataset_name", "Name each file once")
    rows = RowFile() if rows is None else rows
    return [_read_source(each, split, configuration, rows) for each in names]


def without_duplicates(rows: Sequence[Row]) -> Sequence[Row]:
    """The first of each set of rows with equal prompt, negative and anchors. Logs how many were left out."""
    repeats, before = Digests(map(row_key, rows)).repeats()
    if before is None:
        return rows
    row, first = rows[repeats[0]], rows[before]
    example = f"{row.source}, row {row.index} repeats {first.source}, row {first.index}"
    logger.info("%d of %d negatives left out as duplicates (%s)", len(repeats), len(rows), example)
    kept = np.delete(np.arange(len(rows), dtype=np.uint64), repeats)
    return subset(rows, array("Q", kept.tobytes()))


def _matching(name: str) -> list[str]:
    path = os.path.expanduser(name)
    if not name.strip():
        raise DataError("dataset_name", None, None, f"the name {name!r}", "Give at least one file or name on the hub")
    if "\0" in name:
        raise DataError(name, None, None, "no file has a NUL in its name", "Check dataset_name")
    if not glob.has_magic(path) or os.path.exists(path):
        return [name]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise DataError(name, None, None, "no file fits this pattern", "Check dataset_name")
    return found


def _read_source(name: str, split: str, configuration: str | None, rows: RowFile) -> Source:
    path, extension = os.path.expanduser(name), os.path.splitext(name)[1].lower()
    if extension in _EXTENSIONS or name.startswith((".", "/", "~")) or os.path.lexists(path):
        if regular_file(path, name):
            if extension not in _EXTENSIONS:
                found = f"unknown file type '{extension}'"
                raise DataError(name, None, None, found, f"Give one of {', '.join(_EXTENSIONS)}")
            if "[" in split:
                raise refusal("dataset_split", split, f"without a range: {name} is a file, and all its rows are read")
            if configuration is not None or split != "train":
                logger.warning("%s is a file and read whole: dataset_split and dataset_config are for the hub", name)
            return _source(read_parquet(path, _READ) if extension == ".parquet" else read_json(path), name, rows)
        script = f"{os.path.basename(os.path.abspath(path))}.py"
        if os.path.exists(os.path.join(path, script)):
            found = f"a data set that a script makes, {script}"
            raise DataError(name, None, None, found, "Scripts are never run: save its rows")
    import datasets  # slow to import; needed only for folders and names on the hub

    try:
        if os.path.exists(os.path.join(path, "state.json")) or os.path.exists(os.path.join(path, "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            records = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            records = datasets.load_dataset(path if os.path.isdir(path) else name, configuration, split=split)
    except Exception as error:  # the hub or a broken file may raise anything
        cause: BaseException = error
        while cause.__cause__ is not None:  # datasets wraps what it saw
            cause = cause.__cause__
        text = shortened(str(cause), 300, one_line=True)
        found = f"datasets cannot load split '{split}' ({type(cause).__name__}: {text})"
        fix = "Check dataset_name, dataset_split and the network"
        if "onfig" in text:  # the message of datasets names the configurations that there are
            fix = "Set dataset_config to one of its configurations"
        raise DataError(name, None, None, found, fix) from error
    return _source(_numbered(records, name), name, rows)


def rows_from(records: Any, source: str = "train_dataset") -> Sequence[Row]:
    """The negatives in a list of dicts or a ``datasets.Dataset``, duplicates included; ``Row``s are passed through.

    A list gives a list. The rows of a data set, whose records are on the disk, are kept there (``RowFile``).

    Raises:
        DataError: as ``read_rows``. The message calls the data ``source``.
    """
    if isinstance(records, LazySequence) and records and isinstance(records[0], Row):
        return records
    if isinstance(records, list) and records and all(isinstance(record, Row) for record in records):
        return list(records)
    return _source(_numbered(records, source), source, [] if isinstance(records, list) else RowFile()).rows


def _numbered(records: Any, source: str) -> Numbered:
    if hasattr(records, "keys"):  # a DatasetDict, or the columns of a table
        found = f"a {type(records).__name__} with the keys {', '.join(map(str, records))}"
        raise DataError(source, None, None, found, "Choose one split, or pass a list with one dict per row")
    if isinstance(records, str | bytes) or not hasattr(records, "__len__"):
        raise DataError(source, None, None, kind(records), "Pass a list of dicts or a datasets.Dataset")
    others = dict[str, None]()
    if _READ & set(getattr(records, "column_names", ())) and hasattr(
        records, "select_columns"
    ):  # other columns may hold images, which take time and more packages to read
        others = dict.fromkeys(name for name in records.column_names if name not in _READ)
        records = records.with_format(None).select_columns([n for n in records.column_names if n in _READ])
    row = 0
    try:
        for record in records:
            row += 1
            yield row, {**others, **record} if row == 1 and others else record
    except Exception as error:  # a data set may lose its files, or hold what it cannot read
        found = f"the row cannot be read ({type(error).__name__}: {shortened(str(error), 200)})"
        raise DataError(source, row + 1, None, found, "Correct the row, or load the data set again") from error


def _source(records: Iterable[tuple[int, Any]], source: str, rows: list[Row] | RowFile) -> Source:
    """Appends the negatives of ``records`` to ``rows``."""
    count, first, unused, source = 0, len(rows), list[str](), printable(source, one_line=True)
    format_: Format | None = None
    for index, record in records:
        count += 1
        if not isinstance(record, dict):
            raise DataError(source, index, None, f"found {kind(record)}", "Each row must be an object with columns")
        try:
            if format_ is None:
                format_ = format_of(record, source, index)
                unused = sorted({str(name) for name in record} - USED[format_])
            for row in format_(record, source, index):
                rows.append(row)
        except RecursionError as error:
            raise DataError(source, index, None, "a value that is nested too deep", "Leave it out") from error
    if count == 0:
        raise DataError(source, None, None, "no rows", "Give at least one prompt with its negative")
    assert format_ is not None
    if len(rows) == first:
        flags = "label = false" if "label" in USED[format_] else "is_response_0_safe or is_response_1_safe = false"
        fix = f"D2O learns from negatives: at least one row must have {flags}"
        raise DataError(source, None, None, f"none of {count} rows holds a negative", fix)
    columns = format_.__doc__ or ""
    logger.info("%s: %d rows, %d negatives (%s)", source, count, len(rows) - first, columns)
    if unused:
        names = printable(shortened(", ".join(unused), 300), one_line=True)
        content = ", ".join(name for name in unused if name in _CONTENT)
        if content:
            logger.warning("%s: the model never sees these columns, they are not used: %s", source, content)
        logger.info("%s: columns that are not used: %s", source, names)
    return Source(source, columns, unused, count, subset(rows, range(first, len(rows))))


# --- Splitting ---------------------------------------------------------------------------------------------------


def split_by_prompt(rows: Sequence[Row], fraction: float) -> tuple[Sequence[Row], Sequence[Row]]:
    """(train, eval): about ``fraction`` of the prompts are held out, chosen by a hash of the prompt.

    A prompt is never on both sides; a string equals the same text as the user's only message. A prompt keeps its side
    when rows are added or reordered.

    Raises:
        DataError: a fraction above 0 that leaves one side without rows.
    """
    train, held_out = array("Q"), array("Q")
    for i, row in enumerate(rows):
        digest = hashlib.sha256(prompt_key(row).encode()).digest()
        (held_out if int.from_bytes(digest[:8], "big") < fraction * 2**64 else train).append(i)
    if fraction > 0 and not (train and held_out):
        side = "training" if not train else "evaluation"
        prompts = Digests(map(prompt_key, rows)).distinct()
        found = f"eval_fraction {fraction} of {prompts} prompts leaves no row for {side}"
        raise DataError(rows[0].source if rows else "rows", None, None, found, "Choose another share or add prompts")
    return subset(rows, train), subset(rows, held_out)


def read_datasets(config: D2OConfig) -> tuple[Sequence[Row], Sequence[Row] | None]:
    """(training rows, held-out rows or None) as the settings name them.

    Raises:
        D2OError: no dataset_name, or both eval_dataset_name and eval_fraction.
        DataError: a fault in the data.
    """
    if config.dataset_name is None:
        raise D2OError("dataset_name is not set; give a .jsonl, .json or .parquet file, or a name on the hub")
    rows = read_rows(config.dataset_name, config.dataset_split, config.dataset_config)
    if config.eval_dataset_name is not None:
        if config.eval_fraction > 0:
            raise D2OError("eval_dataset_name and eval_fraction are both set; held-out data come from one of them")
        held_out = read_rows(config.eval_dataset_name, config.dataset_split, config.dataset_config)
        shared = Digests(map(prompt_key, rows)).shared_with(Digests(map(prompt_key, held_out)))
        if shared:
            logger.warning("%d prompts of eval_dataset_name are in dataset_name too, and trained on", shared)
        return rows, held_out
    if config.eval_fraction > 0:
        return split_by_prompt(rows, config.eval_fraction)
    return rows, None

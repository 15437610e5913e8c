"""Rows on disk are equal to the rows written, and memory does not grow with them."""

from __future__ import annotations

import datetime
import gc
import hashlib
import json
import os
import random
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2o_fast.config import D2OConfig
from d2o_fast.data.dry_run import describe
from d2o_fast.data.on_disk import Digests, RowFile, Subset, rows_digest, subset
from d2o_fast.data.reading import read_datasets, read_rows, rows_from, split_by_prompt, without_duplicates
from d2o_fast.data.row import Row
from d2o_fast.errors import D2OError, DataError
from tiny import tiny_rows, tiny_tokenizer

USER = [{"role": "user", "content": "how?\n\u2028é \U0001f600", "name": "half \ud83d", "weight": 0.1, "tags": ["a"]}]
ANSWER = [{"content": "no", "role": "assistant"}]
ROWS = [
    Row("a\x00b", "c\r\nd", None, "one.jsonl", 1),
    Row("", " ", ["e", "\u4e2d"], "one.jsonl", 7),
    Row(USER, ANSWER, [ANSWER, ANSWER], "two, with a name", 2**40),
]


def on_disk(rows: Any) -> RowFile:
    file = RowFile()
    for row in rows:
        file.append(row)
    return file


# --- The file ---


def test_rows_come_back_as_they_were() -> None:
    rows = on_disk(ROWS)
    assert list(rows) == ROWS
    assert [list(message) for message in rows[2].rejected] == [["content", "role"]], "keys in their order"
    assert rows[-1] == ROWS[-1]
    assert rows[1:] == ROWS[1:]
    assert rows[::-2] == ROWS[::-2]
    assert rows == ROWS
    assert rows.__eq__(3) is NotImplemented
    assert rows != ROWS[:2]
    assert rows != [*ROWS[:2], ROWS[0]]
    assert rows != "abc"
    for i in (3, -4):
        with pytest.raises(IndexError):
            rows[i]


def test_rows_may_be_appended_after_some_were_read() -> None:
    rows = RowFile()
    for i, row in enumerate(ROWS * 3):
        rows.append(row)
        assert (len(rows), rows[i], rows[0]) == (i + 1, row, ROWS[0])


def test_a_part_reads_from_the_same_file() -> None:
    rows = on_disk(ROWS)
    part, descriptor = subset(rows, [2, 0]), rows._file._file.fileno()
    rows.append(ROWS[1])
    assert part == [ROWS[2], ROWS[0]]
    del rows
    gc.collect()
    assert subset(part, [1, 1]) == [ROWS[0], ROWS[0]], "the file stays while a part of it is there"
    os.fstat(descriptor)
    del part
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_the_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = on_disk(ROWS)
    assert len(list(rows)) == 3
    assert not list(tmp_path.iterdir()), "nothing to stay behind if the process is killed"


def test_no_room_is_an_error_that_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(D2OError, match=r"cannot be written to .*none \(No such file or directory\); make room"):
        RowFile()
    with open("/dev/full", "r+b", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda: full)
        with pytest.raises(D2OError, match=r"\(No space left on device\); make room there, or let TMPDIR name"):
            on_disk(ROWS)


def test_what_json_cannot_hold_is_named() -> None:
    message = {"role": "user", "content": "a", "at": datetime.date(2026, 1, 1)}
    records = datasets.Dataset.from_list([{"prompt": [message], "rejected": ANSWER}])
    with pytest.raises(DataError, match=r"here, row 1, field 'prompt\[0\]\.at': found date .*no JSON\. Make it a str"):
        rows_from(records, "here")


# --- Checks over all rows ---


def test_digests_count_as_sets_do() -> None:
    chance = random.Random(0)
    one, other = ([str(chance.randrange(limit)) for _ in range(500)] for limit in (200, 300))
    assert Digests(one).distinct() == len(set(one))
    assert Digests(one).shared_with(Digests(other)) == len(set(one) & set(other))
    repeats, before = Digests(one).repeats()
    expected = [i for i, text in enumerate(one) if text in one[:i]]
    assert repeats.tolist() == expected
    assert before == one.index(one[expected[0]])
    for texts in ([], ["a"], ["a", "b"]):
        assert Digests(texts).distinct() == len(texts)
        places, before = Digests(texts).repeats()
        assert (places.tolist(), before) == ([], None)


def test_the_digest_of_rows_is_that_of_their_json() -> None:
    """A store made before rows were read one by one stays valid."""
    rows = on_disk(ROWS)
    text = json.dumps([[row.prompt, row.rejected, row.anchors] for row in ROWS], sort_keys=True)
    assert rows_digest(rows) == rows_digest(ROWS) == hashlib.sha256(text.encode()).hexdigest()[:32]
    assert rows_digest(ROWS[:2]) != rows_digest(ROWS) != rows_digest(ROWS[::-1])


def test_files_and_data_sets_are_read_to_the_disk_and_lists_stay_lists(tmp_path: Path) -> None:
    records = [*tiny_rows(40), *tiny_rows(9)]
    path = write(tmp_path / "a.jsonl", records)
    on_file, in_memory = read_rows(path), rows_from(records, path)
    assert isinstance(on_file, Subset)
    assert type(in_memory) is list
    assert on_file == without_duplicates(in_memory) == in_memory[:40]
    for file, memory in zip(split_by_prompt(on_file, 0.3), split_by_prompt(in_memory[:40], 0.3), strict=True):
        assert isinstance(file, Subset)
        assert type(memory) is list
        assert memory
        assert file == memory
    from_set = rows_from(datasets.Dataset.from_list(records), path)
    assert isinstance(from_set, Subset)
    assert from_set == in_memory
    assert rows_from(on_file) is on_file


# --- Memory ---


def write(path: Path, records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def long_rows(count: int) -> list[dict[str, Any]]:
    """Rows of 2 KB each; every tenth repeats the one before it."""
    return [
        {"prompt": f"{i - (i % 10 == 9)} " * 200, "rejected": "no " * 300, "anchors": ["a " * 100]}
        for i in range(count)
    ]


def read(path: str) -> None:
    rows = read_rows(path)
    assert sum(1 for _ in zip(rows, rows, strict=True)) == len(rows)
    rows_digest(rows)
    split_by_prompt(rows, 0.5)


def read_two(path: str) -> None:
    read_datasets(D2OConfig(dataset_name=path, eval_dataset_name=path))


def look(path: str) -> None:
    rows = read_rows(path)
    describe("train", rows, tiny_tokenizer(), D2OConfig(max_length=4096, max_completion_length=2048))


@pytest.mark.parametrize("ending", ["jsonl", pytest.param("parquet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("use", [read, *(pytest.param(use, marks=pytest.mark.slow) for use in (read_two, look))])
def test_memory_does_not_grow_with_the_data(tmp_path: Path, use: Callable[[str], None], ending: str) -> None:
    counts, peaks = (400, 1600), []
    paths = [str(tmp_path / f"{count}.{ending}") for count in counts]
    for path, count in zip(paths, counts, strict=True):
        if ending == "jsonl":
            write(Path(path), long_rows(count))
        else:
            pq.write_table(pa.Table.from_pylist(long_rows(count)), path)
    use(paths[0])  # imports and caches once
    for path in paths:
        gc.collect()
        tracemalloc.start()
        use(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    per_row = (peaks[1] - peaks[0]) / (counts[1] - counts[0])
    assert per_row < 200, f"{per_row:.0f} bytes a row: {peaks}"

"""A store reads its rows on demand, and reports files that changed meanwhile."""

from __future__ import annotations

import random
import weakref
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2o_fast.anchors import shards
from d2o_fast.anchors.inspection import export, inspect
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.data.row import Example, Row
from d2o_fast.errors import D2OError
from made_data import SHARD, K, write_store
from stores import build
from tiny import tiny_rows

COUNT = 5 * SHARD + 7


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "store"
    write_store(folder, COUNT)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the store that a test may damage."""
    (tmp_path / "store").mkdir()
    for path in made.iterdir():
        (tmp_path / "store" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "store"


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [record for path in sorted(folder.glob("*.parquet")) for record in pq.read_table(path).to_pylist()]


def test_examples_and_rows_are_those_in_the_files(made: Path) -> None:
    store, records = AnchorStore.open(made), records_of(made)
    examples, rows = store.examples(), store.rows()
    assert len(examples) == len(rows) == store.num_present == COUNT
    expected = [
        Example(r["prompt_ids"], r["rejected_ids"], r["anchors_ids"], [r["rejected_ref_logp"], *r["anchors_ref_logps"]])
        for r in records
    ]
    assert list(examples) == expected
    assert len(expected[0].anchor_ids) == K
    assert list(rows) == [Row(r["prompt"], r["rejected"], r["anchors"], "rows.jsonl", r["row"] + 1) for r in records]
    for i in random.Random(0).sample(range(-COUNT, COUNT), 60):
        assert examples[i] == expected[i]
        assert rows[i].index == 1 + i % COUNT
    assert examples[SHARD - 3 : 2 * SHARD + 2] == expected[SHARD - 3 : 2 * SHARD + 2]
    assert examples[::-50] == expected[::-50]
    assert examples == expected
    for i in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError):
            examples[i]
    assert list(store.records("row", "sampled")) == [{"row": i, "sampled": False} for i in range(COUNT)]


def test_only_what_was_read_last_is_kept(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = AnchorStore.open(made)
    examples = one.examples()
    examples[0]
    of_a_shard = one._shards._bytes
    monkeypatch.setattr(shards, "CACHE_BYTES", int(2.5 * of_a_shard))
    chance, read, reading = random.Random(1), list[int](), shards.read_shard

    def watched(folder: Path, i: int, *rest: Any) -> pa.Table:
        read.append(i)
        return reading(folder, i, *rest)

    monkeypatch.setattr(shards, "read_shard", watched)
    before = pa.total_allocated_bytes()
    for _ in range(200):
        examples[chance.randrange(COUNT)]
        assert pa.total_allocated_bytes() - before < 3 * of_a_shard
    assert len(read) > 20
    examples = AnchorStore.open(made).examples()
    read.clear()
    for i in (5, 70, 6, 300, 7, 71):
        examples[i]
    assert read == [0, 1, 4, 1], "shard 1 had to go for shard 4, and not shard 0, in which 6 and 7 lie"
    read.clear()
    assert sum(1 for _ in examples) == COUNT
    assert len(read) <= 6, "each shard once"
    monkeypatch.setattr(shards, "CACHE_BYTES", 0)
    assert examples[3] == examples[3], "a shard larger than the cache is read all the same"


def test_opening_keeps_no_shard(made: Path) -> None:
    before = pa.total_allocated_bytes()
    store = AnchorStore.open(made)
    assert pa.total_allocated_bytes() - before < 100_000, "a whole shard has more than 200 000"
    assert store._shards._bytes == 0


def test_a_shard_that_changes_after_opening_is_named(folder: Path) -> None:
    store = AnchorStore.open(folder)
    examples, rows = store.examples(), store.rows()
    shard = folder / "shard-00002.parquet"
    good, inside = shard.read_bytes(), 2 * SHARD + 1
    other = (folder / "shard-00001.parquet").read_bytes()
    for data in (good[: len(good) // 2], good[:99] + bytes([good[99] ^ 1]) + good[100:], b"", other):
        shard.write_bytes(data)
        for look in (lambda: examples[inside], lambda: rows[inside], lambda: list(store.records("prompt"))):
            with pytest.raises(
                D2OError, match=r"shard-00002\.parquet is damaged .*remove it and its \.sha256, and run"
            ):
                look()
    shard.unlink()
    for look in (lambda: examples[inside], lambda: list(rows), lambda: examples[0:COUNT:10]):
        with pytest.raises(D2OError, match=r"shard-00002\.parquet is missing; run `d2o sample` again to complete"):
            look()
    assert examples[0] == store.examples()[0], "the others are still read"
    shard.write_bytes(good)
    assert rows[inside].index == inside + 1


def test_inspecting_and_exporting_keep_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(build(tmp_path / "store", tiny_rows(24)).folder)
    held, tables, reading = list[int](), list[weakref.ref[pa.Table]](), shards.read_shard

    def watched(*arguments: Any) -> pa.Table:
        held.append(sum(table() is not None for table in tables))
        table = reading(*arguments)
        tables.append(weakref.ref(table))
        return table

    monkeypatch.setattr(shards, "read_shard", watched)
    text = inspect(folder)
    assert "24 of 24 negatives" in text
    assert "24 prompts, 72 anchors (72 sampled, 0 given with the data)" in text
    assert export(folder, tmp_path / "out.jsonl") == 72
    assert len(held) == 3 * 6, "inspect: which rows have anchors, then all rows; export: all rows"
    assert max(held) <= 1


def test_an_export_that_fails_leaves_no_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = shards.read_shard

    def vanishing(folder: Path, i: int, *rest: Any) -> pa.Table:
        (folder / "shard-00003.parquet").unlink(missing_ok=True)
        return reading(folder, i, *rest)

    monkeypatch.setattr(shards, "read_shard", vanishing)
    with pytest.raises(D2OError, match=r"shard-00003\.parquet is missing"):
        export(folder, tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]

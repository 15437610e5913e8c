"""Damaged and hostile stores: each is refused in one message that names the file, or accepted rightly.

A store of four shards is copied and damaged once per case. Cases under "forged" also get the digests of their content.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2o_fast.anchors import shards
from d2o_fast.anchors.build import build_store
from d2o_fast.anchors.inspection import export, inspect
from d2o_fast.anchors.shards import SCHEMA, write_shard
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.data.reading import rows_from
from d2o_fast.errors import D2OError
from stores import CHAT_ROW, CONFIG, build, contents
from tiny import tiny_model, tiny_rows, tiny_tokenizer

CHAT = [{name: CHAT_ROW[name] for name in ("prompt", "rejected")}, CHAT_ROW]
RECORDS = [*tiny_rows(9), {"prompt": "how", "rejected": " to", "anchors": [" open", " mend the lock"]}, *CHAT, CHAT[0]]
SHARD, DIGEST = "shard-00001.parquet", "shard-00001.parquet.sha256"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "store"
    _made(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


@pytest.fixture(autouse=True)
def _nothing_hangs() -> Iterator[None]:
    signal.alarm(60)  # ends the process
    yield
    signal.alarm(0)


def _made(folder: Path) -> AnchorStore:
    rows = rows_from(RECORDS, "memory")
    return build_store(tiny_model(chat=True), tiny_tokenizer(True), rows, CONFIG, folder)


# --- Files ---


def _cut(name: str, size: float) -> Change:
    return lambda folder: os.truncate(folder / name, int(size * (folder / name).stat().st_size))


def _flip(name: str, place: float) -> Change:
    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(place * (len(data) - 1))] ^= 1 << int(place * 7)
        (folder / name).write_bytes(data)

    return flip


def _in_place_of(name: str, make: Change) -> Change:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return replace


def _swap(one: str, other: str) -> Change:
    def swap(folder: Path) -> None:
        (folder / one).rename(folder / "x")
        (folder / other).rename(folder / one)
        (folder / "x").rename(folder / other)

    return swap


def _both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def _of_another(folder: Path) -> None:
    """A shard of another store and its digest."""
    build(folder.parent / "other", tiny_rows(20)[10:], tiny_model(seed=1))
    for name in (SHARD, DIGEST):
        shutil.copy(folder.parent / "other" / name, folder / name)


def _manifest(**values: Any) -> Change:
    """Sets fields of the manifest; "f_" marks fields of its fingerprint, and ``...`` removes the field."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, value in values.items():
            place = manifest["fingerprint"] if name.startswith("f_") else manifest
            place[name.removeprefix("f_")] = value
            if value is ...:
                del place[name.removeprefix("f_")]
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def _write(name: str, data: str) -> Change:
    return lambda folder: (folder / name).write_text(data)


DAMAGED_SHARD = r"shard-00001\.parquet is damaged .*remove it and its \.sha256, and run `d2o sample`"
NO_DIGEST = r"shard-00001\.parquet: its digest .* is missing or damaged; remove it"
MANIFEST = r"manifest\.json( is damaged| is not a manifest|: ).*; remove the folder and sample again|other conditions"
FILES: dict[str, tuple[Change, str | None]] = {
    "shard missing": (lambda folder: (folder / SHARD).unlink(), None),
    "shard and digest missing": (lambda folder: [(folder / name).unlink() for name in (SHARD, DIGEST)], None),
    "all shards missing": (lambda folder: [path.unlink() for path in folder.glob("shard*")], None),
    "digest missing": (lambda folder: (folder / DIGEST).unlink(), NO_DIGEST),
    "manifest missing": (lambda folder: (folder / "manifest.json").unlink(), r"shards without manifest\.json"),
    "digest empty": (_cut(DIGEST, 0), NO_DIGEST),
    "digest of bytes": (lambda folder: (folder / DIGEST).write_bytes(b"\xff\xfe"), NO_DIGEST),
    "digest of another": (
        lambda folder: shutil.copy(folder / "shard-00000.parquet.sha256", folder / DIGEST),
        "damaged",
    ),
    **{f"shard cut at {size}": (_cut(SHARD, size), DAMAGED_SHARD) for size in (0, 0.01, 0.3, 0.7, 0.999)},
    **{f"manifest cut at {size}": (_cut("manifest.json", size), MANIFEST) for size in (0, 0.01, 0.5, 0.99)},
    **{f"shard, bit at {place}": (_flip(SHARD, place), DAMAGED_SHARD) for place in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)},
    **{f"digest, bit at {place}": (_flip(DIGEST, place), DAMAGED_SHARD) for place in (0, 0.2, 0.4)},
    "digest, bit in the name": (_flip(DIGEST, 0.9), None),
    "shards swapped": (_swap("shard-00000.parquet", SHARD), "damaged"),
    "shards and digests swapped": (
        _both(_swap("shard-00000.parquet", SHARD), _swap("shard-00000.parquet.sha256", DIGEST)),
        r"does not hold the rows 0 to 3",
    ),
    "shard of another store": (_of_another, r"shard-00001\.parquet, row 4 .*memory, row 5.*, field 'prompt': "),
    "shard too many": (
        _both(lambda f: shutil.copy(f / SHARD, f / "shard-00007.parquet")),
        r"00007\.parquet is not one of",
    ),
    "unknown files": (_both(_write("README.md", "mine"), _write("shard-1.parquet", "mine")), None),
    "leftover of a killed writer": (_both(_write(SHARD + ".tmp", "half"), lambda f: (f / SHARD).unlink()), None),
    **{
        f"{name} is a {kind}": (_in_place_of(name, make), rf"{re.escape(name)} (is not a regular file|cannot be read)")
        for name in ("manifest.json", SHARD, DIGEST)
        for kind, make in (("folder", Path.mkdir), ("FIFO", os.mkfifo))
    },
    "shard is a dangling link": (
        _in_place_of(SHARD, lambda path: path.symlink_to("none")),
        r"00001\.parquet is missing",
    ),
    "shard is a link to itself": (_in_place_of(SHARD, lambda path: path.symlink_to(SHARD)), r"cannot be read"),
    "shard is a link to a device": (_in_place_of(SHARD, lambda path: path.symlink_to("/dev/zero")), "regular file"),
    "shard is a link to the same": (
        _both(lambda f: (f / SHARD).rename(f / "moved"), lambda f: (f / SHARD).symlink_to("moved")),
        None,
    ),
    "manifest is a dangling link": (
        _in_place_of("manifest.json", lambda path: path.symlink_to("none")),
        r"no manifest\.json",
    ),
}
for name, text in {
    "nested": "[" * 100_000,
    "nested objects": '{"fingerprint":' * 100_000,
    "6000 digits": f'{{"num_rows": {"9" * 6000}}}',
    "no JSON": "mine",
    "a list": "[]",
    "a number": "5",
    "null": "null",
    "a fingerprint of text": '{"fingerprint": "format", "num_rows": 1, "num_shards": 1}',
    "not UTF-8 text": "\udcff".encode("utf-8", "surrogatepass").decode("latin-1"),
}.items():
    FILES[f"manifest: {name}"] = _write("manifest.json", text), MANIFEST
for values in (
    *({"num_shards": value} for value in (10**9, -1, 0, 3, 5, 4.0, "4", True, None, [4], ..., 10**40, float("nan"))),
    *({"num_rows": value} for value in (10**9, -13, 0, 12, 14, "13", None, {}, ...)),
    {"num_rows": 16 * 10**9, "num_shards": 4 * 10**9},
    {"num_rows": 10**30, "num_shards": 10**30 // 4},
    *({"f_sampling_batch_size": value} for value in (0, -4, 10**9, "4", None, ...)),
    *({"f_num_generations": value} for value in (0, 4, "3", 3.5, ...)),
    *({"f_num_draws": value} for value in (1, "5", -1)),
    *({"f_stop_token_ids": value} for value in ("4", [None], [-1], ..., [[4]])),
    *({"f_max_completion_length": value} for value in (0, "12", 10**9, ...)),
    *({"f_dtype": value} for value in ("\x1b[2J", 5, ...)),
    *({"f_weights": value} for value in (5, ["x"], "0" * 32, ...)),
    {"f_temperature": float("inf")},
    {"f_sampling_seed": "5"},
    {"f_more": "field"},
    {"references": 5},
    {"references": {"neg": 5}},
):
    FILES[f"manifest with {values}"] = _manifest(**values), MANIFEST
for value in (1, 3, "2", None, {}, 10**40, "x" * 10**6):
    FILES[f"manifest with format {str(value)[:9]}"] = _manifest(f_format=value), "have format .*reads format 2"


def _judged(folder: Path, expected: str | None, whole: Path) -> None:
    before = set(os.listdir(folder))
    if expected is None:
        store = _made(folder)
        assert store.complete
        kept = {name: data for name, data in contents(folder).items() if name in contents(whole) and name != DIGEST}
        assert kept == {name: data for name, data in contents(whole).items() if name != DIGEST}
        assert not [path for path in os.listdir(folder) if path.endswith((".tmp", ".lock"))]
        return
    with pytest.raises(D2OError, match=expected) as found:
        _made(folder)
    assert len(str(found.value)) < 3000
    assert set(os.listdir(folder)) == before


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file(folder: Path, whole: Path, case: str) -> None:
    change, expected = FILES[case]
    change(folder)
    _judged(folder, expected, whole)


# --- Forged records: whole files with right digests ---


def _records(folder: Path, shard: int) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"shard-{shard:05d}.parquet", schema=SCHEMA).to_pylist()


def _forge(shard: int, change: Callable[[list[dict[str, Any]]], object]) -> Change:
    def forge(folder: Path) -> None:
        records = _records(folder, shard)
        changed = change(records)
        records = changed if isinstance(changed, list) else records
        write_shard(folder, shard, pa.Table.from_pylist(records, schema=SCHEMA))

    return forge


def _set(row: int, field: str, value: Any, *place: int) -> Change:
    """Sets a field of the row, or an item of a list in it. ``value`` may be a function of the value before."""

    def change(records: list[dict[str, Any]]) -> None:
        owner, key = records[row % 4], field
        for index in place:
            owner, key = owner[key], index  # type: ignore[assignment]
        owner[key] = value(owner[key]) if callable(value) else value

    return _forge(row // 4, change)


def _anchor(row: int, place: int, ids: list[int]) -> Change:
    def change(records: list[dict[str, Any]]) -> None:
        records[row % 4]["anchors_ids"][place], records[row % 4]["anchors_tokens"][place] = ids, len(ids)

    return _forge(row // 4, change)


def _anchors(number: int, dropped: list[str] | None = None) -> Change:
    """``number`` anchors of three in row 5, the first again and again."""

    def change(records: list[dict[str, Any]]) -> None:
        for name in [name for name in records[1] if name.startswith("anchors")]:
            records[1][name] = records[1][name][:1] * number
        records[1]["dropped"] = dropped or []

    return _forge(1, change)


def _exchanged(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content of the first two rows exchanged."""
    return [{**records[1], "row": records[0]["row"]}, {**records[0], "row": records[1]["row"]}, *records[2:]]


def _of_type(name: str, kind: pa.DataType) -> Change:
    def change(folder: Path) -> None:
        table = pq.read_table(folder / SHARD)
        at = table.schema.get_field_index(name)
        _rewritten(folder, table.set_column(at, name, table[name].cast(kind)))

    return change


def _rewritten(folder: Path, table: pa.Table) -> None:
    pq.write_table(table, folder / SHARD)
    (folder / DIGEST).write_text(f"{hashlib.sha256((folder / SHARD).read_bytes()).hexdigest()}  {SHARD}\n")


def _forged_file(data: bytes) -> Change:
    return _both(
        lambda folder: (folder / SHARD).write_bytes(data),
        lambda folder: (folder / DIGEST).write_text(hashlib.sha256(data).hexdigest()),
    )


def _named(row: int, field: str, found: str = "") -> str:
    return rf"shard-0000{row // 4}\.parquet, row {row} \(.*memory, row {row + 1}.*field '{field}(\[\d\])?': .*{found}"


NO_SHARD = r"shard-00001\.parquet is no shard of this store \(.*\); remove it"
FORGED: dict[str, tuple[Change, str]] = {
    **{
        f"score of {value} nats": (
            _set(5, "anchors_ref_logps", value, 1),
            _named(5, "anchors_ref_logps", "no log-prob"),
        )
        for value in (500.0, 1.0, float("inf"), -float("inf"), float("nan"), -1e30, 3e38)
    },
    **{
        f"negative's score of {value}": (_set(6, "rejected_ref_logp", value), _named(6, "rejected_ref_logp"))
        for value in (500.0, float("nan"), -float("inf"), -1e9)
    },
    "no score of a negative": (_set(5, "rejected_ref_logp", None), r"row 5: 3 anchors, but no score of the negative"),
    "a null score": (_set(5, "anchors_ref_logps", None, 0), _named(5, "anchors_ref_logps", "null")),
    **{
        f"{field} with {value}": (_set(5, field, value, *place), _named(5, field))
        for field, *place in (("prompt_ids", 0), ("rejected_ids", 0), ("anchors_ids", 0, 0))
        for value in (-1, 160, 2**31 - 1, None)
    },
    "prompt ids of another": (
        _set(5, "prompt_ids", lambda ids: [*ids[:-1], 9]),
        _named(5, "prompt_ids", "in the data"),
    ),
    "another prompt": (_set(5, "prompt", "how to build a bomb?"), _named(5, "prompt", "in the data")),
    "another negative": (_set(7, "rejected", " of course"), _named(7, "rejected", "in the data")),
    "another given anchor": (_set(9, "anchors", " of course", 0), _named(9, "anchors", "in the data")),
    "other ids of a given anchor": (_set(9, "anchors_ids", 9, 0, 0), _named(9, "anchors_ids", "in the data")),
    "a null prompt": (_set(5, "prompt", None), _named(5, "prompt", "null")),
    "a null list": (_forge(1, lambda records: records[1].update(dropped=None)), "row 5"),
    "wrong number of prompt tokens": (_set(5, "prompt_tokens", 1), _named(5, "prompt_tokens")),
    "wrong number of negative tokens": (_set(5, "rejected_tokens", 10**6), _named(5, "rejected_tokens")),
    "wrong number of anchor tokens": (_set(5, "anchors_tokens", 2, 1), _named(5, "anchors_tokens")),
    "an empty anchor": (_anchor(5, 1, []), _named(5, "anchors_ids", "0 tokens")),
    "an anchor that is too long": (_anchor(5, 0, [7] * 13), _named(5, "anchors_ids", "13 tokens")),
    "fewer anchors": (_anchors(2), "row 5: 2 anchors, 2 scores and 0 dropped draws"),
    "more anchors": (_anchors(4), "row 5: 4 anchors, 4 scores and 0 dropped draws"),
    "an unknown reason": (_anchors(2, ["\x1b[2J"]), _named(5, "dropped", r"'\\x1b\[2J' is none of the reasons")),
    "given instead of drawn": (_set(5, "sampled", False), _named(5, "anchors")),
    "drawn instead of given": (_set(9, "sampled", True), r"row 9: 2 anchors|field 'anchors'"),
    "text instead of messages": (_set(10, "chat", False), _named(10, "prompt")),
    "messages instead of text": (_set(5, "chat", True), _named(5, "prompt", "no messages")),
    **{
        f"messages {text[:12]}": (_set(10, "prompt", text), _named(10, "prompt"))
        for text in ("", "[]", "[5]", "[{}]", '{"role": "user"}', "[" * 100_000, "9" * 6000, '[{"role": 5}]')
    },
    "a row twice": (_forge(1, lambda records: [*records[:3], records[0]]), r"does not hold the rows 4 to 7"),
    "rows in another order": (_forge(1, lambda records: records[::-1]), r"does not hold the rows 4 to 7"),
    "a row missing": (_forge(1, lambda records: records[:3]), r"does not hold the rows 4 to 7"),
    "no rows": (_forge(1, lambda records: []), r"does not hold the rows 4 to 7"),
    "rows too many": (_forge(3, lambda records: records * 2), r"does not hold the row|no shard"),
    "contents of two rows exchanged": (_forge(1, _exchanged), _named(4, "prompt")),
    "a column missing": (
        lambda folder: _rewritten(folder, pq.read_table(folder / SHARD).drop_columns(["dropped"])),
        NO_SHARD,
    ),
    "ids as 64 bits": (_of_type("prompt_ids", pa.list_(pa.int64())), NO_SHARD),
    "scores as 64 bits": (_of_type("rejected_ref_logp", pa.float64()), NO_SHARD),
    "rows as text": (_of_type("row", pa.string()), NO_SHARD),
    "no Parquet": (_forged_file(b"mine"), NO_SHARD),
    "an empty file": (_forged_file(b""), NO_SHARD),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_store(folder: Path, whole: Path, case: str) -> None:
    change, expected = FORGED[case]
    change(folder)
    _judged(folder, expected, whole)


def test_a_file_that_grows_when_read_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one token id take a few bytes a million."""
    monkeypatch.setattr(shards, "MOST_VALUES", 1 << 20)
    records = _records(folder, 1)
    records[0]["prompt_ids"] = [0] * (1 << 21)
    _rewritten(folder, pa.Table.from_pylist(records, schema=SCHEMA))
    assert (folder / SHARD).stat().st_size < 20_000
    with pytest.raises(D2OError, match=NO_SHARD):
        AnchorStore.open(folder)


def _refusal(look: Callable[[], object]) -> str | None:
    try:
        look()
    except D2OError as error:
        return str(error)
    return None


def test_random_bits_and_cuts(folder: Path, whole: Path) -> None:
    """One bit or the end of any file: refused with the file's name, or of no consequence (white space, a name)."""
    chance, names, refused = random.Random(0), sorted(os.listdir(whole)), 0
    examples = list(AnchorStore.open(whole).examples())
    for _ in range(120):
        name = chance.choice(names)
        change = chance.choice((_flip, _cut))(name, chance.random())
        change(folder)
        found = _refusal(lambda: AnchorStore.open(folder))
        if found is None:
            assert list(AnchorStore.open(folder).examples()) == examples
        else:
            assert name.removesuffix(".sha256") in found or "format" in found
            refused += 1
        shutil.copy(whole / name, folder / name)
    assert refused > 60


def test_forged_records_are_seen_without_the_data(folder: Path) -> None:
    """``inspect`` has no data and no model: it refuses all but other texts and ids, and shows no escape sequence."""
    accepted = set()
    for case, (change, _) in FORGED.items():
        copy = Path(shutil.copytree(folder, folder.parent / "copy"))
        change(copy)
        found = _refusal(lambda copy=copy: inspect(copy))  # type: ignore[misc]
        assert found is None or "shard-0000" in found
        accepted |= {case} if found is None else set()
        shutil.rmtree(copy)
    other = {case for case, (_, expected) in FORGED.items() if "in the data" in expected}
    ids = {
        f"{field} with {value}" for field in ("prompt_ids", "rejected_ids", "anchors_ids") for value in (160, 2**31 - 1)
    }
    assert accepted == other | ids | {
        "contents of two rows exchanged",
        "text instead of messages",
        "given instead of drawn",
    }


def test_damaged_files_without_the_data(folder: Path) -> None:
    """Inspecting and exporting refuse them in one message too, or show what is there."""
    for change, _ in FILES.values():
        copy = Path(shutil.copytree(folder, folder.parent / "copy"))
        change(copy)
        for look in (inspect, lambda store: export(store, folder.parent / "out.jsonl")):
            found = _refusal(lambda look=look, copy=copy: look(copy))  # type: ignore[misc]
            assert found is None or str(copy) in found
            (folder.parent / "out.jsonl").unlink(missing_ok=True)
        assert "\x1b" not in (found or "")
        shutil.rmtree(copy)
        shutil.rmtree(folder.parent / "other", ignore_errors=True)


def test_a_manifest_without_references_can_be_inspected(folder: Path) -> None:
    _manifest(references=...)(folder)
    assert "13 of 13 negatives" in inspect(folder)


# --- While a store is made ---


def test_a_disk_that_is_full_while_anchors_are_made(tmp_path: Path) -> None:
    """The shards that are made stay; the next call makes the others, with the same bits."""
    chance = random.Random(0)
    texts = ["".join(chance.choices("abcdefghij", k=12)) for _ in range(400)]
    records = [*tiny_rows(8), {"prompt": "how", "rejected": " to", "anchors": texts}]
    whole = Path(build(tmp_path / "whole", records).folder)
    sizes = [(whole / f"shard-{i:05d}.parquet").stat().st_size for i in range(3)]
    assert max(sizes[:2]) < sizes[2]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[2] - 1, hard))
    try:
        found = _refusal(lambda: build(tmp_path / "store", records))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found is not None
    assert re.search(r"shard-00002\.parquet cannot be written: File too large\. .*run the same command again", found)
    made = {name for name in os.listdir(whole) if "00002" not in name}
    assert set(os.listdir(tmp_path / "store")) == made
    build(tmp_path / "store", records)
    assert contents(tmp_path / "store") == contents(whole)


@pytest.mark.parametrize("place", ["file", "file/inside", "link"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("none")
    with pytest.raises(D2OError, match=rf"{place} cannot be written: "):
        _made(tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_lock_that_is_a_symlink(folder: Path) -> None:
    (folder.parent / "precious").write_text("mine")
    (folder / ".lock").symlink_to(folder.parent / "precious")
    assert _made(folder).complete, "a store that is complete is only read"
    (folder / SHARD).unlink()
    with pytest.raises(D2OError, match=r"\.lock is not a regular file"):
        _made(folder)
    assert (folder.parent / "precious").read_text() == "mine"

"""Anchor stores: every file with every damage, wrong fields of the manifest, shards that lie under a valid digest.

A store is read by training, by ``d2o anchors`` and by ``AnchorStore.open``.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from case import Call, Case, Cases, byte_damages, drop, fine, put, same_weights, set_json, some, train

STORE = Path("anchors/train")
SHARD = STORE / "shard-00001.parquet"


def _python() -> Call:
    from d2o_fast import AnchorStore

    return lambda: list(AnchorStore.open(STORE).examples())


#: the readers of a store
DOORS: dict[str, Callable[[], Call]] = {
    "train": train,
    "inspect": lambda: ["anchors", "inspect", str(STORE)],
    "export": lambda: ["anchors", "export", str(STORE), "out.jsonl"],
    "Python": _python,
}


def cases(chance: random.Random, good: Path) -> Cases:
    """All cases of the kind."""
    for file in ("manifest.json", SHARD.name, f"{SHARD.name}.sha256"):
        for name, damage in byte_damages(chance, flips=2).items():
            if name.startswith("without") and file != SHARD.name:
                continue  # the last newline
            for door in chance.sample(list(DOORS), 2):
                if file == SHARD.name and name in ("missing", "a link to nowhere"):
                    continue  # an unfinished store, below
                words: tuple[str | tuple[str, ...], ...] = (SHARD.name if file == f"{SHARD.name}.sha256" else file,)
                either = file == "manifest.json" and name.startswith("bit")  # the fingerprint's values differ
                words = (("manifest.json", "anchors/train"),) if either else words
                # a cut may leave the whole digest
                either = either or (file.endswith("256") and name.startswith(("cut", "zeros")))
                prepare = partial(_then, door, partial(damage, STORE / file))
                right = fine if either else None
                yield Case("stores", f"{door}, {file}: {name}", prepare, words, right, either=either)
    yield from _manifest_cases(chance)
    yield from _lie_cases(chance)
    yield from _folder_cases()


def _then(door: str, damage: Callable[[], Any]) -> Call:
    damage()
    return DOORS[door]()


# --- The manifest ------------------------------------------------------------------------------------------------

_COUNTS: dict[str, Any] = {
    "10^9": 10**9,
    "10^30": 10**30,
    "0": 0,
    "-1": -1,
    "a text": "2",
    "a fraction": 1.5,
    "nothing": None,
    "true": True,
    "a list": [2],
    "one more": 7,
    "one less": 1,
}


def _manifest_cases(chance: random.Random) -> Cases:
    manifest = STORE / "manifest.json"

    def case(name: str, change: Callable[[Any], Any]) -> Cases:
        for door in chance.sample(list(DOORS), 2):
            prepare = partial(_then, door, partial(set_json, manifest, change))
            yield Case("stores", f"{door}, manifest.json: {name}", prepare, (("manifest.json", "anchors/train"),))

    for key in ("num_rows", "num_shards"):
        for name, value in [("10^9", 10**9), *some(chance, list(_COUNTS.items())[1:], 4)]:
            yield from case(f"{key}: {name}", put(key, value=value))
    for key in ("fingerprint", "num_rows", "num_shards"):
        yield from case(f"without {key}", drop(key))
    for name, value in {"a list": [], "nothing": None, "a text": "x", "empty": {}}.items():
        yield from case(f"fingerprint: {name}", put("fingerprint", value=value))
    for key, value in {"num_generations": "2", "sampling_batch_size": 0, "num_draws": "x", "format": 99}.items():
        yield from case(f"fingerprint.{key}: {value!r}", put("fingerprint", key, value=value))
    for key, value in {"num_generations": None, "sampling_batch_size": 10**12, "format": None}.items():
        yield from case(f"fingerprint.{key}: {value!r}", put("fingerprint", key, value=value))
    yield from case("without fingerprint.sampling_batch_size", drop("fingerprint", "sampling_batch_size"))
    for name, content in {"a list": [1], "null": None, "a number": 5, "deep": "deep"}.items():
        text = "[" * 100_000 if content == "deep" else json.dumps(content)
        for door in chance.sample(list(DOORS), 2):
            prepare = partial(_then, door, partial(manifest.write_text, text))
            yield Case("stores", f"{door}, manifest.json is {name}", prepare, (("manifest.json", "anchors/train"),))
    for key in ("weights", "rows", "tokenizer", "temperature", "max_length", "stop_token_ids"):
        change = put("fingerprint", key, value="other")
        prepare = partial(_then, "train", partial(set_json, manifest, change))
        yield Case("stores", f"train, manifest.json: another {key}", prepare, (key,))


# --- Shards that lie ---------------------------------------------------------------------------------------------


def rewrite(change: Callable[[list[dict[str, Any]]], Any], shard: Path = SHARD) -> None:
    """Writes the changed records with a digest that fits."""
    table = pq.read_table(shard)
    records = table.to_pylist()
    changed = change(records)
    _write(pa.Table.from_pylist(records if changed is None else changed, schema=table.schema), shard)


def _write(table: pa.Table, shard: Path) -> None:
    pq.write_table(table, shard)
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    Path(f"{shard}.sha256").write_text(f"{digest}  {shard.name}\n")


def _in_row(field: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(records: list[dict[str, Any]]) -> None:
        found = records[1][field]
        records[1][field] = value(found) if callable(value) else value

    return change


#: lies that every reader must see
LIES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "an id beyond the vocabulary in an anchor": _in_row("anchors_ids", lambda ids: [[*ids[0], 5000], *ids[1:]]),
    "an id below 0 in the prompt": _in_row("prompt_ids", lambda ids: [-1, *ids[1:]]),
    "an id below 0 in an anchor": _in_row("anchors_ids", lambda ids: [[-7], *ids[1:]]),
    "an id beyond the vocabulary in the negative": _in_row("rejected_ids", lambda ids: [2**31 - 1, *ids[1:]]),
    "a score above 0": _in_row("rejected_ref_logp", 500.0),
    "an anchor's score above 0": _in_row("anchors_ref_logps", [500.0, -3.0]),
    "a score of NaN": _in_row("rejected_ref_logp", float("nan")),
    "an anchor's score of -inf": _in_row("anchors_ref_logps", [float("-inf"), -3.0]),
    "an empty prompt": _in_row("prompt_ids", []),
    "an empty negative": _in_row("rejected_ids", []),
    "an empty anchor": _in_row("anchors_ids", lambda ids: [[], *ids[1:]]),
    "another count of tokens": _in_row("prompt_tokens", 9999),
    "no anchor ids": _in_row("anchors_ids", None),
    "no prompt": _in_row("prompt", None),
    "no score of the negative": _in_row("rejected_ref_logp", None),
    "one anchor less": _in_row("anchors", lambda found: found[:1]),
    "one score less": _in_row("anchors_ref_logps", lambda found: found[:1]),
    "one score more": _in_row("anchors_ref_logps", lambda found: [*found, -1.0]),
    "another row": _in_row("row", 0),
    "a row less": lambda records: records[:-1],
    "a row twice": lambda records: [*records, records[-1]],
    "rows in another order": lambda records: records[::-1],
    "no rows": lambda records: [],
}
#: lies that only training can see, which knows the data
DATA_LIES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "another prompt": _in_row("prompt", "how to bake the boat?"),
    "other ids of the prompt": _in_row("prompt_ids", lambda ids: [10, 11, 12][: len(ids)] + ids[3:]),
    "other ids of the negative": _in_row("rejected_ids", lambda ids: ids[::-1]),
    "another negative": _in_row("rejected", " something else"),
    "a response longer than max_completion_length": _in_row("anchors_ids", lambda ids: [[10] * 40, *ids[1:]]),
}


def _lie_cases(chance: random.Random) -> Cases:
    for name, change in LIES.items():
        # only training knows the vocabulary
        doors = ["train"] + [chance.choice(["inspect", "export", "Python"])] * ("vocabulary" not in name)
        for door in doors:
            prepare = partial(_then, door, partial(rewrite, change))
            yield Case("stores", f"{door}, a shard with {name}", prepare, (SHARD.name,))
    for name, change in DATA_LIES.items():
        prepare = partial(_then, "train", partial(rewrite, change))
        yield Case("stores", f"train, a shard with {name}", prepare, ((SHARD.name, "rows.jsonl, row"),))
    tables: dict[str, Callable[[pa.Table], pa.Table]] = {
        "without a column": lambda table: table.drop_columns(["anchors_ids"]),
        "with texts as ids": lambda table: table.set_column(
            table.schema.get_field_index("prompt_ids"), "prompt_ids", pa.array([["a"]] * table.num_rows)
        ),
        "with a column less of scores": lambda table: table.drop_columns(["anchors_ref_logps"]),
        "of another program": lambda table: pa.table({"x": [1]}),
        "without columns": lambda table: table.select([]),
    }
    for name, change in tables.items():
        for door in chance.sample(list(DOORS), 2):
            prepare = partial(_then, door, partial(_change_table, change))
            yield Case("stores", f"{door}, a shard {name}", prepare, (SHARD.name,))


def _change_table(change: Callable[[pa.Table], pa.Table]) -> None:
    _write(change(pq.read_table(SHARD)), SHARD)


# --- The folder --------------------------------------------------------------------------------------------------


def _same_as_shard(case: Path, good: Path, text: str) -> str | None:
    path = Path("anchors/train/shard-00001.parquet")
    same = (case / path).read_bytes() == (good / "base" / path).read_bytes()
    return None if same else "the shard was made with other bits"


def _lock(make: Callable[[], Any], door: str = "train") -> Callable[[], Call]:
    def prepare() -> Call:
        os.unlink(f"{SHARD}.sha256"), os.unlink(SHARD)  # so that the store must be written
        make()
        return DOORS[door]()

    return prepare


def _link_lock() -> None:
    Path("precious.txt").write_text("mine")
    (STORE / ".lock").symlink_to(Path("precious.txt").resolve())


def _swap() -> None:
    first = STORE / "shard-00000.parquet"
    os.rename(first, "x"), os.rename(SHARD, first), os.rename("x", SHARD)


def _swap_all() -> None:
    for end in ("", ".sha256"):
        first = Path(f"{STORE}/shard-00000.parquet{end}")
        os.rename(first, "x"), os.rename(f"{SHARD}{end}", first), os.rename("x", f"{SHARD}{end}")


def _folder_cases() -> Cases:
    for door in DOORS:
        words = (("shard-00000.parquet", SHARD.name),)
        yield Case("stores", f"{door}: two shards swapped", partial(_then, door, _swap), words)
        yield Case("stores", f"{door}: two shards and digests swapped", partial(_then, door, _swap_all), words)
        yield Case(
            "stores",
            f"{door}: no folder",
            partial(_then, door, lambda: shutil.rmtree(STORE)),
            ("anchors",),
            *((same_weights("out", "out"),) if door == "train" else ()),
        )
        yield Case(
            "stores",
            f"{door}: an empty folder",
            partial(_then, door, _emptied),
            ("anchors",),
            *((same_weights("out", "out"),) if door == "train" else ()),
        )
    for door in ("export", "Python"):
        yield Case(
            "stores", f"{door}: a shard is not made yet", partial(_then, door, lambda: os.unlink(SHARD)), ("anchors",)
        )
    right = same_weights("out", "out")
    made = partial(_then, "train", lambda: os.unlink(SHARD))
    yield Case("stores", "train: a shard is not made yet", made, right=_same_as_shard)
    yield Case(
        "stores", "train: a shard more", partial(_then, "train", _one_more), ("shard-00002",), right, either=True
    )
    yield Case("stores", "train: half a shard of a killed writer", partial(_then, "train", _torn), right=fine)
    yield Case(
        "stores", "train: a file of the user", partial(_then, "train", lambda: (STORE / "notes").touch()), right=right
    )
    yield Case("stores", "train: the lock is a link to a file", _lock(_link_lock), (".lock",), _precious, either=True)
    yield Case(
        "stores",
        "train: the lock is a link to nowhere",
        _lock(lambda: (STORE / ".lock").symlink_to("/nowhere/x")),
        (".lock",),
    )
    yield Case("stores", "train: the lock is a folder", _lock(lambda: (STORE / ".lock").mkdir()), (".lock",))
    yield Case(
        "stores", "train: the lock is a pipe", _lock(lambda: os.mkfifo(STORE / ".lock")), (".lock",), right, either=True
    )
    yield Case("stores", "train: the lock of a killed process", _lock(lambda: (STORE / ".lock").touch()), right=right)
    yield Case("stores", "train: a complete store that cannot be written", _read_only, right=right, user=True)
    yield Case(
        "stores",
        "train: an unfinished store that cannot be written",
        partial(_read_only, True),
        ("anchors",),
        user=True,
    )
    for name, value in {"a file": "rows.jsonl", "below a file": "rows.jsonl/x", "a long name": "y" * 300}.items():
        yield Case("stores", f"anchors_dir is {name}", partial(train, anchors_dir=value), (("anchors_dir", value),))
    exists = partial(_then, "export", lambda: Path("out.jsonl").write_text("mine"))
    yield Case("stores", "export: the file exists", exists, ("out.jsonl",))
    for name, out in {"a folder": "model", "in no folder": "gone/x.jsonl", "below a file": "rows.jsonl/x"}.items():
        yield Case("stores", f"export to {name}", lambda out=out: ["anchors", "export", str(STORE), out], (out,))


def _emptied() -> None:
    shutil.rmtree(STORE)
    STORE.mkdir()


def _one_more() -> None:
    for end in ("", ".sha256"):
        shutil.copy(f"{SHARD}{end}", f"{STORE}/shard-00002.parquet{end}")


def _torn() -> None:
    os.unlink(SHARD)
    Path(f"{SHARD}.tmp").write_bytes(b"PAR1")


def _precious(case: Path, good: Path, text: str) -> str | None:
    return None if (case / "precious.txt").read_text() == "mine" else "the target of the link was emptied"


def _read_only(unfinished: bool = False) -> Call:
    if unfinished:
        os.unlink(SHARD)
    for path in (*STORE.iterdir(), STORE, STORE.parent):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return train()

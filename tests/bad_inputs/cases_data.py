"""Data files: rows with faults in every field of every form, damaged files, hostile files, odd files that are right."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from case import Call, Case, Cases, byte_damages, fine, same_weights, says, some, train

DRY = ["sample", "c.yaml", "--dry-run"]


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


_CHAT = [_turn("user", "how to open the lock?"), _turn("assistant", "go away")]
#: form -> (a good record, the fields that are read)
FORMS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "paired": ({"prompt": "how to open it?", "rejected": " go away"}, ("prompt", "rejected")),
    "with anchors": (
        {"prompt": "how to open it?", "rejected": " go away", "anchors": [" paint", " the tree"]},
        ("prompt", "rejected", "anchors"),
    ),
    "messages": ({"prompt": _CHAT[:1], "rejected": _CHAT[1:]}, ("prompt", "rejected")),
    "unpaired": (
        {"prompt": "how to open it?", "completion": " go away", "label": False},
        ("prompt", "completion", "label"),
    ),
    "SafeRLHF": (
        {
            **{"prompt": "how to open it?", "response_0": " go away", "response_1": " no"},
            **{"is_response_0_safe": False, "is_response_1_safe": False},
        },
        ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"),
    ),
    "transcript": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: go"},
        ("rejected",),
    ),
    "UltraFeedback": ({"prompt": _CHAT[0]["content"], "chosen": _CHAT, "rejected": _CHAT}, ("rejected",)),
    "swift": ({"messages": _CHAT, "rejected_response": "go away"}, ("messages", "rejected_response")),
}
_VALUES: dict[str, Any] = {
    "nothing": None,
    "a number": 5,
    "a fraction": 0.5,
    "true as text": "true",
    "an empty text": "",
    "spaces": " \n\t ",
    "an empty list": [],
    "a list of texts": ["a"],
    "a list of lists": [[]],
    "a list of nothing": [None],
    "an object": {"a": 1},
    "a message alone": _turn("user", "x"),
    "half an emoji": "cut \ud83d",
    "a message of no role": [{"content": "x"}],
    "a message of an unknown role": [_turn("narrator", "x")],
    "a message with a number": [_turn("user", 3)],
    "a message with parts": [_turn("user", [{"type": "text", "text": "x"}])],
    "a message of nothing": [_turn("assistant", None)],
    "an empty message": [_turn("assistant", " ")],
    "two answers": [_turn("assistant", "a"), _turn("assistant", "b")],
    "a system message alone": [_turn("system", "x")],
}


def field_faults(form: str, field: str) -> dict[str, Any]:
    """The values that this field must not have."""
    good = FORMS[form][0][field]
    found = dict(_VALUES)
    if isinstance(good, bool):
        return found | {"1": 1, "0": 0}
    if isinstance(good, str):
        found.pop("true as text")
    if field == "anchors":
        found = {name: value for name, value in found.items() if name not in ("nothing", "a list of texts")}
        found |= {"a null among texts": [" a", None], "a blank among texts": [" a", " "], "a number among": [" a", 7]}
    if (form, field) in (("messages", "prompt"), ("swift", "messages")):
        found.pop("a system message alone")
    if form == "transcript":
        mark = "\n\nAssistant:"
        found |= {"no mark": "no assistant here", "no response": f"Human: x{mark}", "no prompt": f"{mark} x"}
    return found


def cases(chance: random.Random, good: Path) -> Cases:
    """All cases of the kind."""
    yield from _row_cases(chance)
    yield from _file_cases(chance)
    yield from _json_cases()
    yield from _parquet_cases(chance)
    yield from _place_cases()
    yield from _right_cases()


# --- Faults in a row ---------------------------------------------------------------------------------------------


def _row_cases(chance: random.Random) -> Cases:
    for form, (_, fields) in FORMS.items():
        for field in fields:
            faults = some(chance, field_faults(form, field).items(), 4)
            for name, value in [*faults, ("missing", ...)]:
                if value is ... and field in ("anchors", "is_response_1_safe"):
                    continue
                count = chance.choice([2, 5, 300])
                row = chance.choice([2, count, chance.randint(2, count)])  # the form is known by then
                if form == "UltraFeedback" or (value is ... and len(fields) == 1):
                    row = count
                extension = "jsonl" if chance.random() < 0.7 else "json"
                prepare = partial(_rows, form, field, value, count, row, extension)
                yield Case(
                    "data", f"{form}, {field}: {name}, row {row} of {count} in .{extension}", prepare, _at(row, field)
                )


def _at(row: int, field: str) -> tuple[str | tuple[str, ...], ...]:
    return (("bad.jsonl", "bad.json"), f"row {row}", field)


def _rows(form: str, field: str, value: Any, count: int, row: int, extension: str) -> Call:
    records = []
    for i in range(count):
        record = json.loads(json.dumps(FORMS[form][0]))
        for name in record:  # no duplicates
            if isinstance(record[name], str) and name in ("rejected", "completion", "rejected_response"):
                record[name] += f" {i}"
        records.append(record)
    if value is ...:
        del records[row - 1][field]
    else:
        records[row - 1][field] = value
    return use(f"bad.{extension}", records)


def use(name: str, records: list[Any], **settings: Any) -> Call:
    """A training on these records."""
    if name.endswith(".json"):
        Path(name).write_text(json.dumps(records))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), name)
    else:
        Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return train(dataset_name=name, anchors_dir="new", **settings)


def _written(name: str, data: bytes, **settings: Any) -> Call:
    Path(name).write_bytes(data)
    return train(dataset_name=name, anchors_dir="new", **settings)


# --- Damaged files -----------------------------------------------------------------------------------------------


def _damaged(source: str, damage: Callable[[Path], None]) -> Call:
    records = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    call = use(source, records)
    damage(Path(source))
    if source.endswith(".jsonl") and Path(source).is_file() and Path(source).read_bytes().endswith((b"}", b"}\n")):
        os.truncate(source, len(Path(source).read_bytes().rstrip()) - 1)  # the cut was between two rows
    return call


def _file_cases(chance: random.Random) -> Cases:
    for extension in ("jsonl", "json", "parquet"):
        for name, damage in byte_damages(chance, flips=0).items():
            if extension == "jsonl" and name == "without its last byte":
                continue  # the last newline
            yield Case(
                "data", f".{extension}: {name}", partial(_damaged, f"bad.{extension}", damage), (f"bad.{extension}",)
            )


_ROW = b'{"prompt": "how to open it?", "rejected": " go away"}\n'


def _json_cases() -> Cases:
    deep = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b', "rejected": "x"}\n'
    lines: dict[str, tuple[bytes, tuple[str, ...]]] = {
        "a list as a row": (b'["a", "b"]\n', ("row 2",)),
        "a text as a row": (b'"abc"\n', ("row 2",)),
        "null as a row": (b"null\n", ("row 2",)),
        "a number as a row": (b"5\n", ("row 2",)),
        "two objects in a line": (b"{} {}\n", ("row 2",)),
        "single quotes": (b"{'prompt': 'a'}\n", ("row 2",)),
        "a comma at the end": (b'{"prompt": "a",}\n', ("row 2",)),
        "an open object": (b'{"prompt": "a"\n', ("row 2",)),
        "a null byte": (b'{"prompt": "a\x00", "rejected": "b"}\n', ("row 2",)),
        "latin-1": ('{"prompt": "é", "rejected": "b"}\n'.encode("latin-1"), ("row 2",)),
        "half a UTF-8 character": (b'{"prompt": "\xe2\x82", "rejected": "b"}\n', ("row 2",)),
        "NaN": (b'{"prompt": NaN, "rejected": "b"}\n', ("row 2", "prompt")),
        "Infinity": (b'{"prompt": -Infinity, "rejected": "b"}\n', ("row 2", "prompt")),
        "lists 100000 deep": (deep, ("row 2",)),
        "an open list 100000 deep": (b'{"prompt": ' + b"[" * 100_000 + b"\n", ("row 2",)),
        "objects 100000 deep": (b'{"prompt": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}\n", ("row 2",)),
        "messages 900 deep": (b'{"prompt": "a", "rejected": ' + b"[" * 900 + b"]" * 900 + b"}\n", ("row 2",)),
        "a number of 6000 digits": (b'{"prompt": ' + b"7" * 6000 + b', "rejected": "b"}\n', ("row 2",)),
        "an escape sequence in a field's name": (b'{"prompt": "a", "re\\u001b[2Jjected": "b"}\n', ("row 2",)),
        "no object at all": (b"\x00\x01\x02\n", ("row 2",)),
        "an empty object": (b"{}\n", ("row 2",)),
    }
    for name, (line, words) in lines.items():
        yield Case("data", f"line 2: {name}", partial(_written, "bad.jsonl", _ROW + line), ("bad.jsonl", *words))
        if "deep" in name or "digits" in name:
            whole = b"[" + _ROW.strip() + b"," + line.strip() + b"]"
            yield Case("data", f"in a list: {name}", partial(_written, "bad.json", whole), ("bad.json",))
    whole_files: dict[str, bytes] = {
        "an empty list": b"[]",
        "null": b"null",
        "an object of lists": b'{"prompt": ["a"], "rejected": ["b"]}',
        "a list of texts": b'["a", "b"]',
        "a list without an end": b"[" + _ROW.strip() + b",",
        "only spaces": b"  \n \n",
        "only a byte-order mark": b"\xef\xbb\xbf",
        "gzip": gzip.compress(_ROW * 3),
        "UTF-16": _ROW.decode().encode("utf-16"),
        "an unknown form": b'{"question": "a", "answer": "b"}\n',
        "a CSV": b"prompt,rejected\na,b\n",
        "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    }
    for name, data in whole_files.items():
        for file in ("bad.json",) if name.startswith(("a list", "an empty list")) else ("bad.jsonl",):
            yield Case("data", f"{file}: {name}", partial(_written, file, data), (file,))
    for name in ("bad.csv", "bad.txt", "bad.jsonl.gz", "bad", "bad.JSONX", "bad.arrow"):
        word = "unknown file type" if "." in name else "bad"
        yield Case("data", f"a file named {name}", partial(_written, f"./{name}", _ROW), (name, word))


# --- Parquet -----------------------------------------------------------------------------------------------------


def _table(damage: Callable[[dict[str, Any]], Any]) -> Callable[[], Call]:
    def prepare() -> Call:
        columns: dict[str, Any] = {"prompt": [f"how to {i}?" for i in range(5)], "rejected": [" go"] * 5}
        columns = damage(columns) or columns
        pq.write_table(pa.table(columns), "bad.parquet")
        return train(dataset_name="bad.parquet", anchors_dir="new")

    return prepare


def _put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda columns: columns.__setitem__(name, value)


def _parquet_cases(chance: random.Random) -> Cases:
    binary = pa.array([b"\xff\xfe"] * 5)
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    columns: dict[str, tuple[Any, tuple[str, ...]]] = {
        "numbers as prompts": (_put("prompt", list(range(5))), ("row 1", "prompt")),
        "bytes as prompts": (_put("prompt", binary), ("row 1", "prompt")),
        "a null among prompts": (_put("prompt", ["a", "b", None, "c", "d"]), ("row 3", "prompt")),
        "times as responses": (_put("rejected", pa.array([0] * 5, pa.timestamp("ns"))), ("row 1", "rejected")),
        "times out of range": (_put("rejected", pa.array([2**62] * 5, pa.timestamp("us"))), ("rejected",)),
        "lists as responses": (_put("rejected", [["a"]] * 5), ("row 1",)),
        "no rows": (lambda c: {name: pa.array([], pa.string()) for name in c}, ("no rows",)),
        "no columns": (lambda c: {"x": pa.nulls(5)}, ("row 1",)),
        "one column": (lambda c: {"prompt": c["prompt"]}, ("row 1",)),
        "only nulls": (_put("rejected", pa.nulls(5)), ("row 1", "rejected")),
        "texts that are not UTF-8": (lambda c: {"prompt": broken, "rejected": ["b"]}, ("row 1",)),
        "structures as prompts": (_put("prompt", [{"role": "user", "content": "x"}] * 5), ("row 1", "prompt")),
    }
    for name, (damage, words) in columns.items():
        yield Case("data", f".parquet with {name}", _table(damage), ("bad.parquet", *words))
    yield Case("data", ".parquet of 30 kB that holds 6 GB", _bomb, ("bad.parquet",))
    for _ in range(8):
        place, bit = chance.random(), chance.randrange(8)
        damage = partial(_flip_parquet, place, bit)
        yield Case("data", f".parquet: bit {bit} flipped at {place:.1%}", damage, ("bad.parquet",), fine, either=True)
    for extension in ("jsonl", "json"):
        yield Case(
            "data", f"a Parquet file named .{extension}", partial(_named_otherwise, extension), (f"bad.{extension}",)
        )


def _flip_parquet(place: float, bit: int) -> Call:
    records = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    call = use("bad.parquet", records)
    data = bytearray(Path("bad.parquet").read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    Path("bad.parquet").write_bytes(data)
    return call


def _bomb() -> Call:
    """Rows of one long text, compressed to almost nothing."""
    text = "a" * (1 << 20)
    group = pa.table({"prompt": [text] * 150, "rejected": ["b"] * 150})
    with pq.ParquetWriter("bad.parquet", group.schema, compression="zstd") as writer:
        for _ in range(40):
            writer.write_table(group)
    return train(dataset_name="bad.parquet", anchors_dir="new")


def _named_otherwise(extension: str) -> Call:
    records = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(records), f"bad.{extension}")
    return train(dataset_name=f"bad.{extension}", anchors_dir="new")


# --- Places ------------------------------------------------------------------------------------------------------


def _place_cases() -> Cases:
    places: dict[str, tuple[Any, tuple[str, ...]]] = {
        "not there": (lambda: "gone.jsonl", ("gone.jsonl",)),
        "a pattern without files": (lambda: "gone-*.jsonl", ("gone-*.jsonl",)),
        "the same file twice": (lambda: ["rows.jsonl", "rows.jsonl"], ("rows.jsonl",)),
        "one of two not there": (lambda: ["rows.jsonl", "gone.jsonl"], ("gone.jsonl",)),
        "a folder": (lambda: "./model", ("model",)),
        "a folder named like a file": (lambda: str(Path("x.jsonl").mkdir() or "x.jsonl"), ("x.jsonl",)),
        "an empty folder": (lambda: str(Path("none").mkdir() or "./none"), ("none",)),
        "a pipe": (lambda: os.mkfifo("pipe.jsonl") or "pipe.jsonl", ("pipe.jsonl",)),
        "a link to a device that never ends": (lambda: _link("zero.jsonl", "/dev/zero"), ("zero.jsonl",)),
        "a link to itself": (lambda: _link("loop.jsonl", "loop.jsonl"), ("loop.jsonl",)),
        "a path below a file": (lambda: "rows.jsonl/x.jsonl", ("rows.jsonl/x.jsonl",)),
        "a name of 5000 letters": (lambda: "x" * 5000 + ".jsonl", ("dataset_name",)),
        "a name with a null": (lambda: "a\0b.jsonl", ("dataset_name",)),
        "a web address": (lambda: "https://127.0.0.1:9/x.jsonl", ("https://127.0.0.1:9/x.jsonl",)),
        "an unknown home": (lambda: "~nobodyknows/x.jsonl", ("~nobodyknows/x.jsonl",)),
    }
    for name, (make, words) in places.items():
        yield Case(
            "data", f"dataset_name: {name}", lambda make=make: train(dataset_name=make(), anchors_dir="new"), words
        )
        if name in ("not there", "a folder", "a pipe"):
            prepare = lambda make=make: train(eval_dataset_name=make(), anchors_dir="new")  # noqa: E731
            yield Case("data", f"eval_dataset_name: {name}", prepare, words)
    yield Case("data", "a file that may not be read", _forbidden, ("rows.jsonl",), user=True)
    again = partial(train, eval_dataset_name="rows.jsonl", anchors_dir="new")
    yield Case("data", "the same rows held out", again, right=says("eval_dataset_name"))
    yield Case("data", "an unknown split", _split, ("nope",))


def _split() -> Call:
    Path("data").mkdir()
    Path("data/train.jsonl").write_bytes(_ROW)
    return train(dataset_name="./data", dataset_split="nope", anchors_dir="new")


def _link(name: str, target: str) -> str:
    Path(name).symlink_to(target)
    return name


def _forbidden() -> Call:
    Path("rows.jsonl").chmod(0)
    return train(anchors_dir="new")


# --- Odd data that are right -------------------------------------------------------------------------------------


def _no_escapes(case: Path, good: Path, text: str) -> str | None:
    return "an escape sequence was printed" if "\x1b[31m" in text or "\x1b]0;" in text else None


def _card_is_text(case: Path, good: Path, text: str) -> str | None:
    card = (case / "out" / "README.md").read_text()
    return "the model card holds raw HTML" if "<img" in card.replace("`<img", "") and "&lt;img" not in card else None


def _renamed(name: str, command: list[str] | None = None) -> Call:
    os.rename("rows.jsonl", name)
    call = train(dataset_name=name, anchors_dir="new")
    return command or call


def _right_cases() -> Cases:
    same = same_weights("out", "out")

    def rewritten(change: Callable[[bytes], bytes], name: str = "rows.jsonl") -> Callable[[], Call]:
        def prepare() -> Call:
            data = change(Path("rows.jsonl").read_bytes())
            Path("rows.jsonl").unlink()
            Path(name).write_bytes(data)
            return train(dataset_name=name)

        return prepare

    def as_list(data: bytes) -> bytes:
        return b"[" + b",\n".join(data.splitlines()) + b"]\n"

    rewrites: dict[str, Callable[[], Call]] = {
        "lines that end in CR LF": rewritten(lambda data: data.replace(b"\n", b"\r\n")),
        "a byte-order mark": rewritten(lambda data: b"\xef\xbb\xbf" + data),
        "empty lines": rewritten(lambda data: b"\n \n" + data.replace(b"\n", b"\n\n")),
        "no last newline": rewritten(lambda data: data.rstrip()),
        "a list": rewritten(as_list, "rows.json"),
        "another extension's case": rewritten(lambda data: data, "rows.JSONL"),
        "more columns": rewritten(lambda data: data.replace(b'{"prompt"', b'{"id": [1, {"a": null}], "prompt"')),
        "rows that repeat others": rewritten(lambda data: data + data),
        "another name": rewritten(lambda data: data, "dätä file.jsonl"),
        "a pattern": lambda: train(dataset_name="row?.jsonl"),
        "a list of one": lambda: train(dataset_name=["rows.jsonl"]),
        "two names of one file": lambda: train(dataset_name=["rows.jsonl", "./rows.jsonl"]),
    }
    for name, prepare in rewrites.items():
        yield Case("data", f"the same data: {name}", prepare, right=same)
    yield Case(
        "data", "a file name with HTML", partial(_renamed, "<img src=x onerror=alert(1)>.jsonl"), (), _card_is_text
    )
    hostile: dict[str, Callable[[], Call]] = {
        "--dry-run of": lambda: use("bad.jsonl", HOSTILE) and DRY,
        "training on": partial(use, "bad.jsonl", HOSTILE),
        "inspect of": _inspect_hostile,
    }
    for name, prepare in hostile.items():
        yield Case("data", f"{name} texts with escape sequences", prepare, right=_no_escapes)
    red = partial(_renamed, "a\x1b[31mb.jsonl", DRY)
    yield Case("data", "a file name with an escape sequence", red, ("31mb",), _no_escapes, either=True)
    yield Case("data", "a file name with a new line", partial(_renamed, "a\nb.jsonl"), ("b.jsonl",), fine, either=True)
    yield Case("data", "one row", partial(use, "bad.jsonl", [{"prompt": "how?", "rejected": " a"}]), right=fine)
    unpaired = [{"prompt": "how?", "completion": " a", "label": True}] * 3
    yield Case("data", "no negative at all", partial(use, "bad.jsonl", unpaired), ("bad.jsonl", "negative"))
    for name, records in ODD.items():
        yield Case("data", name, partial(use, "bad.jsonl", records), ("bad.jsonl", "row 1"), fine, either=True)
        dry = partial(_dry, records)
        yield Case("data", f"--dry-run of {name}", dry, ("bad.jsonl", "row 1"), fine, either=True)


HOSTILE = [{"prompt": f"how \x1b[31mto \x1b]0;t\x07 {i}?", "rejected": " go \x1b[31maway"} for i in range(4)]
#: texts that are odd: they may be refused by name, or trained on
ODD: dict[str, list[dict[str, Any]]] = {
    "a prompt longer than max_length": [
        {"prompt": "how to? " * 50, "rejected": " go"},
        {"prompt": "how?", "rejected": " a"},
    ],
    "a million letters": [{"prompt": "a" * 10**6, "rejected": "b"}],
    "special tokens in texts": [
        {"prompt": "a</s>b<pad>", "rejected": "</s>"},
        {"prompt": "<|im_start|>", "rejected": "x"},
    ],
    "letters that cannot be seen": [{"prompt": "\u202e\ufeff\u0000x", "rejected": "\u200b\u200b"}],
    "letters that no token has": [{"prompt": "𝔘𝔫𝔦", "rejected": "🙂🙂"}, {"prompt": "é", "rejected": "ß"}],
    "anchors that equal the negative": [{"prompt": "how?", "rejected": " a", "anchors": [" a", " a"]}],
    "1000 anchors": [{"prompt": "how?", "rejected": " a", "anchors": [f" {i}" for i in range(1000)]}],
}


def _dry(records: list[Any]) -> Call:
    use("bad.jsonl", records)
    return DRY


def _inspect_hostile() -> Call:
    from d2o_fast.cli import main

    use("bad.jsonl", HOSTILE)
    main(["sample", "c.yaml"])
    for number in (1, 2):
        os.truncate(number, 0)
    return ["anchors", "inspect", "new/train"]

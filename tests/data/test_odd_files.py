"""Files that are damaged, odd or hostile: one clear error with file and row, in bounded time, memory and disk."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2o_fast.config import D2OConfig
from d2o_fast.data.dry_run import describe
from d2o_fast.data.reading import read_datasets, read_rows, rows_from
from d2o_fast.errors import D2OError, DataError, printable, refusal
from helpers import DEADLINE
from tiny import tiny_tokenizer

GOOD = {"prompt": "a", "rejected": "b"}
LINE = json.dumps(GOOD).encode() + b"\n"
USER = {"role": "user", "content": "q"}
ANSWER = [{"role": "assistant", "content": "bad"}]


def written(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def refused(name: Any, message: str, **how: Any) -> DataError:
    with pytest.raises(DataError, match=message) as caught:
        read_rows(str(name), **how)
    assert str(caught.value).startswith(printable(str(name), one_line=True))
    return caught.value


# --- JSON ---


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"x": ' + b"[" * 100_000, "nested too deep"),
        (b'{"x": ' + b'{"x": ' * 100_000, "nested too deep"),
        (b'{"x": ' + b"1" * 6000 + b"}", r"Exceeds the limit \(4300 digits\)"),
        (b'{"prompt": "a", "rejected": -Infinity}', "field 'rejected': found a number -inf"),
        (b'{"prompt": NaN, "rejected": "b"}', "field 'prompt': found a number nan"),
        (b'{"prompt": "a", "rejected": "\\udc00"}', "field 'rejected': half a character"),
        (b'{"prompt": "a", "rejected": "b", "rejected": "c"}', "the key 'rejected' twice"),
        (b'{"prompt": "a", "x": {"y": 1, "y": 2}}', "the key 'y' twice"),
        (b'{"prompt": "a", "rejected": "b\xff"}', "not UTF-8"),
        (b"\0" * 64, "a NUL byte at position"),
        (b'{"prompt": "a"\0}', "a NUL byte at position"),
        (b'{"prompt": "a", "rejec', "not valid JSON .Unterminated string"),
        (b'{"prompt": "a"}\r{"prompt": "b"}', "End lines with a newline, not with a carriage return alone"),
        (b"null", r"found nothing \(null\)"),
        (b"1e999", "found a number inf"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, second: bytes, message: str) -> None:
    assert refused(written(tmp_path / "a.jsonl", LINE + b"\r\n" + second), message).row == 3
    if b"\r" not in second:
        assert refused(written(tmp_path / "a.json", b"[" + LINE + b", " + second + b"]"), message).row in (2, None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" + LINE + b",]", "row 2: not valid JSON"),
        (b"[" + LINE + b" 1]", "row 1: not valid JSON .Expecting ',' delimiter, line 2"),
        (b"[" + LINE + b"] x", "row 1: not valid JSON .Extra data"),
        (b"[" + LINE, "row 1: not valid JSON"),
        (b"[", "row 1: not valid JSON"),
        (b" [ ] ", "no rows"),
        (b"", "no rows"),
        (json.dumps(GOOD).encode("utf-16"), "UTF-16 text. Save the file as UTF-8"),
        (json.dumps(GOOD).encode("utf-16-be"), "NUL byte .*UTF-16"),
        (b"\x1f\x8b\x08\0", "a compressed file. Unpack it"),
        (b"\x28\xb5\x2f\xfd", "a compressed file. Unpack it"),
    ],
)
def test_a_bad_json_file_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    refused(written(tmp_path / "a.json", data), message)


def test_a_json_list_is_read_item_by_item(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf [\r\n" + LINE + b",\t" + LINE.replace(b"b", "c\u2028".encode()) + b"]\n"
    assert [row.rejected for row in read_rows(written(tmp_path / "a.json", data))] == ["b", "c\u2028"]


def test_a_line_without_an_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse.jsonl"
    path.write_bytes(LINE)
    os.truncate(path, 1 << 40)  # a terabyte of NUL bytes that takes no room on the disk
    assert refused(path, "a line of more than 64 MiB").row == 2


def test_many_columns_are_not_all_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", json.dumps({f"c{i}": i for i in range(50_000)}).encode())
    assert len(str(refused(path, "the columns are c0, c1"))) < 1000


# --- What is no file ---


def test_what_is_no_file_is_said_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    file = written(tmp_path / "a.jsonl", LINE)
    for name, message in (
        (tmp_path / "pipe.jsonl", "neither a file nor a folder"),
        ("/dev/zero", "neither a file nor a folder"),
        (tmp_path / "loop.jsonl", "symbolic links"),
        (tmp_path / "gone.jsonl", "no such file"),
        (f"{file}/b.jsonl", "Not a directory"),
        (f"/{'x' * 300}.jsonl", "name too long"),
        ("a\0b.jsonl", "NUL in its name"),
        ("a\0*", "NUL in its name"),
        (written(tmp_path / "a.py", b""), "unknown file type '.py'"),
    ):
        refused(name, message)
    refused(written(tmp_path / "x\n\x1b[31my.jsonl", b"{"), r"x\\n\\x1b\[31my.jsonl, row 1")
    with pytest.raises(DataError, match="the name ''"):
        read_rows([file, ""])


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    Path(path).write_bytes(LINE)
    assert read_rows(path)[0].source.endswith("/\\udcff.jsonl"), "the source must be fit for a file of anchors"


# --- Folders and configurations ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def folder(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text)
    return path


def test_a_folder_that_cannot_be_loaded_says_why(cache: Path) -> None:
    good, other = json.dumps(GOOD), json.dumps({"messages": [], "x": 1})
    refused(folder(cache / "none"), "doesn't contain any data files")
    refused(folder(cache / "mixed", a_jsonl=good, b_jsonl=other), "CastError: .*column names don't match")
    refused(folder(cache / "csv", a_csv="prompt,rejected\na\nb,c,d\n"), "Expected 2 fields in line 3, saw 3")
    refused(folder(cache / "script", script_py="raise SystemExit"), "a script makes, script.py. Scripts are never run")
    os.mkfifo(folder(cache / "pipe") / "a.jsonl")
    refused(cache / "pipe", "doesn't contain any data files")


def test_a_configuration_is_chosen(cache: Path) -> None:
    configs = (
        "---\nconfigs:\n- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: b.jsonl\n---\n"
    )
    path = folder(
        cache / "set", a_jsonl=json.dumps(GOOD), b_jsonl=json.dumps({**GOOD, "rejected": "c"}), README_md=configs
    )
    refused(path, r"Config name is missing.*\['one', 'two'\].*Set dataset_config to one")
    refused(path, r"'three' not found. Available: \['one', 'two'\].*Set dataset_config", configuration="three")
    config = D2OConfig(dataset_name=str(path), dataset_config="two", eval_dataset_name=str(path))
    assert [row.rejected for rows in read_datasets(config) for row in rows or []] == ["c", "c"]


def test_a_file_beside_the_name_of_a_split_is_read_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "a.jsonl", json.dumps(GOOD).encode())
    for more in ({"split": "test"}, {"configuration": "two"}):
        caplog.clear()
        assert len(read_rows(str(path), **more)) == 1
        assert "is a file and read whole: dataset_split and dataset_config are for the hub" in caplog.text
    with pytest.raises(D2OError, match=r"dataset_split is 'train\[:9\]'; it must be without a range: .* is a file"):
        read_rows(str(path), "train[:9]")


# --- The same rows in all forms ---

CALLS = [
    {"function": {"name": "w", "arguments": {"city": "Rome", "days": [1, 2], "where": {"lat": 1.5}}}, "id": "1"},
    {"function": {"name": "w", "arguments": {"stock": "X", "where": {"long": 2.5}, "days": []}}},
    {"function": {"name": "w", "arguments": {}}},
]


def test_all_forms_give_the_same_prompts(cache: Path) -> None:
    records = [
        {
            "prompt": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "2"},
            ],
            "rejected": ANSWER,
            "anchors": [[{"role": "assistant", "content": "good", "name": "x"}], ANSWER],
        }
        for call in CALLS
    ]
    wanted = [(record["prompt"], record["rejected"], record["anchors"]) for record in records]
    table = pa.Table.from_pylist(records)
    assert "None" in str(table.to_pylist()), "the nulls that this test is about"
    (cache / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (cache / "nulls.jsonl").write_text("\n".join(map(json.dumps, table.to_pylist())))
    (cache / "a.json").write_text(json.dumps(records))
    pq.write_table(table, cache / "a.parquet")
    folder(cache / "set", a_jsonl=(cache / "a.jsonl").read_text())
    saved = datasets.Dataset.from_list(records)
    saved.save_to_disk(cache / "disk")
    datasets.DatasetDict({"train": saved}).save_to_disk(cache / "splits")
    names = ("a.jsonl", "nulls.jsonl", "a.json", "a.parquet", "set", "disk", "splits")
    forms = {name: read_rows(str(cache / name)) for name in names}
    forms |= {"list": rows_from(records), "data set": rows_from(saved), "numpy": rows_from(saved.with_format("numpy"))}
    for name, rows in forms.items():
        assert [(row.prompt, row.rejected, row.anchors) for row in rows] == wanted, name


NO_JSON: dict[str, Any] = {
    "a key that is no text": {1: 2},
    "a set": {"s"},
    "bytes": b"x",
    "no number": float("nan"),
    "infinity": float("-inf"),
    "a long integer": 10**5000,
    "an object": object(),
    "half a character": "\ud800",
    "half a character in a key": {"\ud800": 1},
}


@pytest.mark.parametrize("name", NO_JSON)
def test_what_is_no_json_in_a_message_is_named(name: str) -> None:
    record = {"prompt": [{**USER, "tags": [{"a": NO_JSON[name]}]}], "rejected": ANSWER}
    with pytest.raises(DataError, match=r"train_dataset, row 1, field 'prompt\[0\].tags.a'"):
        rows_from([record])


def test_what_is_nested_too_deep_is_named() -> None:
    value: Any = "x"
    for _ in range(150):
        value = [value]
    with pytest.raises(DataError, match=r"row 1, field 'prompt\[0\].tags': nested more than 100 levels deep"):
        rows_from([{"prompt": [{**USER, "tags": value}], "rejected": ANSWER}])
    for _ in range(100_000):
        value = [value]
    with pytest.raises(DataError, match="row 1, field 'prompt"):
        rows_from([{"prompt": value, "rejected": "b"}])
    while isinstance(value, list):  # else its end overflows the stack of C
        value = value[0]


def test_keys_that_are_no_text_do_no_harm() -> None:
    assert len(rows_from([{1: 2, **GOOD}])) == 1


def test_columns_that_look_like_content_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="d2o_fast"):
        rows_from([{**GOOD, "system": "be kind", "tools": [], "score": 1}], "here")
    assert [record.message for record in caplog.records] == [
        "here: the model never sees these columns, they are not used: system, tools"
    ]


# --- Parquet ---


def parquet(path: Path, table: pa.Table, **how: Any) -> str:
    pq.write_table(table, path, **how)
    return str(path)


def test_odd_types_are_read_or_named(tmp_path: Path) -> None:
    texts = pa.array(["a", "b", "c"])
    path = tmp_path / "a.parquet"
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        rows = read_rows(parquet(path, pa.table({"prompt": texts.cast(kind), "rejected": texts})))
        assert [row.prompt for row in rows] == ["a", "b", "c"]
    for kind, message in ((pa.binary(), "bytes b'a' where a text"), (pa.null(), "nothing")):
        prompt = pa.nulls(3) if kind == pa.null() else texts.cast(kind)
        refused(
            parquet(path, pa.table({"prompt": prompt, "rejected": texts})), f"row 1, field 'prompt': found {message}"
        )
    when = pa.array([2**62] * 3, pa.timestamp("ns"))  # not a Python date, in a column that is not read
    assert len(read_rows(parquet(path, pa.table({"prompt": texts, "rejected": texts, "when": when})))) == 3
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"a\xff")]
    )
    refused(
        parquet(path, pa.table({"prompt": texts[:2], "rejected": broken})),
        "row 2, field 'rejected': a value that Python cannot hold .'utf-8' codec",
    )
    twice = pa.Table.from_arrays([texts, texts, texts], names=["prompt", "rejected", "prompt"])
    refused(parquet(path, twice), "field 'prompt': two columns of this name")
    refused(parquet(path, pa.table({"x": texts})), "row 1: the columns are x")
    pairs = pa.array(
        [[{**USER, "args": [("k", 1)]}]],
        pa.list_(
            pa.struct([("role", pa.string()), ("content", pa.string()), ("args", pa.map_(pa.string(), pa.int64()))])
        ),
    )
    (row,) = read_rows(parquet(path, pa.table({"prompt": pairs, "rejected": pa.array([ANSWER])})))
    assert row.prompt == [{**USER, "args": {"k": 1}}]


def test_damage_anywhere_is_one_error(tmp_path: Path) -> None:
    """Flipped and missing bytes: every outcome is rows or a DataError."""
    rows = [{"prompt": [{**USER, "content": f"q{i}"}], "rejected": ANSWER} for i in range(50)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20)
    whole, refusals = path.read_bytes(), 0
    assert [row.prompt for row in read_rows(str(path))] == [row["prompt"] for row in rows]
    for at in range(0, len(whole), len(whole) // 150):
        for data in (whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :], whole[:at]):
            path.write_bytes(data)
            try:
                read_rows(str(path))
            except DataError as error:
                refusals += str(path) in str(error)
    assert refusals > 150


BOMBS: dict[str, tuple[Callable[[], pa.Array], dict[str, Any], str]] = {
    "rows that repeat a text": (
        lambda: pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), 600), ["a" * 1_000_000]),
        {"compression": "zstd"},
        "the rows so far are 1000 times as large",
    ),
    "a text in a page": (
        lambda: pa.array(["a" * 300_000_000]),
        {"compression": "zstd", "use_dictionary": False},
        "bytes that expand to",
    ),
    "a long list": (
        lambda: pa.ListArray.from_arrays([0, 70_000_000], pa.repeat("a", 70_000_000)),
        {"compression": "zstd"},
        "row 1: more than 4194304 values in 1 rows",
    ),
    "one long row": (lambda: pa.array(["a" * 70_000_000]), {"compression": "zstd"}, "row 1: a row of 66 MiB"),
}
READ = """
import resource, sys
from d2o_fast.data.reading import read_rows
from d2o_fast.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 29, 1 << 29))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_rows(sys.argv[1])
except DataError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_file_does_not_expand_without_bound(tmp_path: Path, name: str) -> None:
    make, how, message = BOMBS[name]
    values = make()
    table = pa.table({"prompt": ["p"] * len(values), "rejected": values})
    path = parquet(tmp_path / "a.parquet", table, **how)
    assert os.path.getsize(path) < 100_000
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, timeout=DEADLINE)
    *error, grown = done.stdout.splitlines()
    assert len(error) == 1, done.stderr
    assert error[0].startswith(path)
    assert message in error[0]
    assert int(grown) < 600, "MiB of memory"


def test_a_well_packed_file_is_read(tmp_path: Path) -> None:
    """A long system prompt that all rows repeat packs 500 times."""
    prompt = [{"role": "system", "content": "be kind. " * 500}, USER]
    rows = [{"prompt": prompt, "rejected": [{"role": "assistant", "content": str(i)}]} for i in range(2000)]
    path = parquet(tmp_path / "a.parquet", pa.Table.from_pylist(rows), compression="zstd")
    assert os.path.getsize(path) * 200 < 2000 * 4500
    assert [row.rejected[0]["content"] for row in read_rows(path)] == [str(i) for i in range(2000)]


# --- What is printed ---


def test_control_characters_are_shown_as_escapes() -> None:
    text = "a\x1b[31m\x07\x9b\x7f\r\u202e\u2066\u200f\ufeff\U000e0041\ud800\u2028"
    assert printable(text) == text.encode("unicode_escape").decode()
    kept = "\n\té中\u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469 \xa0\\x1b"
    assert printable(kept) == printable(printable(kept)) == kept
    assert printable("a\n\tb", one_line=True) == "a\\n\\tb"
    assert str(D2OError("x\x1b]0;")) == "x\\x1b]0;"
    assert "\x1b" not in str(DataError("s\x1b", 1, "f\x1b", "\x1b", "\x1b"))
    assert str(refusal("seed", 10**5000, "small")) == "seed is an integer of 16610 bits; it must be small"


def test_a_dry_run_shows_control_characters_as_escapes() -> None:
    rows = rows_from([{"prompt": "a\x1b[2J\nb", "rejected": "c\x07\u202e"}], "x\x1b[1m")
    tokenizer = tiny_tokenizer()
    tokenizer.decode = lambda ids: (
        "a\x1b[2J\nb" if len(ids) < 9 else "a\x1b[2J\nbc\x07"
    )  # it drops what is not printable
    shown = describe("train", rows, tokenizer, D2OConfig(max_length=64, max_completion_length=32))
    assert shown.replace("\n", "").isprintable()
    assert "a\\x1b[2J\n    b" in shown
    assert "x\\x1b[1m, row 1" in shown

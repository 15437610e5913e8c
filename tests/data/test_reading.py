"""All forms of data are read; every fault is one clear error; prompt and response meet at the right token."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken
from trl.trainer.dpo_trainer import DataCollatorForPreference

from d2o_fast.config import D2OConfig
from d2o_fast.data.reading import read_rows, read_sources, rows_from, split_by_prompt, without_duplicates
from d2o_fast.data.row import Row, prompt_key
from d2o_fast.data.tokens import stop_token_ids, tokenize_rows
from d2o_fast.errors import D2OError, DataError
from tiny import CHAT_TEMPLATE, tiny_model, tiny_rows, tiny_tokenizer

CONFIG = D2OConfig(max_length=64, max_completion_length=32)
USER = [{"role": "user", "content": "how to bake the cake?"}]


def answer(text: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def write_lines(path: Any, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


# --- Forms and files ---


def test_jsonl_json_parquet_and_memory_hold_the_same_rows(tmp_path):
    records = [*tiny_rows(2), {"prompt": "é?", "rejected": "no", "anchors": ["a", "b"]}]
    lines = write_lines(tmp_path / "a.jsonl", *records)
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    write_lines(tmp_path / "lines.json", *records)
    pq.write_table(pa.Table.from_pylist(records, schema=_schema()), tmp_path / "c.parquet")
    expected = [(r["prompt"], r["rejected"], r.get("anchors"), i) for i, r in enumerate(records, start=1)]
    in_memory = [records, datasets.Dataset(pa.Table.from_pylist(records, schema=_schema()))]
    read = [read_rows(str(tmp_path / name)) for name in ("a.jsonl", "b.json", "lines.json", "c.parquet")]
    for rows in [*read, *(rows_from(r) for r in in_memory)]:
        assert [(r.prompt, r.rejected, r.anchors, r.index) for r in rows] == expected
    assert read[0][0].source == lines
    assert rows_from(read[0]) == read[0]


def _schema() -> pa.Schema:
    return pa.schema([("prompt", pa.string()), ("rejected", pa.string()), ("anchors", pa.list_(pa.string()))])


def test_a_folder_is_read_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", *tiny_rows(3))
    assert [row.prompt for row in read_rows(str(tmp_path / "set"))] == [r["prompt"] for r in tiny_rows(3)]
    with pytest.raises(DataError, match="cannot load split 'test'"):
        read_rows(str(tmp_path / "set"), split="test")


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + b'{"prompt": "a", "rejected": "b"}\r\n\r\n{"prompt": "c\xe2\x80\xa8d", "rejected": "d"}'
    )
    rows = read_rows(str(path))
    assert [(row.prompt, row.index) for row in rows] == [("a", 1), ("c\u2028d", 3)]


def test_unpaired_rows_use_the_negatives_alone(caplog):
    records = [{"prompt": str(i), "completion": f"c{i}", "label": i % 3 == 0} for i in range(6)]
    with caplog.at_level(logging.INFO, logger="d2o_fast"):
        rows = rows_from(records, "here")
    assert [(row.prompt, row.rejected, row.index) for row in rows] == [
        ("1", "c1", 2),
        ("2", "c2", 3),
        ("4", "c4", 5),
        ("5", "c5", 6),
    ]
    assert "here: 6 rows, 4 negatives" in caplog.text


def test_safe_rlhf_gives_one_negative_per_unsafe_response():
    def record(safe_0: bool, safe_1: bool) -> dict[str, Any]:
        texts = {"prompt": "p", "response_0": "zero", "response_1": "one"}
        flags = {"is_response_0_safe": safe_0, "is_response_1_safe": safe_1}
        return {**texts, **flags, "better_response_id": 0, "safer_response_id": 1}

    rows = rows_from([record(True, True), record(False, True), record(True, False), record(False, False)])
    assert [(row.rejected, row.index) for row in rows] == [("zero", 2), ("one", 3), ("zero", 4), ("one", 4)]


HH = {
    "chosen": "\n\nHuman: a\n\nAssistant: b",
    "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d e",
}
ULTRA = {"prompt": "a", "chosen": answer("good"), "rejected": [{"role": "user", "content": "a"}, *answer("b")]}
SWIFT = {"messages": [*USER, *answer("good")], "rejected_response": "go away"}


def test_a_transcript_is_split_at_its_last_answer():
    (row,) = rows_from([HH])
    assert row.prompt == "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert row.rejected == " d e"


def test_a_chat_is_split_before_its_last_message():
    system = {"role": "system", "content": "s"}
    longer = [system, *USER, *answer("hm"), *USER, *answer("no")]
    rows = rows_from([ULTRA, {"chosen": answer("x"), "rejected": longer}, {**ULTRA, "prompt": "a "}])
    assert rows[0].prompt == rows[2].prompt == [{"role": "user", "content": "a"}]
    assert rows[0].rejected == answer("b")
    assert (rows[1].prompt, rows[1].rejected) == (longer[:-1], answer("no"))
    assert rows_from([{**CHAT, "chosen": answer("x")}])[0].prompt == USER, "messages in prompt: as before"


def test_swift_replaces_the_answer():
    questions = {"messages": [*USER, *answer("hm"), *USER], "rejected_response": "no"}
    rows = rows_from([SWIFT, questions])
    assert [(row.prompt, row.rejected) for row in rows] == [
        (USER, answer("go away")),
        (questions["messages"], answer("no")),
    ]


@pytest.mark.parametrize(
    ("record", "columns", "unused"),
    [
        (HH, "HH-RLHF", ["chosen"]),
        (ULTRA, "UltraFeedback", ["chosen"]),
        (SWIFT, "ms-swift", []),
        ({"prompt": "a", "rejected": "b", "chosen": "c", "id": 3}, "prompt \\+ rejected", ["chosen", "id"]),
    ],
)
def test_the_columns_are_recognised_and_said(tmp_path, record, columns, unused, caplog):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([record]), path)
    with caplog.at_level(logging.INFO, logger="d2o_fast"):
        (source,) = read_sources(str(path))
    assert re.search(f"a.parquet: 1 rows, 1 negatives .{columns}", caplog.text)
    assert source.unused == unused


def test_several_files_are_read_in_order(tmp_path, caplog):
    rows = tiny_rows(6)
    one = write_lines(tmp_path / "b1.jsonl", *rows[:3])
    two = write_lines(tmp_path / "b2.jsonl", *rows[3:5])
    other = write_lines(tmp_path / "a.json", {**rows[0], "chosen": "x"}, {"prompt": "p", "rejected": "r"})
    pq.write_table(pa.Table.from_pylist([SWIFT]), tmp_path / "swift.parquet")
    read = read_rows([str(tmp_path / "b*.jsonl"), str(tmp_path / "swift.parquet")])
    assert [(row.source, row.index) for row in read[:5]] == [(one, 1), (one, 2), (one, 3), (two, 1), (two, 2)]
    assert read[5].rejected == answer("go away")
    with caplog.at_level(logging.INFO, logger="d2o_fast"):
        read = read_rows([one, other])
    assert [row.prompt for row in read] == [row["prompt"] for row in rows[:3]] + ["p"]
    assert f"1 of 5 negatives left out as duplicates ({other}, row 1 repeats {one}, row 1)" in caplog.text
    for names, message in (
        (str(tmp_path / "c*.jsonl"), r"c\*.jsonl: no file fits this pattern"),
        ([], "an empty list"),
        ([one, str(tmp_path / "b*.jsonl")], "b1.jsonl: named twice"),
    ):
        with pytest.raises(DataError, match=message):
            read_rows(names)
    (tmp_path / "odd[1].jsonl").write_text(json.dumps(GOOD))
    assert len(read_rows(str(tmp_path / "odd[1].jsonl"))) == 1, "a file that is there is not a pattern"


def test_what_differs_in_anything_is_no_duplicate(caplog):
    records = [GOOD, {**GOOD, "rejected": "c"}, {**GOOD, "anchors": ["x"]}, {"prompt": "ab", "rejected": "b"}, GOOD]
    rows = rows_from(records)
    assert len(rows) == 5
    with caplog.at_level(logging.INFO, logger="d2o_fast"):
        caplog.clear()
        assert without_duplicates(rows[:4]) == rows[:4]
        assert not caplog.text
        assert without_duplicates(rows) == rows[:4]
    assert "1 of 5 negatives left out as duplicates (train_dataset, row 5 repeats train_dataset, row 1)" in caplog.text
    chats = rows_from([CHAT, {**CHAT, "prompt": [{"content": USER[0]["content"], "role": "user"}]}])
    assert len(without_duplicates(chats)) == 1, "the order of keys does not matter"


def test_columns_that_are_not_used_are_named(caplog):
    with caplog.at_level(logging.INFO, logger="d2o_fast"):
        rows_from([{"prompt": "a", "rejected": "b", "chosen": "c"}], "here")
    assert "here: columns that are not used: chosen" in caplog.text


# --- Faults: file, row, field, finding, remedy ---

GOOD = {"prompt": "a", "rejected": "b"}
CHAT = {"prompt": USER, "rejected": answer("go away")}
SAFE = {
    "prompt": "p",
    "response_0": "x",
    "response_1": "y",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
}

FAULTS = {
    "another library's columns": ({"prompt": "a", "chosen": "b"}, None, "the columns are prompt, chosen. Give prompt"),
    "missing later": ({"prompt": "a"}, "rejected", "the column is missing; the columns are prompt"),
    "null prompt": ({**GOOD, "prompt": None}, "prompt", r"found nothing \(null\) where a text belongs"),
    "empty prompt": ({**GOOD, "prompt": " \n"}, "prompt", "the prompt is empty"),
    "number for a prompt": ({**GOOD, "prompt": 3}, "prompt", "found an integer 3 where a text"),
    "empty response": ({**GOOD, "rejected": ""}, "rejected", "the response is empty"),
    "blank response": ({**GOOD, "rejected": " \n "}, "rejected", "the response is empty"),
    "null response": ({**GOOD, "rejected": None}, "rejected", r"found nothing \(null\) where a string"),
    "list for a string": ({**GOOD, "rejected": ["b"]}, "rejected", r"found a list \['b'\] where a string belongs"),
    "messages after a string": ({**GOOD, "rejected": answer("b")}, "rejected", "must be strings too"),
    "string after messages": ({**CHAT, "rejected": "b"}, "rejected", "found a string 'b' where a list of messages"),
    "string for anchors": ({**GOOD, "anchors": "c"}, "anchors", "found a string 'c' where a list belongs"),
    "no anchors in the list": ({**GOOD, "anchors": []}, "anchors", "an empty list"),
    "empty anchor": ({**GOOD, "anchors": ["c", ""]}, r"anchors\[1\]", "the response is empty"),
    "null anchor": ({**GOOD, "anchors": [None]}, r"anchors\[0\]", "where a string belongs"),
    "anchor of another kind": ({**CHAT, "anchors": ["c"]}, r"anchors\[0\]", "where a list of messages belongs"),
    "label as a number": ({"prompt": "a", "completion": "b", "label": 0}, "label", "found an integer 0 where true or"),
    "label as text": ({"prompt": "a", "completion": "b", "label": "false"}, "label", "found a string 'false'"),
    "null completion": ({"prompt": "a", "completion": None, "label": False}, "completion", "null"),
    "safety as a number": ({**SAFE, "is_response_1_safe": 0}, "is_response_1_safe", "found an integer 0"),
    "empty unsafe response": ({**SAFE, "response_1": ""}, "response_1", "the response is empty"),
    "no messages": ({**CHAT, "prompt": []}, "prompt", "an empty list of messages"),
    "unknown role": (
        {**CHAT, "prompt": [{"role": "human", "content": "a"}]},
        r"prompt\[0\]",
        "role is 'human'. Use one",
    ),
    "no role": ({**CHAT, "prompt": [{"content": "a"}]}, r"prompt\[0\]", "role is None"),
    "string among messages": ({**CHAT, "prompt": ["a"]}, r"prompt\[0\]", "found a string 'a' where a message belongs"),
    "content as a list": ({**CHAT, "rejected": answer(["a"])}, r"rejected\[0\]", r"content is a list \['a'\]"),
    "answered prompt": ({**CHAT, "prompt": [*USER, *answer("a")]}, "prompt", "its last message is from the assistant"),
    "user's message as response": ({**CHAT, "rejected": USER}, "rejected", "found messages of user. Give exactly one"),
    "whole chat as response": ({**CHAT, "rejected": [*USER, *answer("b")]}, "rejected", "messages of user, assistant"),
    "empty message": ({**CHAT, "rejected": answer(" ")}, "rejected", "the response is empty"),
    "half a character": ({**GOOD, "rejected": "so \ud83d"}, "rejected", "half a character at position 3"),
    "half a character in a message": (
        {**CHAT, "prompt": [{"role": "user", "content": "\ud83d"}]},
        r"prompt\[0\]",
        "half",
    ),
    "no transcript": ({**HH, "rejected": "a b"}, "rejected", r"no '.n.nAssistant:' in the transcript 'a b'"),
    "empty end of a transcript": ({**HH, "rejected": "\n\nHuman: a\n\nAssistant: "}, "rejected", "response is empty"),
    "empty start of a transcript": ({**HH, "rejected": "\n\nAssistant: b"}, "rejected", "prompt is empty"),
    "no transcript at all": ({**HH, "rejected": 3}, "rejected", "found an integer 3 where a string"),
    "no answer in a chat": ({**ULTRA, "rejected": USER}, "rejected", "found messages of user. Give the whole chat"),
    "chat of an answer alone": ({**ULTRA, "rejected": answer("b")}, "rejected", "found messages of assistant"),
    "question at the end": ({**ULTRA, "rejected": [*answer("b"), *USER]}, "rejected", "messages of assistant, user"),
    "another prompt": ({**ULTRA, "prompt": "b"}, "prompt", "a string 'b' is none of the messages in rejected"),
    "empty answer in a chat": (
        {**ULTRA, "rejected": [*ULTRA["rejected"][:1], *answer("")]},
        r"rejected\[1\]",
        "response is empty",
    ),
    "string for a chat": ({**ULTRA, "rejected": "b"}, "rejected", "found a string 'b' where a list of messages"),
    "two rejected responses": ({**SWIFT, "rejected_response": ["a"]}, "rejected_response", r"found a list \['a'\]"),
    "empty rejected response": ({**SWIFT, "rejected_response": " "}, "rejected_response", "the response is empty"),
    "string for messages": ({**SWIFT, "messages": "a"}, "messages", "found a string 'a' where a list of messages"),
    "answers alone": ({**SWIFT, "messages": answer("a")}, "messages", "found messages of assistant. Give the question"),
    "role unknown to swift": (
        {**SWIFT, "messages": [{"role": "bot", "content": "a"}]},
        r"messages\[0\]",
        "role is 'bot'",
    ),
    "not an object": (["a", "b"], None, r"found a list \['a', 'b'\]. Each row must be an object"),
}


@pytest.mark.parametrize(("record", "field", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_names_file_row_field_and_fix(tmp_path, record, field, message):
    forms = {"chosen": HH, "messages": SWIFT, "completion": None, "response_0": None}
    first = next((good for name, good in forms.items() if name in record), GOOD) if field is not None else None
    first = [ULTRA if record.get("chosen") == ULTRA["chosen"] else first] if first else []
    path = write_lines(tmp_path / "negatives.jsonl", *first, record)
    place = f"{path}, row {1 + len(first)}" + (f", field '{field}'" if field else "")
    with pytest.raises(DataError, match=f"^{place}: .*{message}") as caught:
        read_rows(path)
    assert str(caught.value).count(". ") >= 1, "what to do is missing"


def test_long_values_are_shortened():
    with pytest.raises(DataError) as caught:
        rows_from([{"prompt": "a", "rejected": ["x" * 1000]}])
    assert len(str(caught.value)) < 300


def test_sets_without_rows_or_negatives(tmp_path):
    for records in ([], datasets.Dataset.from_dict({"prompt": [], "rejected": []})):
        with pytest.raises(DataError, match=r"^here: no rows"):
            rows_from(records, "here")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty.jsonl: no rows"):
        read_rows(str(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match=r"none of 1 rows holds a negative.*label = false"):
        rows_from([{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(DataError, match=r"none of 1 rows holds a negative.*is_response_0_safe"):
        rows_from([{**SAFE, "is_response_1_safe": True}])


def test_files_that_cannot_be_read(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(GOOD) + '\n{"prompt": "a",, }\n')
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    (tmp_path / "broken.json").write_text('[{"prompt": \n "a"')
    (tmp_path / "a.csv").write_text("prompt,rejected\na,b\n")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"broken.jsonl, row 2: not valid JSON \(.*column 16\). Write one JSON object"):
        read_rows(str(broken))
    with pytest.raises(DataError, match=r"latin.jsonl, row 2: not UTF-8"):
        read_rows(str(tmp_path / "latin.jsonl"))
    with pytest.raises(DataError, match=r"broken.json, row 1: not valid JSON \(.*line 2"):
        read_rows(str(tmp_path / "broken.json"))
    with pytest.raises(DataError, match=r"a.csv: unknown file type '.csv'. Give one of .jsonl"):
        read_rows(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match=r"a.parquet: not readable as Parquet"):
        read_rows(str(tmp_path / "a.parquet"))
    for missing in ("no.jsonl", "no"):
        with pytest.raises(DataError, match="no such file"):
            read_rows(str(tmp_path / missing))


def test_what_is_not_a_list_of_rows():
    for records, message in (
        (datasets.DatasetDict({"train": datasets.Dataset.from_list([GOOD])}), "DatasetDict with the keys train"),
        ({"prompt": ["a"], "rejected": ["b"]}, "dict with the keys prompt, rejected"),
        (datasets.Dataset.from_list([GOOD]).to_iterable_dataset(), "IterableDataset"),
        ("file.jsonl", "a string 'file.jsonl'"),
    ):
        with pytest.raises(DataError, match=message):
            rows_from(records, "here")


# --- Splitting ---


def test_a_prompt_is_on_one_side_and_stays_there():
    rows = rows_from([{"prompt": f"p{i // 2}", "rejected": f"r{i}"} for i in range(400)])
    train, held_out = split_by_prompt(rows, 0.25)
    assert len(train) + len(held_out) == 400
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert 0.15 < len(held_out) / 400 < 0.35
    _, later = split_by_prompt(rows[::-1] + rows_from(tiny_rows(20)), 0.25)
    assert {row.prompt for row in held_out} <= {row.prompt for row in later}
    assert split_by_prompt(rows, 0.0) == (rows, [])


def test_chats_are_split_by_their_prompt_too():
    """Two negatives of one chat stay together; so do a one-question chat and the same question as a string."""
    questions = [[{"role": "user", "content": f"q{i}"}] for i in range(60)]
    longer = [[{"role": "system", "content": "s"}, *question] for question in questions]
    chats = [{"prompt": p, "rejected": answer(r)} for p in questions + longer for r in ("a", "b")]
    rows = rows_from(chats) + rows_from([{"prompt": f"q{i}", "rejected": "c"} for i in range(60)])
    train, held_out = split_by_prompt(rows, 0.3)
    assert len(train) + len(held_out) == len(rows)
    assert not {prompt_key(row) for row in train} & {prompt_key(row) for row in held_out}
    for i in range(60):
        sides = {
            side for side, rows in enumerate((train, held_out)) for row in rows if row.prompt in (questions[i], f"q{i}")
        }
        assert len(sides) == 1
    for i in range(60):
        assert sum(row.prompt == longer[i] for row in held_out) in (0, 2)


def test_a_split_without_rows_is_refused():
    with pytest.raises(DataError, match=r"eval_fraction 0.001 of 1 prompts leaves no row for evaluation"):
        split_by_prompt(rows_from([GOOD]), 0.001)


# --- Tokens ---

TOKENIZERS = {
    "plain": {},
    "bos": {"bos": True},
    "eos": {"eos": True},
    "bos and eos": {"bos": True, "eos": True},
    "prefix space": {"prefix_space": True},
    "prefix space and bos": {"prefix_space": True, "bos": True},
}


@pytest.mark.parametrize("options", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_plain_text_is_prompt_then_response_then_eos(options):
    tokenizer = tiny_tokenizer(**options)
    records = [{**record, "anchors": [" go home", " it"]} for record in tiny_rows(6)]
    for record, example in zip(records, tokenize_rows(rows_from(records), tokenizer, CONFIG), strict=True):
        prompt = example.prompt_ids
        assert (prompt[0] == tokenizer.bos_token_id) is options.get("bos", False)
        assert tokenizer.eos_token_id not in prompt, "EOS must not stand between prompt and response"
        texts = [record["rejected"], *record["anchors"]]
        for text, ids in zip(texts, example.responses(), strict=True):
            assert ids.count(tokenizer.eos_token_id) == 1
            assert ids[-1] == tokenizer.eos_token_id
            decoded = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
            assert decoded == record["prompt"] + text


def test_a_token_across_the_boundary_is_not_used(caplog):
    tokenizer = tiny_tokenizer()
    together = tokenizer("how to")["input_ids"]
    assert together[0] != tokenizer("ho")["input_ids"][0], "the merge that this test is about"
    rows = rows_from([{"prompt": "ho", "rejected": "w to"}, {"prompt": "how", "rejected": " to"}])
    with caplog.at_level(logging.INFO, logger="d2o_fast"):
        first, second = tokenize_rows(rows, tokenizer, CONFIG)
    assert first.prompt_ids == tokenizer("ho")["input_ids"]
    assert first.rejected_ids == [*tokenizer("w to")["input_ids"], tokenizer.eos_token_id]
    assert second.prompt_ids + second.rejected_ids == [*together, tokenizer.eos_token_id]
    assert caplog.text.count("1 of 2 rows: a token would span the end of the prompt") == 1


def test_special_tokens_that_the_text_brings_are_not_doubled():
    tokenizer = tiny_tokenizer(bos=True)
    rows = rows_from([{"prompt": "<s>how", "rejected": " to</s>"}])
    (example,) = tokenize_rows(rows, tokenizer, CONFIG)
    assert [*example.prompt_ids, *example.rejected_ids] == [*tokenizer("how to")["input_ids"], tokenizer.eos_token_id]


def test_a_chat_ends_with_its_end_of_turn_token():
    tokenizer = tiny_tokenizer(chat=True)
    rows = rows_from([{"prompt": USER, "rejected": answer("go away"), "anchors": [answer("it"), answer("\nit")]}])
    (example,) = tokenize_rows(rows, tokenizer, CONFIG)
    prompt = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    full = tokenizer.apply_chat_template([*USER, *answer("go away")], return_dict=False)
    newline = tokenizer("\n")["input_ids"]
    assert example.prompt_ids == prompt
    assert [*prompt, *example.rejected_ids, *newline] == full
    assert all(response[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") for response in example.responses())
    assert tokenizer.decode(example.anchor_ids[1]) == "\nit<|im_end|>"


def test_an_end_of_turn_token_that_is_not_eos():
    """As in Phi-3, a turn ends with its own token, and EOS follows at the end of the whole chat."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.eos_token = "</s>"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{% endif %}", "{% else %}{{ '</s>' }}{% endif %}")
    rows = rows_from([{"prompt": USER, "rejected": answer("go away")}])
    (example,) = tokenize_rows(rows, tokenizer, CONFIG)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert example.rejected_ids == [*tokenizer("go away")["input_ids"], end_of_turn]
    model = tiny_model()
    model.generation_config.eos_token_id = [2, 7]
    assert stop_token_ids(tokenizer, model, rows) == [2, end_of_turn, 7]
    assert stop_token_ids(tokenizer, model, rows_from([GOOD])) == [2, 7]


def test_a_template_without_end_of_turn_gets_eos():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    (example,) = tokenize_rows(rows_from([CHAT]), tokenizer, CONFIG)
    assert tokenizer.decode([*example.prompt_ids, *example.rejected_ids]).endswith("assistant: go away\n<|im_end|>")


def test_chat_faults():
    with pytest.raises(
        DataError, match=r"here, row 1, field 'prompt': messages, but the tokenizer has no chat template"
    ):
        tokenize_rows(rows_from([CHAT], "here"), tiny_tokenizer(), CONFIG)
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(DataError, match=r"renders another prompt .*'1<\|im_start\|>"):
        tokenize_rows(rows_from([CHAT]), tokenizer, CONFIG)
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(DataError, match=r"row 1, field 'prompt': the chat template refuses .*no system role here"):
        tokenize_rows(rows_from([CHAT]), tokenizer, CONFIG)


def test_truncation(caplog):
    tokenizer = tiny_tokenizer(bos=True)
    body = list(range(30, 30 + 12))
    prompt = tokenizer.decode(body)
    assert tokenizer(prompt)["input_ids"] == [1, *body]
    rows = rows_from([{"prompt": prompt, "rejected": " it" * 9, "anchors": [" it" * 3, " it" * 4]}])
    cases = (("keep_end", 13, [1, *body[-7:]], "1 prompts"), ("keep_start", 18, [1, *body], "0 prompts"))
    for mode, max_length, kept, lost in cases:
        config = D2OConfig(max_length=max_length, max_completion_length=5, truncation_mode=mode)
        with caplog.at_level(logging.INFO, logger="d2o_fast"):
            (example,) = tokenize_rows(rows, tokenizer, config)
        assert example.prompt_ids == kept
        it = tokenizer(" it")["input_ids"][-1]
        assert example.rejected_ids == [it] * 5
        assert example.anchor_ids == [[it] * 3 + [2], [it] * 4 + [2]]
        assert f"{lost} lost their start, 1 responses their end" in caplog.text
    rows = rows_from([{"prompt": prompt, "rejected": "x"}], "here")
    for mode, max_length in (("keep_end", 12), ("keep_start", 13)):
        config = D2OConfig(max_length=max_length, max_completion_length=5, truncation_mode=mode)
        found = (
            rf"here, row 1, field 'prompt': 13 tokens, of which max_length \({max_length}\) leaves none for a response"
        )
        with pytest.raises(DataError, match=found):
            tokenize_rows(rows, tokenizer, config)


def test_keep_start_cuts_the_sequence_as_trl_does():
    tokenizer = tiny_tokenizer()
    row = {"prompt": "how to mend the lock", "rejected": " go away" * 8, "anchors": [" it" * 30]}
    (whole,) = tokenize_rows(rows_from([row]), tokenizer, D2OConfig(max_length=400, max_completion_length=300))
    for max_length in (len(whole.prompt_ids) + 1, len(whole.prompt_ids) + 6):
        config = D2OConfig(max_length=max_length, max_completion_length=max_length - 1, truncation_mode="keep_start")
        (example,) = tokenize_rows(rows_from([row]), tokenizer, config)
        ids = [whole.prompt_ids + response for response in whole.responses()]
        collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode="keep_start")
        features = {
            "prompt_ids": whole.prompt_ids,
            "chosen_ids": whole.anchor_ids[0],
            "rejected_ids": whole.rejected_ids,
        }
        theirs = collator([features])["input_ids"].tolist()  # chosen, rejected
        assert example.prompt_ids + example.anchor_ids[0] == theirs[0] == ids[1][:max_length]
        assert example.prompt_ids + example.rejected_ids == theirs[1] == ids[0][:max_length]


def test_texts_without_tokens():
    tokenizer = tiny_tokenizer()  # drops all but printable ASCII
    assert tokenizer("\u4e2d")["input_ids"] == []
    with pytest.raises(DataError, match="row 1, field 'prompt': the tokenizer makes no tokens"):
        tokenize_rows(rows_from([{"prompt": "\u4e2d", "rejected": "b"}]), tokenizer, CONFIG)
    with pytest.raises(DataError, match="row 1, field 'rejected': the tokenizer makes no tokens"):
        tokenize_rows(rows_from([{"prompt": "a", "rejected": "\u4e2d"}]), tokenizer, CONFIG)
    with pytest.raises(DataError, match="field 'anchors\\[0\\]': the tokenizer makes no tokens"):
        tokenize_rows(rows_from([{**GOOD, "anchors": ["\u4e2d"]}]), tokenizer, CONFIG)


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(D2OError, match="has no eos_token"):
        tokenize_rows([Row("a", "b", None, "here", 1)], tokenizer, CONFIG)


def test_special_tokens_of_a_template_stay_whole():
    """The tokenizer's end-of-turn token was added but is not declared special in its map."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_tokens([AddedToken("<|turn_end|>", special=True)])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "<|turn_end|>")
    (example,) = tokenize_rows(rows_from([CHAT]), tokenizer, CONFIG)
    assert example.rejected_ids[-1] == tokenizer.convert_tokens_to_ids("<|turn_end|>")

"""Inspects an anchor store and exports it to other trainers' files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from d2o_fast.anchors import shards
from d2o_fast.anchors.filters import token_overlap
from d2o_fast.anchors.inspection import export, inspect
from d2o_fast.cli import main
from d2o_fast.errors import D2OError
from stores import CHAT_ROW, build
from tiny import tiny_rows


def rewritten(folder: Path, **columns: Any) -> None:
    """Gives the first row of the store other values, in a valid shard."""
    digest = shards.check_shard(folder, 0, shards.read_manifest(folder))
    assert digest is not None
    records = shards.read_shard(folder, 0, digest, shards.SCHEMA.names).to_pylist()
    records[0].update(columns)
    shards.write_shard(folder, 0, shards.pa.Table.from_pylist(records, schema=shards.SCHEMA))


def test_what_inspect_prints(tmp_path: Path) -> None:
    store = build(tmp_path / "s", [*tiny_rows(3), {**tiny_rows(1)[0], "rejected": " it", "anchors": [" to", " to"]}])
    negative = store.examples()[0].rejected_ids
    records = list(store.records(*shards.SCHEMA.names))
    ids = [[*negative[:-1], 2], [7] * 12, [2]]
    rewritten(
        tmp_path / "s",
        anchors_ids=ids,
        anchors_tokens=[len(i) for i in ids],
        anchors_ref_logps=[-10.0, -20.0, -3.0],
    )
    text = inspect(tmp_path / "s")
    assert text.startswith(
        f"{tmp_path}/s: 4 of 4 negatives\nnum_generations 3, temperature 1.0, top_p 1.0, sampling_seed 5"
    )
    assert "\n3 prompts, 11 anchors (9 sampled, 2 given with the data)\n" in text
    assert "same prompt and negative): 1 of 11 (9.1%)" in text
    assert "empty anchors (a stop token alone): 1 of 11 " in text
    assert "negatives cut by their length: 0 of 4 (0.0%)" in text
    records[0].update(anchors_ids=ids, anchors_ref_logps=[-10.0, -20.0, -3.0])
    anchors = [a for r in records for a in r["anchors_ids"]]
    assert f"anchors cut by their length (no stop token): {sum(a[-1] != 2 for a in anchors)} of 11" in text
    logp = sum(x for r in records for x in r["anchors_ref_logps"]) / sum(map(len, anchors))
    rejected = sum(r["rejected_ref_logp"] for r in records) / sum(len(r["rejected_ids"]) for r in records)
    assert f"nats per token: anchors {logp:.3f}, negatives {rejected:.3f}\n" in text
    assert re.search(r"repeats counted\): mean 0\.[0-9]{3}, largest 1\.000\n", text)
    assert "samples, each with its log-probability:\n  memory, row 1: 'how to open the lock?'\n    negative " in text
    assert text.count("\n    anchor ") == 3 + 3 + 2
    assert "    anchor      -20.00  " in text


def test_token_overlap() -> None:
    assert token_overlap([5, 6, 2], [5, 6, 2], {2}) == 1.0
    assert token_overlap([5, 6, 2], [7, 2], {2}) == 0.0
    assert token_overlap([5, 5, 6], [5, 7, 2], {2}) == 1 / 4, "one 5 in common; 5, 5, 6, 7 in either"
    assert token_overlap([2], [2], {2}) == 1.0
    assert token_overlap([2], [5, 2], {2}) == 0.0


def test_a_store_that_is_not_finished(tmp_path: Path) -> None:
    build(tmp_path / "s")
    whole = inspect(tmp_path / "s")
    (tmp_path / "s" / "shard-00001.parquet").unlink()
    text = inspect(tmp_path / "s")
    assert text.startswith(f"{tmp_path}/s: 6 of 10 negatives; 1 of 3 shards are missing\n")
    assert "30 anchors" in whole
    assert "18 anchors" in text
    with pytest.raises(D2OError, match="1 shards are missing; run `d2o sample` again"):
        export(tmp_path / "s", tmp_path / "out.jsonl")
    for i in (0, 2):
        (tmp_path / "s" / f"shard-0000{i}.parquet").unlink()
    assert inspect(tmp_path / "s") == f"{tmp_path}/s: none of 3 shards is made yet"


def test_export_for_trl(tmp_path: Path) -> None:
    store = build(tmp_path / "s", tiny_rows(5))
    assert export(tmp_path / "s", tmp_path / "out.jsonl") == 15
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    texts = [text for record in store.records("anchors") for text in record["anchors"]]
    assert [line["chosen"] for line in lines] == texts
    for line, row in zip(lines, [row for row in tiny_rows(5) for _ in range(3)], strict=True):
        assert (line["prompt"], line["rejected"]) == (row["prompt"], row["rejected"])
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "out.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.column_names == ["prompt", "chosen", "rejected"]
    with pytest.raises(D2OError, match="is there already"):
        export(tmp_path / "s", tmp_path / "out.jsonl")
    with pytest.raises(D2OError, match="cannot be written: No such file"):
        export(tmp_path / "s", tmp_path / "none" / "out.jsonl")


def test_chats_are_exported_as_chats(tmp_path: Path) -> None:
    from trl.data_utils import is_conversational

    records = [CHAT_ROW, {key: CHAT_ROW[key] for key in ("prompt", "rejected")}]
    build(tmp_path / "s", records, chat=True)
    assert export(tmp_path / "s", tmp_path / "out.jsonl") == 2 + 3
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {
        "prompt": CHAT_ROW["prompt"],
        "chosen": CHAT_ROW["anchors"][0],
        "rejected": CHAT_ROW["rejected"],
    }
    for line in lines:
        assert is_conversational(line)
        assert line["chosen"][0]["role"] == "assistant"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "eval"):
        build(tmp_path / "anchors" / name, tiny_rows(4))
    assert main(["anchors", "inspect", str(tmp_path / "anchors" / "eval")]) == 0
    one = capsys.readouterr().out
    assert main(["anchors", "inspect", str(tmp_path / "anchors")]) == 0
    assert capsys.readouterr().out == f"{one}\n{one.replace('/eval:', '/train:')}"
    assert main(["anchors", "export", str(tmp_path / "anchors" / "eval"), str(tmp_path / "o.jsonl")]) == 0
    assert capsys.readouterr().out.startswith("12 lines with prompt, chosen (an anchor) and rejected in ")
    assert main(["anchors", "--help"]) == 0
    usage = capsys.readouterr().out.splitlines()[0].replace("[-h] ", "")  # which older versions of jsonargparse show
    assert usage == "usage: d2o anchors {inspect,export} folder [out]"
    for arguments, message in (
        ([], "required"),
        (["inspect"], "folder"),
        (["export", "a"], "usage: d2o anchors inspect FOLDER, or d2o anchors export FOLDER OUT.jsonl"),
        (["inspect", "a", "b"], "usage: d2o anchors inspect FOLDER"),
        (["look", "a"], "invalid choice: 'look'"),
        (["inspect", str(tmp_path / "none")], "no such folder"),
        (["export", str(tmp_path / "anchors"), str(tmp_path / "p.jsonl")], "no manifest.json"),
    ):
        assert main(["anchors", *arguments]) == 2
        assert message in capsys.readouterr().err

"""``d2o anchors inspect FOLDER`` and ``d2o anchors export FOLDER OUT.jsonl``: a look into an anchor store.

K anchors of one prompt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from d2o_fast.dry_run import histogram
from d2o_fast.errors import D2OError
from d2o_fast.filters import counts_text, token_overlap
from d2o_fast.references import describe_references
from d2o_fast.shards import read_manifest, read_shard
from d2o_fast.tokens import shortened

USAGE = """usage: d2o anchors inspect FOLDER              what a store holds: counts, lengths, duplicates, samples
       d2o anchors export FOLDER OUT.jsonl     one line for each anchor: TRL's prompt, chosen, rejected

FOLDER is a store (<output_dir>/anchors/train), or, to inspect, the folder above it."""


def main(arguments: Sequence[str]) -> int:
    """The command ``d2o anchors``; 0 if it succeeded.

    Raises:
        D2OError: not one of the forms in ``USAGE``, no store, a damaged one; an incomplete one, or a file that is there
            already, in an export.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    if arguments[:1] == ["inspect"] and len(arguments) == 2:
        print("\n\n".join(inspect(folder) for folder in _stores(Path(arguments[1]))))
        return 0
    if arguments[:1] == ["export"] and len(arguments) == 3:
        count = export(Path(arguments[1]), Path(arguments[2]))
        print(f"{count} lines with prompt, chosen (an anchor) and rejected in {arguments[2]}")
        return 0
    raise D2OError(f"d2o anchors {' '.join(arguments)}: not understood\n{USAGE}")


def _stores(folder: Path) -> list[Path]:
    inside = sorted(path.parent for path in folder.glob("*/manifest.json"))
    return inside if inside and not (folder / "manifest.json").exists() else [folder]


def inspect(folder: Path) -> str:
    """What the store in ``folder`` holds, as text; shards that are still missing are counted."""
    manifest = read_manifest(folder)
    records, missing = _records(folder, manifest)
    if not records:
        return f"{folder}: none of {manifest['num_shards']} shards is made yet"
    fingerprint = manifest["fingerprint"]
    ends = set(fingerprint["stop_token_ids"])
    anchors = [ids for record in records for ids in record["anchors_ids"]]
    negatives = [record["rejected_ids"] for record in records]
    sampled = sum(len(record["anchors_ids"]) for record in records if record["sampled"])
    usable, lost = [r for r in records if r["anchors_ids"]], [r for r in records if not r["anchors_ids"]]
    dropped = [reason for record in records for reason in record["dropped"]]
    settings = ("num_generations", "temperature", "top_p", "sampling_seed", "max_completion_length", "dtype")
    lines = [
        f"{folder}: {len(records)} of {manifest['num_rows']} negatives"
        + (f"; {missing} of {manifest['num_shards']} shards are missing" if missing else ""),
        ", ".join(f"{name} {fingerprint[name]}" for name in settings),
        *([f"sampling_instruction {instruction!r}"] if (instruction := fingerprint["sampling_instruction"]) else []),
        f"references: {describe_references(fingerprint, manifest['references'])}",
        f"{len({record['prompt'] for record in records})} prompts, {len(anchors)} anchors ({sampled} sampled, "
        f"{len(anchors) - sampled} given with the data)",
        f"{sampled + len(dropped)} draws, of which the filters dropped {len(dropped)}"
        + (f": {counts_text(dropped)}" if dropped else ""),
        f"rows that lost all their anchors: {len(lost)} of {len(records)}",
        *(f"  {r['source']}, row {r['source_row']}: {counts_text(r['dropped'])}" for r in lost),
        *histogram("tokens of a prompt", [record["prompt_tokens"] for record in records]),
        *histogram("tokens of a negative", list(map(len, negatives))),
        _share("negatives cut by their length", sum(ids[-1] not in ends for ids in negatives), negatives),
        *(_of_anchors(usable, anchors, ends) if anchors else []),
    ]
    return "\n".join(lines)


def _of_anchors(records: list[dict[str, Any]], anchors: list[list[int]], ends: set[int]) -> list[str]:
    overlaps = [token_overlap(ids, r["rejected_ids"], ends) for r in records for ids in r["anchors_ids"]]
    return [
        *histogram("tokens of an anchor", list(map(len, anchors))),
        _share(
            "exact duplicates (anchors that repeat one of the same prompt and negative)", _repeats(records), anchors
        ),
        _share("anchors cut by their length (no stop token)", sum(ids[-1] not in ends for ids in anchors), anchors),
        _share("empty anchors (a stop token alone)", sum(len(ids) == 1 and ids[0] in ends for ids in anchors), anchors),
        f"log-probability under the reference, nats per token: anchors {_per_token(records, 'anchors'):.3f}, negatives "
        f"{_per_token(records, 'rejected'):.3f}",
        "token overlap of an anchor with its negative (tokens in common / tokens in either, repeats counted): mean "
        f"{sum(overlaps) / len(overlaps):.3f}, largest {max(overlaps):.3f}",
        _share("anchors with an overlap of 0.5 or more", sum(overlap >= 0.5 for overlap in overlaps), anchors),
        "samples, each with its log-probability:",
        *(line for i in sorted({0, len(records) // 2, len(records) - 1}) for line in _sample(records[i])),
    ]


def export(folder: Path, out: Path) -> int:
    """Writes a line with TRL's ``prompt``, ``chosen`` (an anchor) and ``rejected`` for every anchor; their number.

    Texts are strings, or lists of messages where the data are chats. Duplicates stay: they are the distribution.

    Raises:
        D2OError: an incomplete store, or a file ``out`` that is there already.
    """
    manifest = read_manifest(folder)
    records, missing = _records(folder, manifest)
    if missing:
        raise D2OError(f"{folder}: {missing} shards are missing; run `d2o sample` again to complete the store")
    if out.exists():
        raise D2OError(f"{out} is there already; remove it or give another name")
    count, temporary = 0, out.with_name(out.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for line in _pairs(records):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
    except OSError as error:
        raise D2OError(f"{out} cannot be written: {error.strerror}") from error
    os.replace(temporary, out)
    return count


def _pairs(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in records:
        read = json.loads if record["chat"] else str
        for anchor in record["anchors"]:
            if not record["sampled"]:
                chosen = read(anchor)
            else:  # a sampled anchor is stored as its text
                chosen = [{"role": "assistant", "content": anchor}] if record["chat"] else anchor
            yield {"prompt": read(record["prompt"]), "chosen": chosen, "rejected": read(record["rejected"])}


def _records(folder: Path, manifest: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """(the rows of the shards that are there, how many shards are not)"""
    shards = [read_shard(folder, i, manifest) for i in range(manifest["num_shards"])]
    return [row for shard in shards if shard is not None for row in shard.to_pylist()], shards.count(None)


def _repeats(records: list[dict[str, Any]]) -> int:
    return sum(len(r["anchors_ids"]) - len({tuple(ids) for ids in r["anchors_ids"]}) for r in records)


def _share(what: str, count: int, among: Sequence[Any]) -> str:
    return f"{what}: {count} of {len(among)} ({count / len(among):.1%})"


def _per_token(records: list[dict[str, Any]], which: str) -> float:
    if which == "rejected":
        return sum(r["rejected_ref_logp"] for r in records) / sum(r["rejected_tokens"] for r in records)
    return sum(sum(r["anchors_ref_logps"]) for r in records) / sum(sum(r["anchors_tokens"]) for r in records)


def _sample(record: dict[str, Any]) -> list[str]:
    lines = [f"  {record['source']}, row {record['source_row']}: {shortened(record['prompt'], 200)!r}"]
    lines.append(f"    negative {record['rejected_ref_logp']:9.2f}  {shortened(record['rejected'], 200)!r}")
    for text, logp in list(zip(record["anchors"], record["anchors_ref_logps"], strict=True))[:3]:
        lines.append(f"    anchor   {logp:9.2f}  {shortened(text, 200)!r}")
    return lines

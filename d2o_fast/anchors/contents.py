"""Checks of what a store says, beyond its digests: whoever writes other content can write its digest too.

``manifest_fault`` and ``record_fault`` know the files alone. ``refuse_other_content`` compares the records with the
data and the model that they are for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from d2o_fast.anchors.filters import REASONS
from d2o_fast.errors import shortened, shown

MOST_SHARDS = 10_000_000  #: more are not believed
#: A log-probability may be above 0 by rounding, and is never as low as LOWEST: nats per token.
ROUNDING, LOWEST = 0.01, -10_000.0

#: the fields of a fingerprint that name models by their content
IDENTITIES = (
    *("weights", "model_config", "adapter", "ref_neg_weights", "ref_neg_config", "ref_neg_adapter"),
    *("ref_pos_weights", "ref_pos_config", "ref_pos_adapter"),
)
_IDS = ("prompt_ids", "rejected_ids", "anchors_ids")


# --- The manifest --------------------------------------------------------------------------------------------------


def manifest_fault(manifest: Any) -> str | None:
    """What is wrong with the values of a manifest of the right format; None if nothing is."""
    fingerprint = manifest["fingerprint"]
    sizes = [
        ("fingerprint.sampling_batch_size", "sampling_batch_size"),
        ("fingerprint.num_generations", "num_generations"),
    ]
    sizes += [("fingerprint.max_length", "max_length"), ("fingerprint.max_completion_length", "max_completion_length")]
    for name, value in [(long, fingerprint.get(short)) for long, short in sizes] + [("num_rows", manifest["num_rows"])]:
        if not _is_count(value) or value < 1:
            return _wrong(name, value, "an integer >= 1")
    rows, size, shards = manifest["num_rows"], fingerprint["sampling_batch_size"], manifest["num_shards"]
    if not _is_count(shards) or shards != -(-rows // size):
        return _wrong("num_shards", shards, f"{-(-rows // size)}, for {rows} rows in shards of {size}")
    if shards > MOST_SHARDS:
        return _wrong("num_shards", shards, f"at most {MOST_SHARDS}")
    draws, stops = fingerprint.get("num_draws"), fingerprint.get("stop_token_ids")
    if draws is not None and not (_is_count(draws) and draws >= fingerprint["num_generations"]):
        return _wrong("fingerprint.num_draws", draws, "an integer >= num_generations, or null")
    if not isinstance(stops, list) or not all(_is_count(stop) for stop in stops):
        return _wrong("fingerprint.stop_token_ids", stops, "a list of token ids")
    for name in ("temperature", "top_p", "sampling_seed"):
        value = fingerprint.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return _wrong(f"fingerprint.{name}", value, "a number")
    if fingerprint.get("dtype") not in ("float32", "bfloat16"):
        return _wrong("fingerprint.dtype", fingerprint.get("dtype"), "float32 or bfloat16")
    references = manifest.get("references", {})
    texts = {f"fingerprint.{name}": fingerprint.get(name) for name in (*IDENTITIES, "sampling_instruction")}
    if not isinstance(references, dict):
        return _wrong("references", references, "an object")
    for name, value in {**texts, **{f"references.{name}": references[name] for name in references}}.items():
        if value is not None and not isinstance(value, str):
            return _wrong(name, value, "a text or null")
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _wrong(name: str, found: object, wanted: str) -> str:
    return f"{name} is {shortened(repr(found), 100, one_line=True)}; it must be {wanted}"


# --- The records of a shard ----------------------------------------------------------------------------------------


def value_fault(table: pa.Table) -> tuple[int, str, str] | None:
    """(place in the table, field, what is wrong with it) of a null or a negative token id; None if there is none."""
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name != "rejected_ref_logp" and _has_null(column):
            return _first(column, _has_null), name, "it holds a null"
        if name in _IDS and _is_negative(column):
            return _first(column, _is_negative), name, f"the token id {pc.min(_leaves(column)).as_py()}"
    return None


def record_fault(table: pa.Table, fingerprint: Mapping[str, Any]) -> tuple[int, str, str] | None:
    """(place in the table, field, what is wrong with it) of a record that no store has; None if there is none.

    Args:
        table: a shard without nulls, with as many scores as anchors in every row.
    """
    lengths = {name: _lengths(table[name].combine_chunks()) for name in _IDS}
    for i, record in enumerate(table.drop_columns(list(_IDS)).to_pylist()):
        fault = _fault({**record, **{name: lengths[name][i] for name in _IDS}}, fingerprint)
        if fault is not None:
            return i, *fault
    return None


def _fault(record: dict[str, Any], fingerprint: Mapping[str, Any]) -> tuple[str, str] | None:
    """(field, what is wrong with it); the ids of ``record`` are their numbers."""
    fault = _length_fault(record, fingerprint)
    scores = list(zip(record["anchors_ref_logps"], record["anchors_tokens"], strict=True))
    if record["rejected_ref_logp"] is not None:
        scores.insert(0, (record["rejected_ref_logp"], record["rejected_tokens"]))
    for i, (logp, tokens) in enumerate(scores):
        if fault is None and not is_logp(logp, tokens):
            field = "rejected_ref_logp" if i == 0 else f"anchors_ref_logps[{i - 1}]"
            fault = field, f"{logp:g} nats for {tokens} tokens is no log-probability"
    unknown = [reason for reason in record["dropped"] if reason not in REASONS]
    if fault is None and unknown:
        fault = "dropped", f"{shown(unknown[0])} is none of the reasons {', '.join(REASONS)}"
    if fault is None and record["chat"]:
        texts = {"prompt": record["prompt"], "rejected": record["rejected"]}
        given = [] if record["sampled"] else record["anchors"]
        texts |= {f"anchors[{i}]": text for i, text in enumerate(given)}
        fault = next(((name, "no messages in JSON") for name, text in texts.items() if not _are_messages(text)), None)
    return fault


def _length_fault(record: dict[str, Any], fingerprint: Mapping[str, Any]) -> tuple[str, str] | None:
    room = min(fingerprint["max_completion_length"], fingerprint["max_length"] - record["prompt_ids"])
    for name in ("prompt", "rejected", "anchors"):
        if record[f"{name}_tokens"] != record[f"{name}_ids"]:
            return f"{name}_tokens", f"{record[f'{name}_tokens']} tokens, but {record[f'{name}_ids']} token ids"
    if not record["prompt_ids"]:
        return "prompt_ids", "it is empty"
    for name, length in [("rejected_ids", record["rejected_ids"])] + [
        (f"anchors_ids[{i}]", length) for i, length in enumerate(record["anchors_ids"])
    ]:
        if not 1 <= length <= room:
            return name, f"{length} tokens, after a prompt of {record['prompt_ids']} there is room for 1 to {room}"
    return None


def is_logp(value: float, tokens: int) -> bool:
    """Whether ``value`` can be the log-probability of that many tokens."""
    return LOWEST * tokens <= value <= ROUNDING * tokens  # false for NaN


def _are_messages(text: str) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in found)
    )


def _has_null(array: Any) -> bool:
    while not array.null_count and pa.types.is_list(array.type):
        array = array.flatten()
    return bool(array.null_count)


def _is_negative(array: Any) -> bool:
    return bool(len(_leaves(array)) and pc.min(_leaves(array)).as_py() < 0)


def _leaves(array: Any) -> Any:
    while pa.types.is_list(array.type):
        array = array.flatten()
    return array


def _lengths(array: Any) -> list[Any]:
    """The length of each list, or the lengths of each list of lists."""
    if not pa.types.is_list(array.type.value_type):
        return array.value_lengths().to_pylist()
    inner = iter(array.flatten().value_lengths().to_pylist())
    return [[next(inner) for _ in range(count)] for count in array.value_lengths().to_pylist()]


def _first(column: Any, bad: Any) -> int:
    return next(i for i in range(len(column)) if bad(column.slice(i, 1)))


# --- Records and their data ----------------------------------------------------------------------------------------


def content_fault(
    record: Mapping[str, Any], row: Any, example: Any, stored: Any, vocabulary: int
) -> tuple[str, str] | None:
    """(field, what differs) between a record and the row that it was made of; None if nothing does.

    Args:
        stored: the row that the record holds.
        example: the token ids of ``row``.
        vocabulary: number of the model's tokens.
    """
    pairs: list[tuple[str, Any, Any]] = [
        ("prompt", stored.prompt, row.prompt),
        ("rejected", stored.rejected, row.rejected),
        ("anchors", stored.anchors, row.anchors),
        ("prompt_ids", record["prompt_ids"], example.prompt_ids),
        ("rejected_ids", record["rejected_ids"], example.rejected_ids),
    ]
    if row.anchors is not None:
        pairs.append(("anchors_ids", record["anchors_ids"], example.anchor_ids))
    for field, found, wanted in pairs:
        if found != wanted and json.dumps(found, sort_keys=True) != json.dumps(wanted, sort_keys=True):
            return field, f"{_brief(found)} there, {_brief(wanted)} in the data"
    largest = max(_all(record["anchors_ids"]), default=0)
    if largest >= vocabulary:
        return "anchors_ids", f"the token id {largest}, of a vocabulary of {vocabulary}"
    return None


def _brief(value: object) -> str:
    return shortened(repr(value), 120)


def _all(lists: Iterable[Sequence[int]]) -> Iterable[int]:
    return (token for ids in lists for token in ids)

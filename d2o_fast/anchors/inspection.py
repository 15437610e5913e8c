"""``d2o anchors inspect FOLDER`` and ``d2o anchors export FOLDER OUT.jsonl``: reports on an anchor store.

K anchors of one prompt.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from d2o_fast.anchors.contents import IDENTITIES
from d2o_fast.anchors.filters import counts_text, token_overlap
from d2o_fast.anchors.references import describe_references
from d2o_fast.anchors.shards import read_manifest
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.data.dry_run import histogram
from d2o_fast.data.on_disk import Digests
from d2o_fast.errors import D2OError, printable, shortened
from d2o_fast.files import atomic_file

_COLUMNS = (
    *("row", "source", "source_row", "sampled", "prompt", "rejected", "anchors", "prompt_tokens", "anchors_ids"),
    *("rejected_ids", "anchors_ref_logps", "rejected_ref_logp", "dropped"),
)


def anchors(action: str, folder: Path, out: Path | None = None) -> int:
    """The command ``d2o anchors``; 0 if it succeeded.

    Args:
        action: "inspect", or "export", which needs ``out``.

    Raises:
        D2OError: the store is missing or damaged; ``out`` does not go with ``action``; for an export also, the store is
            incomplete, or ``out`` exists already or cannot be written.
    """
    if (action == "export") != (out is not None):
        raise D2OError("usage: d2o anchors inspect FOLDER, or d2o anchors export FOLDER OUT.jsonl")
    if out is None:
        print(printable("\n\n".join(inspect(store) for store in _stores(folder))))
    else:
        print(f"{export(folder, out)} lines with prompt, chosen (an anchor) and rejected in {out}")
    return 0


def _stores(folder: Path) -> list[Path]:
    inside = sorted(path.parent for path in folder.glob("*/manifest.json"))
    return inside if inside and not (folder / "manifest.json").exists() else [folder]


def inspect(folder: Path) -> str:
    """A summary of the store in ``folder``, as text. The store may be incomplete."""
    store = AnchorStore.open(folder, require_complete=False)
    if not store.num_present:
        return f"{folder}: none of {store.num_shards} shards is made yet"
    seen = _Counts(set(store.fingerprint["stop_token_ids"]))
    usable, samples = store.usable, list[str]()
    shown = {usable[i] for i in (0, len(usable) // 2, -1)} if usable else set[int]()
    for record in store.records(*_COLUMNS):
        seen.add(record)
        if record["row"] in shown:
            samples += _sample(record)
    settings = ("num_generations", "temperature", "top_p", "sampling_seed", "max_completion_length", "dtype")
    instruction = store.fingerprint.get("sampling_instruction")
    absent = [name for name in IDENTITIES if name not in store.fingerprint]
    if absent:
        raise D2OError(f"{folder}/manifest.json: fingerprint.{absent[0]} is missing; make the store again")
    names = {"neg": None, "pos": None, **read_manifest(folder).get("references", {})}
    anchors, negatives, dropped = seen.anchors.total(), seen.negatives.total(), seen.dropped
    lines = [
        f"{folder}: {negatives} of {store.num_rows} negatives"
        + (f"; {len(store.missing)} of {store.num_shards} shards are missing" if store.missing else ""),
        ", ".join(f"{name} {store.fingerprint[name]}" for name in settings),
        *([f"sampling_instruction {instruction!r}"] if instruction else []),
        f"references: {describe_references(store.fingerprint, names)}",
        f"{seen.texts.distinct()} prompts, {anchors} anchors ({seen.sampled} sampled, {anchors - seen.sampled} given "
        "with the data)",
        f"{seen.sampled + dropped.total()} draws, of which the filters dropped {dropped.total()}"
        + (f": {counts_text(dropped)}" if dropped else ""),
        f"rows that lost all their anchors: {len(seen.lost)} of {negatives}",
        *seen.lost,
        *histogram("tokens of a prompt", seen.prompts),
        *histogram("tokens of a negative", seen.negatives),
        _share("negatives cut by their length", seen.cut_negatives, negatives),
        *(seen.of_anchors() if anchors else []),
        *(["samples, each with its log-probability:", *samples] if anchors else []),
    ]
    return "\n".join(lines)


class _Counts:
    """Counts over the rows of a store."""

    def __init__(self, ends: set[int]) -> None:
        self.ends = ends
        self.prompts, self.negatives, self.anchors = Counter[int](), Counter[int](), Counter[int]()  # by tokens
        self.texts, self.dropped, self.lost = Digests(), Counter[str](), list[str]()
        self.sampled = self.repeats = self.cut_anchors = self.cut_negatives = self.empty = self.overlapping = 0
        self.anchors_logp = self.negatives_logp = self.overlap = self.largest_overlap = 0.0
        self.scored_tokens = 0  # of negatives

    def add(self, record: dict[str, Any]) -> None:
        anchors, negative, ends = record["anchors_ids"], record["rejected_ids"], self.ends
        self.texts.add(record["prompt"])
        self.prompts[record["prompt_tokens"]] += 1
        self.negatives[len(negative)] += 1
        self.cut_negatives += negative[-1] not in ends
        self.dropped.update(record["dropped"])
        if not anchors:
            self.lost.append(f"  {_source(record)}: {counts_text(record['dropped'])}")
            return
        self.anchors.update(map(len, anchors))
        self.sampled += len(anchors) if record["sampled"] else 0
        self.repeats += len(anchors) - len(set(map(tuple, anchors)))
        self.cut_anchors += sum(ids[-1] not in ends for ids in anchors)
        self.empty += sum(len(ids) == 1 and ids[0] in ends for ids in anchors)
        self.anchors_logp += sum(record["anchors_ref_logps"])
        self.negatives_logp += record["rejected_ref_logp"]
        self.scored_tokens += len(negative)
        overlaps = [token_overlap(ids, negative, ends) for ids in anchors]
        self.overlap += sum(overlaps)
        self.largest_overlap = max(self.largest_overlap, *overlaps)
        self.overlapping += sum(overlap >= 0.5 for overlap in overlaps)

    def of_anchors(self) -> list[str]:
        """The lines about anchors; there must be at least one."""
        anchors = self.anchors.total()
        tokens = sum(length * count for length, count in self.anchors.items())
        return [
            *histogram("tokens of an anchor", self.anchors),
            _share("exact duplicates (anchors that repeat one of the same prompt and negative)", self.repeats, anchors),
            _share("anchors cut by their length (no stop token)", self.cut_anchors, anchors),
            _share("empty anchors (a stop token alone)", self.empty, anchors),
            f"log-probability under the reference, nats per token: anchors {self.anchors_logp / tokens:.3f}, negatives "
            f"{self.negatives_logp / self.scored_tokens:.3f}",
            "token overlap of an anchor with its negative (tokens in common / tokens in either, repeats counted): mean "
            f"{self.overlap / anchors:.3f}, largest {self.largest_overlap:.3f}",
            _share("anchors with an overlap of 0.5 or more", self.overlapping, anchors),
        ]


def export(folder: Path, out: Path) -> int:
    """Writes a line with TRL's ``prompt``, ``chosen`` and ``rejected`` per anchor, and returns the number of lines.

    ``chosen`` is the anchor. Texts are strings, or lists of messages if the data are chats. Duplicates stay: they are
    part of the distribution.

    Raises:
        D2OError: the store is incomplete, or ``out`` exists already or cannot be written.
    """
    store = AnchorStore.open(folder, require_complete=False)
    if store.missing:
        found = f"{len(store.missing)} shards are missing"
        raise D2OError(f"{folder}: {found}; run `d2o sample` again to complete the store")
    if out.exists():
        raise D2OError(f"{out} is there already; remove it or give another name")
    count = 0
    with atomic_file(out) as file:
        for line in _pairs(store.records("chat", "sampled", "prompt", "rejected", "anchors")):
            file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
            count += 1
    return count


def _pairs(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in records:
        read = json.loads if record["chat"] else str
        for anchor in record["anchors"]:
            if not record["sampled"]:
                chosen = read(anchor)
            else:  # a sampled anchor is stored as its text
                chosen = [{"role": "assistant", "content": anchor}] if record["chat"] else anchor
            yield {"prompt": read(record["prompt"]), "chosen": chosen, "rejected": read(record["rejected"])}


def _share(what: str, count: int, among: int) -> str:
    return f"{what}: {count} of {among} ({count / among:.1%})"


def _source(record: dict[str, Any]) -> str:
    """File and row; a name that would act on the terminal is shown with escapes."""
    name = record["source"] if record["source"].isprintable() else repr(record["source"])
    return f"{name}, row {record['source_row']}"


def _sample(record: dict[str, Any]) -> list[str]:
    lines = [f"  {_source(record)}: {shortened(record['prompt'], 200)!r}"]
    lines.append(f"    negative {record['rejected_ref_logp']:9.2f}  {shortened(record['rejected'], 200)!r}")
    for text, logp in list(zip(record["anchors"], record["anchors_ref_logps"], strict=True))[:3]:
        lines.append(f"    anchor   {logp:9.2f}  {shortened(text, 200)!r}")
    return lines

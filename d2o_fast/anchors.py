"""Anchors and reference scores, made once and kept on disk.

A store is a folder with a manifest and shards of ``sampling_batch_size`` rows (``shards.py``). A shard is drawn and
scored together, with a seed of its own, and renamed into place once it is on the disk. So a run that is killed at any
instant and started again makes only what is missing, and ends with the same bits.

K anchors of one prompt; S responses; N response tokens of a batch.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn
from transformers import PreTrainedTokenizerBase

from d2o_fast.adapters import as_initial
from d2o_fast.batching import Example
from d2o_fast.config import D2OConfig
from d2o_fast.data import Row, tokenize_rows
from d2o_fast.drawing import Drawer, instructed
from d2o_fast.errors import D2OError, DataError, FingerprintError
from d2o_fast.fingerprint import expected_fingerprint, fingerprint_digest
from d2o_fast.references import References, reference_names
from d2o_fast.shards import SCHEMA, begin, locked, read_manifest, read_shard, shard_name, write_shard

__all__ = ["AnchorStore", "build_store", "expected_fingerprint"]

logger = logging.getLogger("d2o_fast")


class AnchorStore:
    """Anchors and reference scores of one split of the data, read from a folder that ``build_store`` made."""

    def __init__(self, folder: str, manifest: dict[str, Any], shards: list[pa.Table | None]) -> None:
        self.folder = folder
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self.num_rows: int = manifest["num_rows"]
        self._shards = shards

    @classmethod
    def open(cls, folder: str | os.PathLike[str], require_complete: bool = True) -> AnchorStore:
        """Reads and verifies every shard.

        Raises:
            D2OError: no such folder, no manifest, shards that are missing (unless ``require_complete`` is false) or
                damaged; each is named.
        """
        manifest = read_manifest(Path(folder))
        shards = [read_shard(Path(folder), i, manifest) for i in range(manifest["num_shards"])]
        store = cls(str(folder), manifest, shards)
        if require_complete and not store.complete:
            missing = [i for i, shard in enumerate(shards) if shard is None]
            raise D2OError(
                f"{folder}: {len(missing)} of {len(shards)} shards are missing, the first is "
                f"{shard_name(missing[0])}. Sampling was interrupted: run `d2o sample` again to complete it"
            )
        return store

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return all(shard is not None for shard in self._shards)

    @property
    def digest(self) -> str:
        """SHA-256 of the fingerprint, for a checkpoint to remember its data by."""
        return fingerprint_digest(self.fingerprint)

    def check(self, expected: dict[str, Any]) -> None:
        """Raises FingerprintError with the name of every field in which ``expected`` differs."""
        if self.fingerprint != expected:
            names = [*self.fingerprint, *(name for name in expected if name not in self.fingerprint)]
            pairs = {name: (self.fingerprint.get(name), expected.get(name)) for name in names}
            raise FingerprintError(self.folder, {name: pair for name, pair in pairs.items() if pair[0] != pair[1]})

    @property
    def usable(self) -> list[int]:
        """Places in the data of the rows that have anchors; the others lost theirs to the filters."""
        places = list[int]()
        for shard in self._tables():
            counts = shard["anchors_ids"].combine_chunks().value_lengths().to_pylist()
            places += [row for row, count in zip(shard["row"].to_pylist(), counts, strict=True) if count]
        return places

    def lost(self) -> str | None:
        """How many rows have lost all their anchors, the first of them, and where all are listed; None if none has."""
        if len(self.usable) == self.num_rows:
            return None
        lost = [record for record in self._records() if not record["anchors_ids"]]
        places = "; ".join(f"{record['source']}, row {record['source_row']}" for record in lost[:3])
        return (
            f"{len(lost)} of {self.num_rows} rows lost all their anchors to the filters and are left out ({places}"
            f"{'; ...' if len(lost) > 3 else ''}); `d2o anchors inspect {self.folder}` lists them all with the reasons"
        )

    def dropped(self) -> list[str]:
        """Why each draw that is no anchor is none (``filters.REASONS``), of all rows."""
        return [reason for shard in self._tables() for reasons in shard["dropped"].to_pylist() for reason in reasons]

    def examples(self) -> list[Example]:
        """Token ids and reference scores of the rows ``usable``, in the order of the data."""
        return [
            Example(
                record["prompt_ids"],
                record["rejected_ids"],
                record["anchors_ids"],
                [record["rejected_ref_logp"], *record["anchors_ref_logps"]],
            )
            for record in self._records()
            if record["anchors_ids"]
        ]

    def rows(self) -> list[Row]:
        """All rows that the store was made of; ``anchors`` is None where they were sampled."""
        rows = []
        for record in self._records():
            read = json.loads if record["chat"] else str
            anchors = None if record["sampled"] else [read(anchor) for anchor in record["anchors"]]
            place = record["source"], record["source_row"]
            rows.append(Row(read(record["prompt"]), read(record["rejected"]), anchors, *place))
        return rows

    def _records(self) -> Iterator[dict[str, Any]]:
        for shard in self._tables():
            yield from shard.to_pylist()

    def _tables(self) -> Iterator[pa.Table]:
        for shard in self._shards:
            if shard is None:
                raise D2OError(f"{self.folder}: the store is incomplete; run `d2o sample` again to complete it")
            yield shard


def build_store(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    config: D2OConfig,
    folder: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> AnchorStore:
    """Makes the store in ``folder``, or completes the one that is there.

    Rows without anchors get K = ``config.num_generations`` of them, or what ``filters.py`` leaves. They are drawn from
    the model, here or where ``config.server_url`` serves it; all responses are scored here, by the models of
    ``references.py``.

    Args:
        model: the initial model, from which training will start. It draws; it scores too, unless ``config`` names
            references. Of a PeftModel, ``adapters.as_initial`` says what that is.
        progress: called as ``progress(rows done, rows in all)`` after each shard, and once at the start.

    Raises:
        FingerprintError: the folder holds anchors made under other conditions.
        DataError: rows that cannot be used, all of them checked before the first is sampled.
        D2OError: another process at work in the folder, a damaged shard, fewer responses than asked for, a score that
            is not finite, a reference that does not fit, a server that cannot be sampled from.
    """
    if not rows:
        raise DataError(str(folder), None, None, "no rows", "Give at least one prompt with its negative")
    folder = Path(folder)
    examples = tokenize_rows(rows, tokenizer, config)
    if config.sampling_instruction is not None:
        for _ in instructed([row for row in rows if row.anchors is None], tokenizer, config):
            pass  # what cannot be drawn is said before the first draw
    references = References(model, tokenizer, config)
    fingerprint = expected_fingerprint(model, tokenizer, rows, config, references)
    size = config.sampling_batch_size
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        counts = {"num_rows": len(rows), "num_shards": -(-len(rows) // size)}
        manifest = begin(folder, {"fingerprint": fingerprint, **counts, "references": reference_names(config)})
        AnchorStore(str(folder), manifest, []).check(fingerprint)
        shards = [read_shard(folder, i, manifest) for i in range(manifest["num_shards"])]
        done = sum(shard.num_rows for shard in shards if shard is not None)
        if progress is not None:
            progress(done, len(rows))
        maker = None
        for i, shard in enumerate(shards):
            if shard is not None:
                continue
            maker = maker or _ShardMaker(references, fingerprint["stop_token_ids"])
            part = slice(i * size, (i + 1) * size)
            table = maker.make(i, rows[part], examples[part])
            write_shard(folder, i, table)
            shards[i] = table
            done += table.num_rows
            if progress is not None:
                progress(done, len(rows))
    return AnchorStore(str(folder), manifest, shards)


class _ShardMaker:
    """Draws and scores the rows of one shard at a time."""

    def __init__(self, references: References, stops: list[int]) -> None:
        self.references, self.tokenizer, self.config = references, references.tokenizer, references.config
        self.drawer = Drawer(references.model, self.tokenizer, self.config, stops)
        references.prepare()

    def make(self, shard: int, rows: Sequence[Row], examples: Sequence[Example]) -> pa.Table:
        with as_initial(self.references.model):
            examples, dropped = self.drawer.with_anchors((shard,), rows, examples)
        usable = [example for example in examples if example.anchor_ids]
        scores = iter(self.references.score(usable) if usable else [])
        first = shard * self.config.sampling_batch_size
        records = []
        for i, (row, example, reasons) in enumerate(zip(rows, examples, dropped, strict=True)):
            logps = next(scores) if example.anchor_ids else []
            for response, logp in enumerate(logps):
                if not math.isfinite(logp):
                    field = "rejected" if response == 0 else f"anchors[{response - 1}]"
                    found = f"its log-probability under its reference is {logp}"
                    raise DataError(row.source, row.index, field, found, "Check that model's weights, or try float32")
            records.append(store_record(first + i, row, example, logps, self.tokenizer, reasons))
        return pa.Table.from_pylist(records, schema=SCHEMA)


def store_record(
    index: int,
    row: Row,
    example: Example,
    logps: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    dropped: Sequence[str],
) -> dict[str, Any]:
    """A row of a shard (``SCHEMA``): ``example`` and its K + 1 log-probabilities in nats, the negative's first.

    ``logps`` is empty where there are no anchors.
    """
    if row.anchors is None:
        anchors = [tokenizer.decode(ids, skip_special_tokens=True) for ids in example.anchor_ids]
    else:
        anchors = [_as_text(anchor) for anchor in row.anchors]
    return {
        "row": index,
        "source": row.source,
        "source_row": row.index,
        "chat": not isinstance(row.prompt, str),
        "sampled": row.anchors is None,
        "prompt": _as_text(row.prompt),
        "rejected": _as_text(row.rejected),
        "anchors": anchors,
        "prompt_ids": example.prompt_ids,
        "rejected_ids": example.rejected_ids,
        "anchors_ids": example.anchor_ids,
        "rejected_ref_logp": logps[0] if logps else None,
        "anchors_ref_logps": logps[1:],
        "prompt_tokens": len(example.prompt_ids),
        "rejected_tokens": len(example.rejected_ids),
        "anchors_tokens": [len(ids) for ids in example.anchor_ids],
        "dropped": list(dropped),
    }


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""Anchors and reference scores, made once and kept on disk.

A store is a folder with a manifest and shards of ``sampling_batch_size`` rows (``shards.py``). A shard is drawn and
scored together, with a seed of its own, and renamed into place once it is on the disk. So a run that is killed at any
instant and started again makes only what is missing, and ends with the same bits.

K anchors of one prompt; S responses; N response tokens of a batch.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn
from transformers import PreTrainedTokenizerBase

from d2o_fast.anchors.drawing import Drawer, instructed
from d2o_fast.anchors.fingerprint import expected_fingerprint, fingerprint_digest
from d2o_fast.anchors.references import References, reference_names
from d2o_fast.anchors.shards import SCHEMA, begin, check_shard, read_manifest, shard_name, write_shard
from d2o_fast.anchors.store import EXAMPLE_COLUMNS, ROW_COLUMNS, Shards, Stored, example_of, row_of
from d2o_fast.config import D2OConfig
from d2o_fast.data.reading import Row
from d2o_fast.data.tokens import tokenized
from d2o_fast.errors import D2OError, DataError, FingerprintError
from d2o_fast.files import locked
from d2o_fast.forward.batch import Example
from d2o_fast.model.adapters import as_initial

__all__ = ["AnchorStore", "build_store", "expected_fingerprint"]


class AnchorStore:
    """Anchors and reference scores of one split of the data, read from a folder that ``build_store`` made."""

    def __init__(self, folder: str, manifest: dict[str, Any], digests: Sequence[str | None]) -> None:
        self.folder = folder
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self.num_rows: int = manifest["num_rows"]
        self._shards = Shards(Path(folder), self.fingerprint["sampling_batch_size"], digests)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], require_complete: bool = True) -> AnchorStore:
        """Verifies every shard, and keeps none: rows are read when they are asked for.

        Raises:
            D2OError: no such folder, no manifest, shards that are missing (unless ``require_complete`` is false) or
                damaged; each is named.
        """
        manifest = read_manifest(Path(folder))
        digests = [check_shard(Path(folder), i, manifest) for i in range(manifest["num_shards"])]
        store = cls(str(folder), manifest, digests)
        if require_complete and store.missing:
            raise D2OError(
                f"{folder}: {len(store.missing)} of {len(digests)} shards are missing, the first is "
                f"{shard_name(store.missing[0])}. Sampling was interrupted: run `d2o sample` again to complete it"
            )
        return store

    @property
    def num_shards(self) -> int:
        """How many there are when the store is complete."""
        return len(self._shards.digests)

    @property
    def num_present(self) -> int:
        """How many rows are there."""
        size = self._shards.size
        return self.num_rows - sum(min(size, self.num_rows - i * size) for i in self.missing)

    @property
    def missing(self) -> list[int]:
        """The shards that are not made yet."""
        return [i for i, digest in enumerate(self._shards.digests) if digest is None]

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return not self.missing

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

    @functools.cached_property
    def usable(self) -> Sequence[int]:
        """Places in the data of the rows that have anchors, ascending; the others lost theirs to the filters."""
        places = array("Q")
        for record in self.records("row", "anchors_tokens"):
            if record["anchors_tokens"]:
                places.append(record["row"])
        return range(self.num_rows) if len(places) == self.num_rows else places

    def lost(self) -> str | None:
        """How many rows have lost all their anchors, the first of them, and where all are listed; None if none has."""
        count = self.num_rows - len(self.usable)
        if not count:
            return None
        records = self.records("source", "source_row", "anchors_tokens")
        lost = (f"{r['source']}, row {r['source_row']}" for r in records if not r["anchors_tokens"])
        places = "; ".join(itertools.islice(lost, 3))
        return (
            f"{count} of {self.num_rows} rows lost all their anchors to the filters and are left out ({places}"
            f"{'; ...' if count > 3 else ''}); `d2o anchors inspect {self.folder}` lists them all with the reasons"
        )

    def dropped(self) -> Counter[str]:
        """How many draws are no anchors for each of the ``filters.REASONS``, over all rows."""
        return Counter(reason for record in self.records("dropped") for reason in record["dropped"])

    def examples(self) -> Sequence[Example]:
        """Token ids and reference scores of the rows ``usable``, in the order of the data, read when asked for.

        Raises:
            D2OError: the store is incomplete; later, at a row whose shard is gone or changed since it was opened.
        """
        self._require_complete()
        return Stored(self._shards, self.usable, EXAMPLE_COLUMNS, example_of)

    def rows(self) -> Sequence[Row]:
        """All rows that the store was made of, as ``examples``; ``anchors`` is None where they were sampled."""
        self._require_complete()
        return Stored(self._shards, range(self.num_rows), ROW_COLUMNS, row_of)

    def records(self, *columns: str) -> Iterator[dict[str, Any]]:
        """These columns (``shards.SCHEMA``) of every row that is there, in order, a shard in memory at a time.

        Raises:
            D2OError: a shard is gone or changed since the store was opened.
        """
        return self._shards.records(columns)

    def _require_complete(self) -> None:
        if not self.complete:
            raise D2OError(f"{self.folder}: the store is incomplete; run `d2o sample` again to complete it")


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
    size = config.sampling_batch_size
    for _ in tokenized(rows, tokenizer, config):
        pass  # all rows are looked at before the first is sampled
    if config.sampling_instruction is not None:
        for start in range(0, len(rows), size):
            to_draw = [row for row in rows[start : start + size] if row.anchors is None]
            for _ in instructed(to_draw, tokenizer, config):
                pass  # what cannot be drawn is said before the first draw
    references = References(model, tokenizer, config)
    fingerprint = expected_fingerprint(model, tokenizer, rows, config, references)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "making anchors"):
        counts = {"num_rows": len(rows), "num_shards": -(-len(rows) // size)}
        manifest = begin(folder, {"fingerprint": fingerprint, **counts, "references": reference_names(config)})
        AnchorStore(str(folder), manifest, []).check(fingerprint)
        digests = [check_shard(folder, i, manifest) for i in range(manifest["num_shards"])]
        store = AnchorStore(str(folder), manifest, digests)
        done = store.num_present
        if progress is not None:
            progress(done, len(rows))
        maker = None
        for i, digest in enumerate(digests):
            if digest is not None:
                continue
            maker = maker or _ShardMaker(references, fingerprint["stop_token_ids"])
            part = rows[i * size : (i + 1) * size]
            examples = list(tokenized(part, tokenizer, config, log=False))
            digests[i] = write_shard(folder, i, maker.make(i, part, examples))
            done += len(part)
            if progress is not None:
                progress(done, len(rows))
    return store


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

"""Makes anchors and reference scores once and keeps them on disk.

A store is a folder with a manifest and shards of ``sampling_batch_size`` rows (``anchors/shards.py``). Each shard is
drawn and scored together, with its own seed, and renamed into place when it is on the disk. A run that is killed and
started again makes only the missing shards and ends with the same bits.

K anchors of one prompt; S responses; N response tokens of a batch.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from d2o_fast.anchors.contents import is_logp
from d2o_fast.anchors.drawing import Drawer
from d2o_fast.anchors.fingerprint import expected_fingerprint
from d2o_fast.anchors.instruction import instructed
from d2o_fast.anchors.references import References, reference_names
from d2o_fast.anchors.shards import SCHEMA, begin, read_manifest, write_shard
from d2o_fast.anchors.store import AnchorStore, store_record
from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Example, Row
from d2o_fast.data.tokens import tokenized
from d2o_fast.errors import D2OError, DataError
from d2o_fast.files import locked, make_folder
from d2o_fast.model.adapters import initial_policy
from d2o_fast.model.limits import KnownIds
from d2o_fast.model.parts import tokenizer_of, unwrapped, vocabulary_size

logger = logging.getLogger("d2o_fast")


def build_store(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    config: D2OConfig,
    folder: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> AnchorStore:
    """Makes the store in ``folder``, or completes it.

    Rows without anchors get K = ``config.num_generations`` of them, or fewer after ``anchors/filters.py``. The model
    draws them, here or on the server at ``config.server_url``. The models of ``anchors/references.py`` score all
    responses here.

    Args:
        model: the initial model, from which training starts. It draws the anchors, and scores unless ``config`` names
            references. ``adapters.initial_policy`` defines it for a PeftModel.
        progress: called as ``progress(rows done, rows in all)`` after each shard, and once at the start.

    Raises:
        FingerprintError: the folder holds anchors made under other conditions.
        DataError: a row cannot be used; all rows are checked before the first is sampled.
        D2OError: another process works in the folder, a shard is damaged, there are fewer responses than asked for, a
            score is not finite, a reference does not fit, the server cannot be sampled from.
    """
    if not rows:
        raise DataError(str(folder), None, None, "no rows", "Give at least one prompt with its negative")
    folder = Path(folder).expanduser()
    model, tokenizer = unwrapped(model), tokenizer_of(tokenizer)
    _check_rows(rows, model, tokenizer, config)
    references = References(model, tokenizer, config)
    fingerprint = expected_fingerprint(model, tokenizer, rows, config, references)
    if os.path.lexists(folder / "manifest.json"):  # reading takes no lock: many runs share a store that is complete
        store = _opened(model, tokenizer, rows, config, folder, fingerprint)
        if store.complete:
            if (folder / ".lock").is_file():
                with contextlib.suppress(D2OError), locked(folder, "making anchors"):
                    pass  # removes the file that a killed process left, if nobody has it and the disk can be written
            if progress is not None:
                progress(len(rows), len(rows))
            return store
    make_folder(folder)
    with locked(folder, "making anchors"):
        counts = {"num_rows": len(rows), "num_shards": -(-len(rows) // config.sampling_batch_size)}
        begin(folder, {"fingerprint": fingerprint, **counts, "references": reference_names(config)})
        # Another process may have worked meanwhile.
        store = _opened(model, tokenizer, rows, config, folder, fingerprint)
        _complete(store, rows, references, progress)
    return store


def _check_rows(rows: Sequence[Row], model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: D2OConfig) -> None:
    """Checks all rows before the first is sampled."""
    known = KnownIds(model, tokenizer, config)
    for row, example in zip(rows, tokenized(rows, tokenizer, config), strict=True):
        known.check(row, example)
    if config.sampling_instruction is not None:
        for start in range(0, len(rows), config.sampling_batch_size):
            part = rows[start : start + config.sampling_batch_size]
            for row, ids in instructed([row for row in part if row.anchors is None], tokenizer, config):
                known.check_ids(row, "prompt", ids)


def _opened(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    config: D2OConfig,
    folder: Path,
    fingerprint: dict[str, Any],
    require_complete: bool = False,
) -> AnchorStore:
    """The store in ``folder``, whose conditions and records are those of ``rows``."""
    manifest = read_manifest(folder)
    AnchorStore(str(folder), manifest, []).check(fingerprint)  # before every shard is read
    if manifest["num_rows"] != len(rows):
        found = f"num_rows is {manifest['num_rows']}, but the data have {len(rows)} rows"
        raise D2OError(f"{folder / 'manifest.json'}: {found}; remove the folder and sample again")
    store = AnchorStore.open(folder, require_complete)
    store.check_content(rows, tokenizer, config, vocabulary_size(model))
    return store


def _complete(
    store: AnchorStore, rows: Sequence[Row], references: References, progress: Callable[[int, int], None] | None
) -> None:
    """Makes the missing shards."""
    config, done, size = references.config, store.num_present, references.config.sampling_batch_size
    if progress is not None:
        progress(done, len(rows))
    maker = None
    for i in store.missing:
        part = rows[i * size : (i + 1) * size]
        examples = list(tokenized(part, references.tokenizer, config, log=False))
        maker = maker or _ShardMaker(references, store.fingerprint["stop_token_ids"], examples[0])
        store.digests[i] = write_shard(Path(store.folder), i, maker.make(i, part, examples))
        done += len(part)
        if progress is not None:
            progress(done, len(rows))


class _ShardMaker:
    """Draws and scores the rows of one shard at a time."""

    def __init__(self, references: References, stops: list[int], first: Example) -> None:
        self.references, self.tokenizer, self.config = references, references.tokenizer, references.config
        self.drawer = Drawer(references.model, self.tokenizer, self.config, stops)
        references.prepare(first)

    def make(self, shard: int, rows: Sequence[Row], examples: Sequence[Example]) -> pa.Table:
        with initial_policy(self.references.model):
            examples, dropped = self.drawer.with_anchors((shard,), rows, examples)
        usable = [example for example in examples if example.anchor_ids]
        scores = iter(self.references.score(usable) if usable else [])
        first = shard * self.config.sampling_batch_size
        records = []
        for i, (row, example, reasons) in enumerate(zip(rows, examples, dropped, strict=True)):
            logps = next(scores) if example.anchor_ids else []
            for response, logp in enumerate(logps):
                if not is_logp(logp, len(example.responses()[response])):
                    field = "rejected" if response == 0 else f"anchors[{response - 1}]"
                    found = f"its log-probability under its reference is {logp}"
                    raise DataError(row.source, row.index, field, found, "Check that model's weights, or try float32")
            records.append(store_record(first + i, row, example, logps, self.tokenizer, reasons))
        return pa.Table.from_pylist(records, schema=SCHEMA)


def open_store(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: AnchorStore | Sequence[Row],
    config: D2OConfig,
    name: str,
    may_build: bool = True,
) -> AnchorStore:
    """The complete store of ``data``, checked against the initial ``model``.

    Makes or completes it if ``may_build``. Logs the number of rows that lost all their anchors to the filters.

    Raises:
        D2OError: the store is missing or incomplete and may not be made; no row has any anchors.
        FingerprintError: the store was made under other conditions.
    """
    if isinstance(data, AnchorStore):
        store, rows = data, data.rows()
        store.check(expected_fingerprint(model, tokenizer, rows, config))
        store.check_content(rows, tokenizer, config, vocabulary_size(model))
    elif may_build:
        with contextlib.closing(_Progress(name)) as progress:
            store = build_store(model, tokenizer, data, config, anchors_folder(config, name), progress)
    else:
        fingerprint = expected_fingerprint(model, tokenizer, data, config)
        store = _opened(
            model, tokenizer, data, config, anchors_folder(config, name), fingerprint, require_complete=True
        )
    lost = store.lost()
    if not store.usable:
        raise D2OError(f"{name}: {lost}. Nothing is left; loosen the filters, or raise num_draws")
    if lost is not None:
        logger.warning("%s: %s", name, lost)
    return store


def anchors_folder(config: D2OConfig, name: str) -> Path:
    """The folder of the store ``name``: "train" or "eval"."""
    return Path(config.anchors_dir or Path(config.output_dir) / "anchors") / name


class _Progress:
    """A progress bar over rows, shown only if rows are left to do."""

    def __init__(self, name: str) -> None:
        self.name, self.bar = name, None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None and done < total:
            self.bar = tqdm(total=total, initial=done, desc=f"anchors ({self.name})", unit="prompt")
        elif self.bar is not None:
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

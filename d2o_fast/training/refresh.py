"""Online D2O: draws new anchors from the current policy, which becomes their reference.

A window of training begins every ``refresh_every`` steps or epochs. The policy at that moment draws K anchors for each
prompt of the window and scores them: log ref- of these anchors. The negatives keep their score in the store, log ref+.
The first window uses the store's anchors, because the policy is then the initial model.

The anchors are kept in ``<output_dir>/refreshed/step-N`` (files as in ``anchors/shards.py``), because a run resumed in
the middle of a window no longer has the policy that drew them. ``sampling_seed``, the step and the shard seed the
draws, so a run resumed at or before the beginning of a window draws the same anchors again.

K anchors of one prompt.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn
from transformers import PreTrainedTokenizerBase

from d2o_fast.anchors.drawing import Drawer
from d2o_fast.anchors.references import reference_names
from d2o_fast.anchors.scoring import reference_logps
from d2o_fast.anchors.shards import SCHEMA, begin, shard_name, write_shard
from d2o_fast.anchors.store import AnchorStore, store_record
from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Example, Row
from d2o_fast.errors import D2OError
from d2o_fast.files import atomic_folder, remove
from d2o_fast.model.parts import pad_token_id
from d2o_fast.training.order import PromptOrder

logger = logging.getLogger("d2o_fast")


class RefreshedAnchors:
    """The anchors of one window's prompts, without the prompts that lost all anchors to the filters.

    Args:
        indices: the data indices of the prompts, in the order of ``store``.
        store: the window's store.
    """

    def __init__(self, indices: Sequence[int], store: AnchorStore) -> None:
        self.digest = _content_digest(Path(store.folder))
        self._examples = store.examples()
        self._index = {indices[row]: i for i, row in enumerate(store.usable)}

    def __contains__(self, place: int) -> bool:
        return place in self._index

    def example(self, place: int) -> Example:
        """The prompt at index ``place`` of the data with its negative, its new anchors and the scores."""
        return self._examples[self._index[place]]

    def metrics(self) -> dict[str, float]:
        """``refresh/...``: number of anchors, mean length in tokens, mean log-probability in nats."""
        lengths = [len(ids) for example in self._examples for ids in example.anchor_ids]
        logps = [logp for example in self._examples for logp in example.ref_logps[1:]]
        count = max(1, len(lengths))
        return {
            "refresh/anchors": len(lengths),
            "refresh/mean_length": sum(lengths) / count,
            "refresh/logps": sum(logps) / count,
        }


class Refresher:
    """Draws the anchors of windows, loads them and removes old ones.

    Args:
        model: the policy in training; an adapter stays active.
        rows: the training data.
        examples: the rows as token ids, with the scores of ``store``.
        shared: whether prompts can be read once for all their responses if dropout is off.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: D2OConfig,
        store: AnchorStore,
        rows: Sequence[Row],
        examples: Sequence[Example],
        order: PromptOrder,
        shared: bool,
    ) -> None:
        self.model, self.decoder, self.tokenizer, self.config, self.shared = model, decoder, tokenizer, config, shared
        self.store, self.rows, self.examples, self.order = store, rows, examples, order
        self.folder = Path(config.output_dir) / "refreshed"
        self.drawer = Drawer(model, tokenizer, config, store.fingerprint["stop_token_ids"])

    def draw(self, step: int) -> RefreshedAnchors:
        """Draws and scores the anchors of the window that begins at ``step`` under the current policy.

        Raises:
            D2OError: a score is not finite; no prompt keeps any anchor.
        """
        indices, size = self._indices(step), self.config.sampling_batch_size
        with atomic_folder(self.folder / f"step-{step}") as folder:
            fingerprint = {**self.store.fingerprint, "refreshed_at": step}
            counts = {"num_rows": len(indices), "num_shards": -(-len(indices) // size)}
            begin(folder, {"fingerprint": fingerprint, **counts, "references": reference_names(self.config)})
            for shard, start in enumerate(range(0, len(indices), size)):
                records = self._drawn(step, shard, indices[start : start + size])
                write_shard(folder, shard, pa.Table.from_pylist(records, schema=SCHEMA))
        window = self.load(step)
        self._report_lost(step, indices, [place for place in indices if place not in window])
        return window

    def load(self, step: int) -> RefreshedAnchors:
        """The window that ``draw`` made at ``step``.

        Raises:
            D2OError: the window is missing or damaged.
        """
        folder, indices = self.folder / f"step-{step}", self._indices(step)
        try:
            store = AnchorStore.open(folder)
        except D2OError as error:
            raise D2OError(
                f"{error}. This window was drawn by a policy that is gone, and nothing makes it again: give the run "
                f"its folder back, or resume from a checkpoint up to step {step}"
            ) from error
        if store.num_rows != len(indices):
            raise D2OError(f"{folder} holds {store.num_rows} prompts, and the window of step {step} has {len(indices)}")
        return RefreshedAnchors(indices, store)

    def keep(self, steps: Iterable[int]) -> None:
        """Removes all windows except those that begin at ``steps``, and the leftovers of a killed writer."""
        names = {f"step-{step}" for step in steps}
        for path in self.folder.glob("*step-*"):
            if path.name not in names:
                remove(path)

    def _indices(self, step: int) -> list[int]:
        """Data indices of the window's prompts, without prompts whose anchors came with the data."""
        return [i for i in self.order.prompts_of_window(step) if self.rows[i].anchors is None]

    def _drawn(self, step: int, shard: int, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows, known = [self.rows[i] for i in indices], [self.examples[i] for i in indices]
        bare = [replace(example, anchor_ids=[], ref_logps=[]) for example in known]
        drawn, dropped = self.drawer.with_anchors(("refresh", step, shard), rows, bare)
        pad, usable = pad_token_id(self.tokenizer), [example for example in drawn if example.anchor_ids]
        scores = iter(reference_logps(self.decoder, self.model, usable, self.config, pad, self.shared))
        first, records = shard * self.config.sampling_batch_size, []
        for i, (row, old, new, reasons) in enumerate(zip(rows, known, drawn, dropped, strict=True)):
            logps = next(scores)[1:] if new.anchor_ids else []
            if not all(map(math.isfinite, logps)):
                raise D2OError(
                    f"step {step}: the anchors drawn anew for {row.source}, row {row.index}, have log-probabilities of "
                    f"{logps}. Lower learning_rate, or try dtype float32"
                )
            scored = [old.ref_logps[0], *logps] if logps else []
            records.append(store_record(first + i, row, new, scored, self.tokenizer, reasons))
        return records

    def _report_lost(self, step: int, indices: Sequence[int], lost: Sequence[int]) -> None:
        if not lost:
            return
        if len(lost) == len(indices):
            raise D2OError(f"step {step}: the filters leave none of the {len(indices)} prompts an anchor. Loosen them")
        first = f"{self.rows[lost[0]].source}, row {self.rows[lost[0]].index}"
        text = (
            "step %d: %d of %d prompts, the first %s, lost all new anchors to the filters and keep those of the store"
        )
        logger.warning(text, step, len(lost), len(indices), first)


def _content_digest(folder: Path) -> str:
    """SHA-256 of the shards' digests, which differs for other anchors or scores."""
    count = len(list(folder.glob("shard-*.parquet")))
    digests = [(folder / f"{shard_name(i)}.sha256").read_bytes() for i in range(count)]
    return hashlib.sha256(b"".join(digests)).hexdigest()

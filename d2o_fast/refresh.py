"""Online D2O: anchors drawn anew from the policy as it is, which becomes their reference.

Every ``refresh_every`` steps a window of training begins. For the prompts of its steps, and no others, K anchors are
drawn from the policy at that moment and scored under it: log ref- of these anchors. The negatives keep the score that
they have in the store, log ref+. The first window is the store's: there the policy is the initial model.

What was drawn is kept in ``<output_dir>/refreshed/step-N`` (files as in ``shards.py``), since a run that is resumed in
the middle of a window has the policy that drew it no more. Draws are seeded by ``sampling_seed``, the step and the
batch, so that a run that is resumed at a window's beginning, or before it, draws the same ones again.

K anchors of one prompt.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn
from transformers import PreTrainedTokenizerBase

from d2o_fast.anchors import AnchorStore, store_record
from d2o_fast.batching import Example
from d2o_fast.checkpoint import atomic_folder
from d2o_fast.config import D2OConfig
from d2o_fast.data import Row
from d2o_fast.drawing import Drawer
from d2o_fast.errors import D2OError
from d2o_fast.models import pad_token_id
from d2o_fast.scoring import reference_logps
from d2o_fast.shards import SCHEMA, begin, shard_name, write_shard


class Window:
    """The anchors of one window's prompts.

    Args:
        rows: the prompts' places in the data, in the order of the window's store.
    """

    def __init__(self, step: int, rows: Sequence[int], store: AnchorStore) -> None:
        self.step, self.digest = step, _content_digest(Path(store.folder))
        self._examples = store.examples()
        self._place = {row: place for place, row in enumerate(rows)}

    def __contains__(self, row: int) -> bool:
        return row in self._place

    def example(self, row: int) -> Example:
        """The prompt at place ``row`` of the data with its negative, its fresh anchors and their scores."""
        return self._examples[self._place[row]]


class Refresher:
    """Draws windows and finds them again.

    Args:
        model: the policy that is being trained; its adapter, if it has one, stays active.
        shared: whether prompts can be read once for all their responses where dropout is off.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: D2OConfig,
        store: AnchorStore,
        shared: bool,
    ) -> None:
        self.model, self.decoder, self.tokenizer, self.config, self.shared = model, decoder, tokenizer, config, shared
        self.store, self.folder = store, Path(config.output_dir) / "refreshed"
        self.drawer = Drawer(model, tokenizer, config, store.fingerprint["stop_token_ids"])

    def draw(self, step: int, rows: Sequence[int], data: Sequence[Row], examples: Sequence[Example]) -> Window:
        """Draws and scores anchors under the policy as it is now, and puts them on the disk.

        Args:
            rows: places in the data of the prompts that are to get anchors.
            data: the whole data, ``examples`` the same as the store has them.

        Raises:
            D2OError: a score that is not finite.
        """
        size, pad = self.config.sampling_batch_size, pad_token_id(self.tokenizer)
        with atomic_folder(self.folder / f"step-{step}") as folder:
            fingerprint = {**self.store.fingerprint, "refreshed_at": step}
            begin(folder, {"fingerprint": fingerprint, "num_rows": len(rows), "num_shards": -(-len(rows) // size)})
            for shard, start in enumerate(range(0, len(rows), size)):
                part = rows[start : start + size]
                bare = [Example(examples[i].prompt_ids, examples[i].rejected_ids, [], []) for i in part]
                part_rows = [data[i] for i in part]
                drawn = self.drawer.with_anchors(f"refresh {step} {shard}", part_rows, bare)
                scores = reference_logps(self.decoder, self.model, drawn, self.config, pad, self.shared)
                records = []
                for place, (i, row, example, logps) in enumerate(zip(part, part_rows, drawn, scores, strict=True)):
                    if not all(map(math.isfinite, logps)):
                        raise D2OError(
                            f"step {step}: the anchors drawn anew for {row.source}, row {row.index}, have the "
                            f"log-probabilities {logps[1:]}. Lower learning_rate, or try dtype float32"
                        )
                    logps = [examples[i].ref_logps[0], *logps[1:]]
                    records.append(store_record(start + place, row, example, logps, self.tokenizer))
                write_shard(folder, shard, pa.Table.from_pylist(records, schema=SCHEMA))
        return self.load(step, rows)

    def load(self, step: int, rows: Sequence[int]) -> Window:
        """The window that ``draw`` made at ``step`` for ``rows``.

        Raises:
            D2OError: it is missing or damaged.
        """
        return Window(step, rows, AnchorStore.open(self.folder / f"step-{step}"))

    def keep(self, steps: Iterable[int]) -> None:
        """Removes every window but those of ``steps``, and what a killed writer left."""
        names = {f"step-{step}" for step in steps}
        for path in self.folder.glob("*step-*"):
            if path.name not in names:
                shutil.rmtree(path)

    def metrics(self, window: Window, rows: Sequence[int], seconds: float) -> dict[str, Any]:
        """What is reported of a window: ``refresh/...``."""
        responses = [window.example(row) for row in rows]
        anchors = [ids for example in responses for ids in example.anchor_ids]
        logps = [logp for example in responses for logp in example.ref_logps[1:]]
        return {
            "refresh/anchors": len(anchors),
            "refresh/mean_length": sum(map(len, anchors)) / len(anchors),
            "refresh/logps": sum(logps) / len(logps),  # nats, mean over the anchors
            "refresh/seconds": seconds,
        }


def _content_digest(folder: Path) -> str:
    """Of the shards' own digests: other anchors or scores have another one."""
    count = len(list(folder.glob("shard-*.parquet")))
    digests = [(folder / f"{shard_name(i)}.sha256").read_bytes() for i in range(count)]
    return hashlib.sha256(b"".join(digests)).hexdigest()

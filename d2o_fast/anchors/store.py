"""The content of an anchor store, read from its shards when it is asked for.

A shard is read whole and decoded where a row of it is: 0.5 ms for 16 rows of 450 tokens, 0.8 ms for 64. What was read
last stays, up to ``CACHE_BYTES``, so a store that is smaller is read once.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from d2o_fast.anchors.shards import read_shard
from d2o_fast.data.on_disk import LazySequence
from d2o_fast.data.reading import Row
from d2o_fast.forward.batch import Example

Item = TypeVar("Item")

CACHE_BYTES = 64 << 20  #: of decoded shards that a store keeps; a token takes 4


class Shards:
    """The shards of a store that were whole when it was opened.

    Args:
        size: rows of each, the last one's aside.
        digests: the SHA-256 with which each was verified; None where there is none yet.
    """

    def __init__(self, folder: Path, size: int, digests: Sequence[str | None]) -> None:
        self.folder, self.size, self.digests = folder, size, digests
        self._kept: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._bytes = 0

    def record(self, i: int, columns: tuple[str, ...]) -> dict[str, Any]:
        """Row ``i`` of the store.

        Raises:
            D2OError: its shard is gone, or not what it was when the store was opened.
        """
        shard, place = divmod(i, self.size)
        return self._table(shard, columns).slice(place, 1).to_pylist()[0]

    def records(self, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """The rows of all shards that are there, in order.

        Raises:
            D2OError: as ``record``.
        """
        for shard, digest in enumerate(self.digests):
            if digest is not None:
                yield from read_shard(self.folder, shard, digest, columns).to_pylist()

    def _table(self, shard: int, columns: tuple[str, ...]) -> pa.Table:
        key = shard, columns
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        digest = self.digests[shard]
        assert digest is not None, f"shard {shard} was not there when the store was opened"
        table = read_shard(self.folder, shard, digest, columns)
        self._bytes += table.nbytes
        self._kept[key] = table
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return table


class Stored(LazySequence[Item]):
    """What ``make`` makes of the ``columns`` of the rows at ``places`` of a store."""

    def __init__(
        self, shards: Shards, places: Sequence[int], columns: tuple[str, ...], make: Callable[[dict[str, Any]], Item]
    ) -> None:
        self._shards, self._places, self._columns, self._make = shards, places, columns, make

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, i: int) -> Item:
        return self._make(self._shards.record(self._places[i], self._columns))


EXAMPLE_COLUMNS = ("prompt_ids", "rejected_ids", "anchors_ids", "rejected_ref_logp", "anchors_ref_logps")
ROW_COLUMNS = ("source", "source_row", "chat", "sampled", "prompt", "rejected", "anchors")


def example_of(record: dict[str, Any]) -> Example:
    """Token ids and reference scores of one row (``EXAMPLE_COLUMNS``)."""
    return Example(
        record["prompt_ids"],
        record["rejected_ids"],
        record["anchors_ids"],
        [record["rejected_ref_logp"], *record["anchors_ref_logps"]],
    )


def row_of(record: dict[str, Any]) -> Row:
    """The row that was sampled for (``ROW_COLUMNS``); ``anchors`` is None where they were sampled."""
    read = json.loads if record["chat"] else str
    anchors = None if record["sampled"] else [read(anchor) for anchor in record["anchors"]]
    return Row(read(record["prompt"]), read(record["rejected"]), anchors, record["source"], record["source_row"])

"""The files of an anchor store: a manifest and shards, each whole or absent.

manifest.json                  fingerprint, number of rows and of shards, names of references; written first
shard-00000.parquet ...        ``sampling_batch_size`` rows each, in the order of the data
shard-00000.parquet.sha256     its digest, in the format of ``sha256sum -c``
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2o_fast.anchors.contents import manifest_fault, record_fault, value_fault
from d2o_fast.errors import D2OError, shortened
from d2o_fast.files import atomic_file, read_file

FORMAT = 2  #: version of the files; part of the fingerprint
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # index in the data, from 0
        ("source", pa.string()),
        ("source_row", pa.int64()),  # row of the source, from 1
        ("chat", pa.bool_()),  # prompt, rejected and given anchors are messages, written as JSON
        ("sampled", pa.bool_()),  # anchors were drawn, not given with the data
        ("prompt", pa.string()),
        ("rejected", pa.string()),
        ("anchors", pa.list_(pa.string())),
        ("prompt_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("anchors_ids", pa.list_(pa.list_(pa.int32()))),
        ("rejected_ref_logp", pa.float32()),  # log ref+, summed over the response, nats; null without anchors
        ("anchors_ref_logps", pa.list_(pa.float32())),  # log ref- of each anchor
        ("prompt_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        ("anchors_tokens", pa.list_(pa.int32())),
        ("dropped", pa.list_(pa.string())),  # the reason for each dropped draw (``filters.REASONS``)
    ]
)

_SHARD = re.compile(r"shard-(\d{5,})\.parquet")
MAKE_ANEW = "remove it and its .sha256, and run `d2o sample` again to make it anew"


MOST_VALUES = 1 << 28  #: a shard with more token ids, or more bytes before compression, is not believed


def shard_name(i: int) -> str:
    """The file of shard ``i``."""
    return f"shard-{i:05d}.parquet"


def begin(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the folder; writes ``manifest`` if there is none.

    Raises:
        D2OError: as ``read_manifest``; the folder holds shards without a manifest.
    """
    if (folder / "manifest.json").exists():
        return read_manifest(folder)
    if any(folder.glob("shard-*.parquet")):
        raise D2OError(f"{folder}: shards without manifest.json; choose another anchors_dir or empty this one")
    with atomic_file(folder / "manifest.json") as file:
        file.write((json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest.

    Raises:
        D2OError: the folder or manifest is missing, or the manifest is damaged or of another format.
    """
    if not folder.is_dir():
        raise D2OError(f"{folder}: no such folder; make the anchors with `d2o sample`")
    path, fix = folder / "manifest.json", "remove the folder and sample again"
    try:
        manifest = json.loads(read_file(path))
    except FileNotFoundError as error:
        raise D2OError(f"{folder}: no manifest.json; this is not a folder that `d2o sample` made") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, D2OError):
            raise
        raise D2OError(f"{path} is damaged ({shortened(str(error), 100)}); {fix}") from error
    whole = isinstance(manifest, dict) and {"fingerprint", "num_rows", "num_shards"} <= set(manifest)
    if not (whole and isinstance(manifest["fingerprint"], dict) and "format" in manifest["fingerprint"]):
        raise D2OError(f"{path} is not a manifest of anchors; {fix}")
    if manifest["fingerprint"]["format"] != FORMAT:
        raise D2OError(
            f"{folder}: its files have format {shortened(repr(manifest['fingerprint']['format']))}, and this version "
            f"of d2o-fast reads format {FORMAT}. Choose another anchors_dir to make new ones, or use the version that "
            "made them"
        )
    fault = manifest_fault(manifest)
    if fault is not None:
        raise D2OError(f"{path}: {fault}; {fix}")
    return manifest


def write_shard(folder: Path, i: int, table: pa.Table) -> str:
    """Writes shard ``i``, whole or not at all, and returns its SHA-256."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    name, digest = shard_name(i), hashlib.sha256(data).hexdigest()
    with atomic_file(folder / f"{name}.sha256") as file:
        file.write(f"{digest}  {name}\n".encode())
    try:
        with atomic_file(folder / name) as file:  # last, so that every shard has a digest
            file.write(data)
    except D2OError:
        (folder / f"{name}.sha256").unlink()
        raise
    return digest


def check_shards(folder: Path, manifest: dict[str, Any]) -> list[str | None]:
    """The SHA-256 of every shard, verified; None for a shard that is not made yet.

    Raises:
        D2OError: as ``check_shard``; the folder holds shards that the manifest does not count.
    """
    try:
        found = sorted(int(match[1]) for name in os.listdir(folder) if (match := _SHARD.fullmatch(name)))
    except OSError as error:
        raise D2OError(f"{folder} cannot be read ({error.strerror})") from error
    digests: list[str | None] = [None] * manifest["num_shards"]
    for i in found:
        if i >= len(digests):
            raise D2OError(f"{folder / shard_name(i)} is not one of the {len(digests)} shards of the store; remove it")
        digests[i] = check_shard(folder, i, manifest)
    return digests


def check_shard(folder: Path, i: int, manifest: dict[str, Any]) -> str | None:
    """Verifies the shard and returns its SHA-256; None if the shard is not made yet.

    Raises:
        D2OError: the digest is missing, the shard is damaged, or its rows or counts are wrong.
    """
    path = folder / shard_name(i)
    if not os.path.lexists(path):
        return None
    try:
        digest = read_file(folder / f"{path.name}.sha256").decode().split()[0]
    except (FileNotFoundError, UnicodeDecodeError, IndexError) as error:
        raise D2OError(f"{path}: its digest {path.name}.sha256 is missing or damaged; {MAKE_ANEW}") from error
    fingerprint = manifest["fingerprint"]
    size, k = fingerprint["sampling_batch_size"], fingerprint["num_generations"]
    draws = fingerprint.get("num_draws") or k
    table = _table(path, _verified(path, digest), size)
    rows = list(range(i * size, min((i + 1) * size, manifest["num_rows"])))
    if table["row"].to_pylist() != rows:
        raise D2OError(f"{path} does not hold the rows {rows[0]} to {rows[-1]}; {MAKE_ANEW}")
    _refuse(path, rows, table, value_fault(table))
    _check_counts(path, rows, table, k, draws)
    _refuse(path, rows, table, record_fault(table, fingerprint))
    return digest


def _refuse(path: Path, rows: Sequence[int], table: pa.Table, fault: tuple[int, str, str] | None) -> None:
    if fault is not None:
        place, field, found = fault
        source = f"{table['source'][place].as_py()}, row {table['source_row'][place].as_py()}"
        where = f"row {rows[place]} ({shortened(repr(source), 100)}), field '{field}'"
        raise D2OError(f"{path}, {where}: {found}; {MAKE_ANEW}")


def _check_counts(path: Path, rows: Sequence[int], table: pa.Table, k: int, draws: int) -> None:
    counts = ("dropped", "anchors_ids", "anchors", "anchors_ref_logps", "anchors_tokens")
    columns = [table[name].combine_chunks().value_lengths().to_pylist() for name in counts]
    scored = table["rejected_ref_logp"].is_valid().to_pylist()
    for row, sampled, has_score, dropped, *lengths in zip(
        rows, table["sampled"].to_pylist(), scored, *columns, strict=True
    ):
        wanted = sampled and lengths[0] <= k and lengths[0] + dropped == draws
        given = not sampled and lengths[0] >= 1 and dropped == 0
        if len(set(lengths)) != 1 or not (wanted or given):
            found = f"{lengths[0]} anchors, {lengths[2]} scores and {dropped} dropped draws"
            raise D2OError(f"{path}, row {row}: {found}, of {draws} draws for {k} anchors; {MAKE_ANEW}")
        if has_score != (lengths[0] > 0):
            found = f"{lengths[0]} anchors, but {'a' if has_score else 'no'} score of the negative"
            raise D2OError(f"{path}, row {row}: {found}; {MAKE_ANEW}")


def read_shard(folder: Path, i: int, digest: str, columns: Sequence[str]) -> pa.Table:
    """``columns`` of a shard that ``check_shard`` found to have ``digest``.

    Raises:
        D2OError: the shard is missing or has changed.
    """
    data = pa.BufferReader(_verified(folder / shard_name(i), digest))
    with pq.ParquetFile(data) as file:
        return file.read(columns=list(columns), use_threads=False)


def _table(path: Path, data: bytes, size: int) -> pa.Table:
    """All columns of a shard of at most ``size`` rows; counts of the file's end are read before any column is."""
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            found, groups = file.metadata, range(file.metadata.num_row_groups)
            columns = [found.row_group(group).column(c) for group in groups for c in range(found.num_columns)]
            values = sum(column.num_values for column in columns)
            stored = sum(column.total_uncompressed_size for column in columns)
            if found.num_rows <= size and max(values, stored) <= MOST_VALUES and file.schema_arrow.equals(SCHEMA):
                return file.read(use_threads=False)
            what = f"{found.num_rows} rows, {values} values and {stored} bytes, or other columns"
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        what = shortened(str(error), 200, one_line=True)
    raise D2OError(f"{path} is no shard of this store ({what}); {MAKE_ANEW}")


def _verified(path: Path, digest: str) -> bytes:
    try:
        data = read_file(path)
    except FileNotFoundError as error:
        raise D2OError(f"{path} is missing; run `d2o sample` again to complete the store") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise D2OError(f"{path} is damaged (its SHA-256 is not the one it was written with); {MAKE_ANEW}")
    return data


CACHE_BYTES = 64 << 20  #: of decoded shards cached per store; a token takes 4


class Shards:
    """The verified shards of a store. Reads them on demand.

    Args:
        size: rows per shard; the last may have fewer.
        digests: the SHA-256 of each shard; None if the shard is not made yet.
    """

    def __init__(self, folder: Path, size: int, digests: Sequence[str | None]) -> None:
        self.folder, self.size, self.digests = folder, size, digests
        self._kept: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._bytes = 0

    def record(self, i: int, columns: tuple[str, ...]) -> dict[str, Any]:
        """Row ``i`` of the store.

        Raises:
            D2OError: its shard is missing or has changed since it was verified.
        """
        shard, place = divmod(i, self.size)
        return self._table(shard, columns).slice(place, 1).to_pylist()[0]

    def records(self, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """The rows of all shards that are made, in order.

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

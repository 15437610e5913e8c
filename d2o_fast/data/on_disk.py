"""Rows in a temporary file, and comparisons of all rows by their digests.

Memory holds 12 bytes a row (offset and size), and a digest of 16 bytes a row while rows are compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar, overload

import numpy as np

from d2o_fast.data.row import Row, row_key
from d2o_fast.errors import D2OError

Item = TypeVar("Item", covariant=True)

_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class LazySequence(Sequence[Item]):
    """A sequence that reads its items on demand. A slice is a list. Two sequences are equal if their items are.

    Subclasses implement ``__len__`` and ``_read``.
    """

    @abstractmethod
    def _read(self, i: int) -> Item:
        """The item at ``i``, from 0 to ``len(self) - 1``."""

    @overload
    def __getitem__(self, i: int) -> Item: ...

    @overload
    def __getitem__(self, i: slice) -> list[Item]: ...

    def __getitem__(self, i: int | slice) -> Item | list[Item]:
        indices = range(len(self))[i]  # handles negative indices and raises IndexError
        return self._read(indices) if isinstance(indices, int) else [self._read(place) for place in indices]

    def __iter__(self) -> Iterator[Item]:
        return map(self._read, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class RowFile(LazySequence[Row]):
    """Rows in a nameless temporary file, which the system removes when the process ends, even by a kill.

    The file is in ``TMPDIR`` and about as large as the data in JSON Lines.
    """

    def __init__(self) -> None:
        self._file = _TemporaryFile()
        self._starts, self._sizes = array("Q"), array("I")

    def append(self, row: Row) -> None:
        """Appends a row.

        Raises:
            D2OError: the file cannot be written.
        """
        text = _compact([row.prompt, row.rejected, row.anchors, row.source, row.index])
        data = text.encode("utf-8", "surrogatepass")
        self._starts.append(self._file.append(data))
        self._sizes.append(len(data))

    def __len__(self) -> int:
        return len(self._starts)

    def _read(self, i: int) -> Row:
        data = self._file.read(self._starts[i], self._sizes[i])
        return Row(*json.loads(data.decode("utf-8", "surrogatepass")))


class Subset(LazySequence[Item]):
    """The items of another sequence at ``indices``, in that order."""

    def __init__(self, whole: Sequence[Item], indices: Sequence[int]) -> None:
        self._whole, self._indices = whole, indices

    def __len__(self) -> int:
        return len(self._indices)

    def _read(self, i: int) -> Item:
        return self._whole[self._indices[i]]


def subset(items: Sequence[Item], indices: Sequence[int]) -> Sequence[Item]:
    """The items at ``indices``: a ``Subset`` of a ``LazySequence``, a list of any other sequence."""
    return Subset(items, indices) if isinstance(items, LazySequence) else [items[i] for i in indices]


class _TemporaryFile:
    """A nameless file. Bytes are appended at its end and read at any offset."""

    def __init__(self) -> None:
        with _room():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (stays open while rows are read from it)
        weakref.finalize(self, self._file.close)
        self._end, self._flushed = 0, 0

    def append(self, data: bytes) -> int:
        """Writes ``data`` at the end and returns its offset."""
        start = self._end
        with _room():
            self._file.write(data)
        self._end += len(data)
        return start

    def read(self, start: int, size: int) -> bytes:
        if self._flushed < start + size:
            with _room():
                self._file.flush()
            self._flushed = self._end
        return os.pread(self._file.fileno(), size, start)


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = tempfile.tempdir or "the folder for temporary files"
        raise D2OError(
            f"the rows cannot be written to {place} ({error.strerror}); make room there, or let TMPDIR name a folder "
            "that has it"
        ) from error


class Digests:
    """Compares texts without keeping them, by a digest of 16 bytes each."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        self._bytes += hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def distinct(self) -> int:
        """The number of different texts."""
        ordered = np.sort(self._array())
        return len(ordered) - int(np.count_nonzero(ordered[1:] == ordered[:-1]))

    def shared_with(self, other: Digests) -> int:
        """The number of different texts that are in both."""
        return len(np.intersect1d(self._array(), other._array()))

    def repeats(self) -> tuple[np.ndarray, int | None]:
        """(sorted indices of texts that repeat an earlier one, index of the text that the first repeats or None)."""
        digests = self._array()
        order = np.argsort(digests, kind="stable")
        ordered = digests[order]
        indices = np.sort(order[1:][ordered[1:] == ordered[:-1]])
        return indices, int(np.argmax(digests == digests[indices[0]])) if len(indices) else None

    def _array(self) -> np.ndarray:
        return np.frombuffer(self._bytes, dtype="S16")


def rows_digest(rows: Iterable[Row]) -> str:
    """32 digits of the SHA-256 over one JSON list with the prompt, negative and anchors of every row, in order."""
    digest = hashlib.sha256()
    for i, row in enumerate(rows):
        digest.update(((", " if i else "[") + row_key(row)).encode())
    digest.update(b"]")
    return digest.hexdigest()[:32]

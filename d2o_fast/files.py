"""A folder for one process alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from d2o_fast.errors import D2OError


@contextlib.contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """Keeps other processes from doing ``work`` in ``folder``; ends with the process, however that ends.

    Raises:
        D2OError: at once, if another one is at it.
    """
    path = folder / ".lock"
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
                raise BlockingIOError  # removed by its holder since it was opened: a new one may be held by another
        except BlockingIOError as error:
            raise D2OError(f"{folder}: another process is {work} here; wait for it or stop it") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

"""A folder for one process alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


TEMPORARY = ".tmp-"


FINAL = ".tmp-final"


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that appears as ``path``, whole and on the disk, when the block ends without an error."""
    folder = path.with_name(f"{TEMPORARY}{path.name}")
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _sync(folder)
    os.rename(folder, path)
    _fsync(path.parent)


@contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files replace those of the same names in ``folder`` when the block ends.

    Each is moved whole, the weights last.
    """
    temporary = folder / FINAL
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    yield temporary
    _sync(temporary)
    files = [path for path in temporary.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.suffix == ".safetensors", path)):
        target = folder / path.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(temporary)
    _fsync(folder)


def _sync(folder: Path) -> None:
    """Every file of ``folder``, and the folder itself, is on the disk."""
    for file in sorted(folder.rglob("*")):
        _fsync(file)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """``data`` under ``path``, whole or not at all, whenever the process or the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

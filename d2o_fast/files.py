"""Files and folders that are written whole or not at all, and locks on folders."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from d2o_fast.errors import D2OError

TEMPORARY = ".tmp-"  #: prefix of the name of an unfinished folder
FINAL = ".tmp-final"  #: name of the folder whose files are about to replace others


@contextlib.contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """Keeps other processes from doing ``work`` in ``folder``. The lock ends with the process, even by a kill.

    Raises:
        D2OError: another process has the lock; raised at once.
    """
    path = folder / ".lock"
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
                raise BlockingIOError  # its holder removed it after we opened it: another process may hold a new one
        except BlockingIOError as error:
            raise D2OError(f"{folder}: another process is {work} here; wait for it or stop it") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """An open file that appears as ``path``, whole and on the disk, when the block ends without an error.

    An error in the block leaves nothing behind. An existing ``path`` keeps its content until the block ends.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    _fsync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that appears as ``path``, whole and on the disk, when the block ends without an error."""
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


@contextlib.contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """A folder whose files replace the files of the same names in ``folder`` when the block ends.

    Each file is moved whole, the weights last.
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
    """Forces every file of ``folder``, and the folder itself, to the disk."""
    for file in sorted(folder.rglob("*")):
        _fsync(file)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files and folders that are written whole or not at all, and locks on folders.

Nothing here follows a symlink that it finds under the name of a file to be written, and nothing waits for a FIFO.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from d2o_fast.errors import D2OError

TEMPORARY = ".tmp-"  #: prefix of the name of an unfinished folder
FINAL = ".tmp-final"  #: name of the folder whose files are about to replace others

_FULL = {errno.ENOSPC, errno.EDQUOT}
#: errors of a disk; other OSErrors in a block (of a network, say) pass as they are
_DISK = {
    *(*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENXIO),
}


@contextlib.contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """Keeps other processes from doing ``work`` in ``folder``. The lock ends with the process, even by a kill.

    Raises:
        D2OError: another process has the lock (raised at once); ``.lock`` is not a regular file; the folder cannot be
            written to, or its file system has no locks.
    """
    path = folder / ".lock"
    with open(_open_lock(path), "rb", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_open_as(path, file):
                raise BlockingIOError  # its holder removed it after we opened it: another process may hold a new one
        except BlockingIOError as error:
            raise D2OError(
                f"{folder}: another process is {work} here; wait for it or stop it{_holder(file)}"
            ) from error
        except OSError as error:
            raise D2OError(
                f"{path} cannot be locked ({error.strerror}): the file system has no flock. Choose a folder on another"
            ) from error
        try:
            yield
        finally:
            if _is_open_as(path, file):
                path.unlink(missing_ok=True)


def _open_lock(path: Path) -> int:
    """Opens the file, or makes it, without changing its content."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with _explained(path):
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            descriptor = -1
    if descriptor >= 0 and stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    if descriptor >= 0:
        os.close(descriptor)
    raise D2OError(f"{path} is not a regular file, but d2o locks the folder with a file of this name; remove it")


def _is_open_as(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except OSError:  # removed, or its folder was
        return False


def _holder(file: BinaryIO) -> str:
    """The number of the process that locks ``file``, in words; empty if the system does not tell it."""
    found = os.fstat(file.fileno())
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    try:
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return ""
    # 1: FLOCK ADVISORY WRITE 4711 fe:00:1234 0 EOF
    holders = [fields[4] for fields in map(str.split, locks) if fields[5:6] == [place]]
    return f" (it is process {holders[0]})" if holders else ""


def read_file(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        FileNotFoundError: there is no such file.
        D2OError: ``path`` is a folder, FIFO or device; it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise D2OError(f"{path} is not a regular file; remove it")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise D2OError(f"{path} cannot be read ({error.strerror})") from error


def make_folder(folder: Path) -> None:
    """Makes the folder and its parents if they are missing.

    Raises:
        D2OError: it cannot be made.
    """
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Removes a file or a folder with its content, if it is there. Of a symlink, only the link is removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """An open file that appears as ``path``, whole and on the disk, when the block ends without an error.

    An error in the block leaves nothing behind. An existing ``path`` keeps its content until the block ends.

    Raises:
        D2OError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _explained(path):
        temporary.unlink(missing_ok=True)  # of a killed writer
        try:
            with open(os.open(temporary, flags, 0o666), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that appears as ``path``, whole and on the disk, when the block ends without an error.

    An error in the block leaves nothing behind.

    Raises:
        D2OError: the folder cannot be written.
    """
    folder = path.with_name(f"{TEMPORARY}{path.name}")
    with _explained(path):
        remove(folder)  # of a killed writer
        folder.mkdir(parents=True)
        try:
            yield folder
            _sync(folder)
            os.rename(folder, path)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        _fsync(path.parent)


@contextlib.contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """A folder whose files replace the files of the same names in ``folder`` when the block ends.

    Each file is moved whole, the weights last. An error in the block leaves ``folder`` as it was.

    Raises:
        D2OError: a file cannot be written.
    """
    temporary = folder / FINAL
    with _explained(folder):
        remove(temporary)
        temporary.mkdir()
        try:
            yield temporary
            _sync(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        files = [path for path in temporary.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.suffix == ".safetensors", path)):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        shutil.rmtree(temporary)
        _fsync(folder)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns an error of the disk in the block into a D2OError that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        fix = "make room there" if error.errno in _FULL else "make that possible, or choose another folder"
        raise D2OError(
            f"{path} cannot be written: {error.strerror}. Files written earlier are whole and nothing half-written is "
            f"left; {fix}, then run the same command again"
        ) from error


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

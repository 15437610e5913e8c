"""Files are written whole or not at all, a lock changes no file, and nothing goes through a symlink."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from d2o_fast import files
from d2o_fast.errors import D2OError
from d2o_fast.files import atomic_file, atomic_folder, locked, make_folder, read_file, remove, replace_files


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file outside the folder, which a symlink in the folder may name."""
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("mine")
    return tmp_path / "precious"


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


ODD: dict[str, Callable[[Path], object]] = {
    "symlink": lambda path: path.symlink_to(path.parent.parent / "precious"),
    "dangling symlink": lambda path: path.symlink_to(path.parent.parent / "absent"),
    "FIFO": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "socket": _socket,
}


# --- Locks ---


@pytest.mark.parametrize("kind", ODD)
def test_a_lock_that_is_not_a_file_is_refused(precious: Path, kind: str) -> None:
    lock = precious.parent / "run" / ".lock"
    ODD[kind](lock)
    before = lock.lstat()
    with pytest.raises(D2OError, match=r"\.lock is not a regular file.*remove it"), locked(lock.parent, "training"):
        pass
    assert precious.read_text() == "mine"
    assert os.path.samestat(lock.lstat(), before)
    assert not (precious.parent / "absent").exists()


def test_a_lock_is_never_emptied(precious: Path) -> None:
    """A hard link shares its content with the user's file."""
    lock = precious.parent / "run" / ".lock"
    os.link(precious, lock)
    with locked(lock.parent, "training"):
        assert lock.read_text() == "mine"
    assert precious.read_text() == "mine"
    assert not lock.exists()


def test_the_holder_of_a_lock_is_named(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom d2o_fast.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), 'training'):\n    print(flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        found = rf"{re.escape(str(tmp_path))}: another process is training here.*\(it is process {holder.pid}\)"
        with pytest.raises(D2OError, match=found), locked(tmp_path, "training"):
            pass
        assert (tmp_path / ".lock").exists(), "the lock of another process was removed"
    with locked(tmp_path, "training"):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: object, how: int) -> None:
        raise OSError(files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    found = r"\.lock cannot be locked \(No locks available\): .*Choose a folder on another"
    with pytest.raises(D2OError, match=found), locked(tmp_path, "training"):
        pass


def test_a_lock_that_is_passed_on_is_left_alone(tmp_path: Path) -> None:
    with locked(tmp_path, "training"):
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").write_text("of another process")
    assert (tmp_path / ".lock").read_text() == "of another process"


def test_an_error_of_the_work_under_a_lock_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="the user's own"), locked(tmp_path, "training"):
        raise PermissionError(files.errno.EACCES, "the user's own")
    assert list(tmp_path.iterdir()) == []


# --- Symlinks and other things in the way ---


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind != "folder"])
def test_a_temporary_file_is_a_new_one(precious: Path, kind: str) -> None:
    path = precious.parent / "run" / "out"
    ODD[kind](path.with_name("out.tmp"))
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()
    assert precious.read_text() == "mine"
    assert [found.name for found in path.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ODD)
def test_a_file_replaces_a_link_and_not_its_target(precious: Path, kind: str) -> None:
    path = precious.parent / "run" / "out"
    ODD[kind](path)
    if kind == "folder":
        with pytest.raises(D2OError, match="out cannot be written: Is a directory"), atomic_file(path) as file:
            file.write(b"new")
    else:
        with atomic_file(path) as file:
            file.write(b"new")
        assert path.read_bytes() == b"new"
    assert precious.read_text() == "mine"
    assert [found.name for found in path.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ODD)
def test_what_lies_under_the_name_of_an_unfinished_folder(precious: Path, kind: str) -> None:
    run = precious.parent / "run"
    ODD[kind](run / files.FINAL)
    with replace_files(run) as temporary:
        (temporary / "README.md").write_text("card")
    assert [found.name for found in run.iterdir()] == ["README.md"]
    ODD[kind](run / ".tmp-checkpoint-1")
    with atomic_folder(run / "checkpoint-1") as folder:
        (folder / "weights").write_text("1")
    assert sorted(found.name for found in run.iterdir()) == ["README.md", "checkpoint-1"]
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("kind", ["symlink", "folder"])
def test_a_folder_of_the_name_is_kept(precious: Path, kind: str) -> None:
    path = precious.parent / "run" / "checkpoint-1"
    ODD[kind](path)
    if kind == "folder":
        (path / "weights").write_text("old")
    with pytest.raises(D2OError, match="checkpoint-1 cannot be written: "), atomic_folder(path) as folder:
        (folder / "weights").write_text("new")
    assert [found.name for found in path.parent.iterdir()] == ["checkpoint-1"]
    assert precious.read_text() == "mine"
    assert kind == "symlink" or (path / "weights").read_text() == "old"


def test_removing_a_link_leaves_its_target(precious: Path) -> None:
    run, other = precious.parent / "run", precious.parent / "other"
    other.mkdir()
    (other / "file").write_text("mine")
    (run / "link").symlink_to(other)
    (run / "folder").mkdir()
    (run / "folder" / "link").symlink_to(other)
    for name in ("link", "folder", "absent"):
        remove(run / name)
    assert list(run.iterdir()) == []
    assert (other / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["FIFO", "folder", "socket"])
def test_only_regular_files_are_read(precious: Path, kind: str) -> None:
    path = precious.parent / "run" / "in"
    ODD[kind](path)
    with pytest.raises(D2OError, match=r"in is not a regular file|in cannot be read"):
        read_file(path)
    with pytest.raises(FileNotFoundError):
        read_file(path.with_name("absent"))
    path.with_name("link").symlink_to(precious)
    assert read_file(path.with_name("link")) == b"mine"


def test_a_folder_that_is_a_file(precious: Path) -> None:
    for folder in (precious, precious / "inside"):
        with pytest.raises(D2OError, match=rf"{re.escape(str(folder))} cannot be written: "):
            make_folder(folder)


# --- A full disk ---


def test_a_file_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        found = r"out cannot be written: File too large\. Files written earlier are whole"
        with pytest.raises(D2OError, match=found), atomic_file(tmp_path / "out") as file:
            file.write(bytes(2000))
        found = r"checkpoint-1 cannot be written: File too large\. .*run the same command"
        with pytest.raises(D2OError, match=found), atomic_folder(tmp_path / "checkpoint-1") as folder:
            (folder / "weights").write_bytes(bytes(2000))
        with pytest.raises(D2OError, match="cannot be written: File too large"), replace_files(tmp_path) as temporary:
            (temporary / "out").write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "old")]

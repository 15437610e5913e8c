"""Many processes read one finished store at a time; one that is not finished is made by one process."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from d2o_fast.cli import main as d2o
from helpers import DEADLINE
from stores import contents
from tiny import save_tiny, tiny_rows

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["d2o_fast.training.trainer", "datasets", "peft", "transformers.models.llama.modeling_llama"]
)
#: what changes files, as Python reports it (an "open" is looked at closer)
CHANGES = {
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.chmod",
    "os.utime",
    "os.link",
    "os.symlink",
    "os.truncate",
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A settings file whose stores are finished."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(12)))
    values = {
        **{"model_name_or_path": save_tiny(folder / "model"), "dataset_name": str(folder / "rows.jsonl")},
        **{"max_length": 64, "max_completion_length": 8, "num_generations": 3, "sampling_batch_size": 2},
        **{"eval_fraction": 0.2, "max_steps": 2, "learning_rate": 0.001, "anchors_dir": str(folder / "anchors")},
    }
    (folder / "d2o.yaml").write_text(yaml.safe_dump(values))
    assert d2o(["sample", str(folder / "d2o.yaml"), "--output_dir", str(folder / "unused")]) == 0
    return folder / "d2o.yaml"


def _run(arguments: list[str], output: str, untouched: str | None) -> None:
    """``d2o`` in a process of its own, its output in a file. It may change nothing under ``untouched``."""

    def refuse_changes(event: str, found: tuple[Any, ...]) -> None:
        if event == "open":
            writes = isinstance(found[2], int) and found[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        else:
            writes = event in CHANGES
        if writes and any(str(place).startswith(str(untouched)) for place in found):
            raise OSError(30, "Read-only file system")

    if untouched is not None:
        sys.addaudithook(refuse_changes)
    with open(output, "w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        sys.exit(d2o(arguments))


def _at_once(commands: list[list[str]], tmp_path: Path, untouched: Path | None = None) -> list[tuple[int, str]]:
    """(exit code, output) of each command; all run at the same time."""
    names = [str(tmp_path / f"{i}.log") for i in range(len(commands))]
    processes = [
        FORK.Process(target=_run, args=(command, name, None if untouched is None else str(untouched)))
        for command, name in zip(commands, names, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE)
        assert process.exitcode is not None, "the process hangs"
    return [(int(p.exitcode or 0), Path(name).read_text()) for p, name in zip(processes, names, strict=True)]


def _state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_six_trainings_on_one_finished_store(settings: Path, tmp_path: Path) -> None:
    anchors = settings.parent / "anchors"
    before = _state(anchors)
    commands = [["train", str(settings), "--output_dir", str(tmp_path / str(i))] for i in range(6)]
    done = _at_once(commands, tmp_path)
    assert [code for code, _ in done] == [0] * 6, [text for code, text in done if code]
    assert _state(anchors) == before
    assert len({(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(6)}) == 1


@pytest.mark.slow
def test_a_store_that_may_not_be_written_to(settings: Path, tmp_path: Path) -> None:
    anchors = Path(shutil.copytree(settings.parent / "anchors", tmp_path / "anchors"))
    for path in [*anchors.rglob("*"), anchors]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    commands = [
        ["train", str(settings), "--anchors_dir", str(anchors), "--output_dir", str(tmp_path / "out")],
        ["sample", str(settings), "--anchors_dir", str(anchors), "--output_dir", str(tmp_path / "out2")],
        ["anchors", "inspect", str(anchors)],
        ["anchors", "export", str(anchors / "train"), str(tmp_path / "out.jsonl")],
    ]
    done = _at_once(commands, tmp_path, untouched=anchors)
    assert [code for code, _ in done] == [0] * 4, [text for code, text in done if code]
    for path in [anchors, *anchors.rglob("*")]:
        path.chmod(0o755)
    (anchors / "train" / "shard-00001.parquet").unlink()
    [(code, text)] = _at_once(commands[1:2], tmp_path, untouched=anchors)
    assert code == 2
    assert ".lock cannot be written: Read-only file system" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_six_at_once_on_a_store_that_is_not_finished(settings: Path, tmp_path: Path) -> None:
    """One makes the anchors. Each of the others is refused at once, or finds them made. The bits are the same."""
    anchors = tmp_path / "anchors"
    command = ["sample", str(settings), "--anchors_dir", str(anchors), "--output_dir", str(tmp_path / "out")]
    done = _at_once([command] * 6, tmp_path)
    assert {code for code, _ in done} <= {0, 2}
    assert any(code == 0 for code, _ in done)
    for code, text in done:
        assert "Traceback" not in text
        assert code == 0 or "another process is making anchors here; wait for it or stop it" in text
    for name in ("train", "eval"):
        assert contents(anchors / name) == contents(settings.parent / "anchors" / name)
    assert d2o(command) == 0

"""Checkpoints that are whole or absent, even if the process is killed at any instant.

    output_dir/
      checkpoint-N/                    written to the disk as .tmp-checkpoint-N, then renamed
        model.safetensors, config.json (or adapter_model.safetensors, adapter_config.json): ``save_pretrained``
        optimizer.pt                   AdamW's state
        rng_state.pth                  dropout's generators, and the metrics since the last log line
        trainer_state.json             ``TrainerState``: position in the data, counters, digests, settings
        SHA256SUMS                     a digest of every other file, in the format of ``sha256sum``

A checkpoint is verified before anything of it is used.
The schedule and the order of the prompts depend only on the settings and the step, so they need no state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError

from d2o_fast.errors import D2OError, shortened
from d2o_fast.files import FINAL, TEMPORARY, atomic_folder, remove

PREFIX = "checkpoint-"
SUMS = "SHA256SUMS"
VERSION = 2  #: of the files; 1 had no digests, and evaluated before it saved

logger = logging.getLogger("d2o_fast")


@dataclass
class TrainerState:
    """The progress of a run, saved as ``trainer_state.json``."""

    version: int = 1  #: of the checkpoint's files
    global_step: int = 0
    epoch: float = 0.0
    num_tokens: int = 0  #: tokens of the data so far, as Example.num_tokens counts them
    digests: dict[str, str] = field(default_factory=dict)  #: digests of the stores, by "train" and "eval"
    metrics: dict[str, float] = field(default_factory=dict)  #: the last metrics of training and of evaluation
    config: dict[str, Any] = field(default_factory=dict)
    shared: bool | None = None  #: whether prompts are shared; None before the first step
    #: digest of the window of refreshed anchors (``training/refresh.py``); None while the store's anchors are used
    window: str | None = None
    evaluated: int = -1  #: the step of the last evaluation
    bad_steps: int = 0  #: steps that were left out because their loss or gradient was not finite
    log: dict[str, Any] = field(default_factory=dict)  #: ``MetricLog.position``
    #: the adapter's configuration and a digest of the names and shapes that are trained
    trained: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)  #: software, device and settings that decide roundings


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in ``output_dir``, oldest first."""
    found = Path(output_dir).glob(f"{PREFIX}*")
    return sorted((path for path in found if re.fullmatch(rf"{PREFIX}\d+", path.name)), key=step_of)


def find_checkpoint(output_dir: str | Path, resume: str | bool | None) -> Path | None:
    """The verified checkpoint to continue from, or None for a fresh start. Removes the leftovers of a killed writer.

    Args:
        resume: a checkpoint's folder; "latest" or True; "auto": the latest, or a fresh start if there is none; None for
            a fresh start.

    Raises:
        D2OError: there is no checkpoint to resume from, or it is damaged; ``resume`` is not the last checkpoint of
            ``output_dir``; a fresh start would write into a folder that holds a run.
    """
    output_dir = Path(output_dir)
    for pattern in (f"{TEMPORARY}{PREFIX}*", f"{TEMPORARY}try-*", FINAL):
        for leftover in output_dir.glob(pattern):
            remove(leftover)
    existing = checkpoints(output_dir)
    if not resume or (resume == "auto" and not existing):
        _refuse_used(output_dir, existing)
        return None
    if not existing:
        raise D2OError(
            f"resume_from_checkpoint is {resume!r} but {output_dir} holds no checkpoint; leave it out to start, or "
            "write 'auto', which starts where there is nothing to continue"
        )
    path = existing[-1] if resume in (True, "latest", "auto") else _named(output_dir, existing, str(resume))
    _refuse_damaged(path, existing)
    return path


def _named(output_dir: Path, existing: list[Path], resume: str) -> Path:
    path = Path(resume).expanduser()
    if not path.is_dir():
        raise D2OError(f"resume_from_checkpoint '{path}' is not a folder; {output_dir} has {_names(existing)}")
    if path.resolve() not in [other.resolve() for other in existing]:
        raise D2OError(
            f"resume_from_checkpoint '{path}' is not a checkpoint of output_dir '{output_dir}' ({_names(existing)}); "
            "set output_dir to the folder that holds it"
        )
    later = [other for other in existing if step_of(other) > step_of(path)]
    if later:
        raise D2OError(
            f"resume_from_checkpoint '{path}': {output_dir} also holds {_names(later)}, which the resumed run would "
            "write again; move or remove these first, or resume from 'latest'"
        )
    return path


def _refuse_damaged(path: Path, existing: list[Path]) -> None:
    fault = fault_of(path)
    if fault is None:
        return
    older = [other for other in existing if step_of(other) < step_of(path)]
    whole = next((other for other in reversed(older) if fault_of(other) is None), None)
    newer = _names([other for other in existing if whole is None or step_of(other) > step_of(whole)])
    advice = (
        f"The newest whole checkpoint is '{whole}': move {newer} away, then resume from 'latest'"
        if whole is not None
        else f"No checkpoint in {path.parent} is whole: move {newer} away and start again; finished anchors are kept"
    )
    raise D2OError(f"{path} is damaged: {fault}. {advice}")


def fault_of(path: Path) -> str | None:
    """The first fault of the checkpoint at ``path`` in words; None if every file has its digest.

    A checkpoint of a version without digests has none to compare. A warning says so.
    """
    if not path.is_dir():
        return "it is not a folder"
    if not (path / SUMS).is_file():
        return _fault_without_sums(path)
    try:
        text = (path / SUMS).read_text()
        if not text.endswith("\n"):
            return f"{SUMS} is cut"
        lines = text.splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        return f"{SUMS} cannot be read ({error})"
    for name in sorted({"trainer_state.json", *sums}):
        file = path / name
        if not file.is_file() or file.is_symlink():
            return f"{name} is missing or no file"
        try:
            same = name in sums and _sha256(file) == sums[name]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if not same:
            return f"{name} is not the file that was written (its SHA-256 differs from {SUMS})"
    found = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}
    unknown = sorted(name for name in found - {SUMS, *sums} if not name.startswith("."))
    return f"{unknown[0]} is not in {SUMS}; move it out" if unknown else None


def _fault_without_sums(path: Path) -> str | None:
    if (path / SUMS).exists() or not (path / "trainer_state.json").is_file():
        return f"{SUMS} and trainer_state.json are not both files"
    try:
        state = load_state(path)
    except D2OError as error:
        return str(error)
    if state.version > 1:
        return f"{SUMS} is missing"
    logger.warning("%s was written by an older version, without digests: its files cannot be verified", path)
    return None


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _refuse_used(output_dir: Path, existing: list[Path]) -> None:
    if existing:
        raise D2OError(
            f"output_dir '{output_dir}' already holds {_names(existing)}. Continue with resume_from_checkpoint "
            "'latest', or choose another output_dir"
        )
    for name in ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"):
        if (output_dir / name).exists():
            raise D2OError(
                f"output_dir '{output_dir}' already holds a trained model ({name}); choose another output_dir, or "
                "move the model away"
            )


def save_checkpoint(
    output_dir: str | Path,
    state: TrainerState,
    save_model: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    rng: dict[str, Any],
    extra: dict[str, Any],
    limit: int | None,
) -> Path:
    """Writes ``checkpoint-<state.global_step>``, then removes the oldest checkpoints beyond ``limit``.

    Args:
        rng: the generators' states, from ``rng_state``.
        extra: tensors and numbers to save in rng_state.pth beside the generators.

    Raises:
        D2OError: the disk is full or cannot be written.
    """
    path = Path(output_dir) / f"{PREFIX}{state.global_step}"
    try:
        with atomic_folder(path) as folder:
            save_model(folder)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            torch.save({**rng, **extra}, folder / "rng_state.pth")
            (folder / "trainer_state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n")
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            sums = "".join(f"{_sha256(file)}  {file.relative_to(folder)}\n" for file in files)
            (folder / SUMS).write_text(sums)
    except (OSError, RuntimeError, SafetensorError) as error:  # the writers of weights and tensors raise the last two
        free = shutil.disk_usage(output_dir).free / 2**30
        found = shortened(str(error), 300, one_line=True)
        raise D2OError(
            f"{path} cannot be written ({found}; {free:.1f} GiB are free). Nothing of it is left. {safe(output_dir)}"
        ) from error
    for old in checkpoints(output_dir)[: -limit if limit else 0]:
        # Renamed first, so that a kill during the removal leaves no half checkpoint under a valid name.
        doomed = old.with_name(f"{TEMPORARY}{old.name}")
        os.rename(old, doomed)
        remove(doomed)
    return path


def safe(output_dir: str | Path) -> str:
    """The saved state of a run and how to go on, in words."""
    existing = checkpoints(output_dir)
    if not existing:
        return "No checkpoint was written yet; finished anchors are kept, and the same command goes on from them"
    return f"{existing[-1]} is saved; continue with --resume_from_checkpoint latest"


def load_state(path: Path) -> TrainerState:
    """Reads the state of the checkpoint at ``path``.

    Raises:
        D2OError: ``path`` is not a checkpoint of this program.
    """
    file = path / "trainer_state.json"
    try:
        found = json.loads(file.read_bytes())
        state = TrainerState(**found)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise D2OError(f"{path} is not a checkpoint of d2o-fast: trainer_state.json: {error}") from error
    for name, kind in get_type_hints(TrainerState).items():
        if not _is_a(getattr(state, name), kind):
            found = shortened(repr(getattr(state, name)), 60, one_line=True)
            raise D2OError(f"{file}: {name} is {found}, which no run writes; give the checkpoint its file back")
    position = state.log and {name: type(value) for name, value in state.log.items()}
    if not {"max_steps", "num_train_epochs"} <= set(state.config) or position not in (
        {},
        {"bytes": int, "sha256": str},
    ):
        raise D2OError(f"{file}: config or log is not complete; give the checkpoint its file back")
    if state.version > VERSION:
        raise D2OError(f"{file}: version {state.version} is newer than this d2o-fast reads ({VERSION}); update it")
    if state.global_step != step_of(path) or state.num_tokens < 0:
        raise D2OError(f"{file}: it is of step {state.global_step}, and the folder is of step {step_of(path)}")
    return state


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is dict:
        item = get_args(kind)[1]
        return isinstance(value, dict) and (item is Any or all(_is_a(part, item) for part in value.values()))
    if get_args(kind):
        return any(_is_a(value, part) for part in get_args(kind))
    if kind is NoneType:
        return value is None
    return type(value) is kind or (kind is float and type(value) is int)


def load_tensors(path: Path, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Restores the optimizer and the generators; returns the sums of the metrics since the last log line.

    Raises:
        D2OError: a file cannot be read or belongs to another model.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with _named_file(path / "optimizer.pt"):
        found = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        if not found["state"]:
            raise ValueError("it holds no moments, and a step was made")
        for i, moments in found["state"].items():
            shapes = {tuple(moments[name].shape) for name in ("exp_avg", "exp_avg_sq")}
            if shapes != {tuple(parameters[i].shape)}:
                raise ValueError(f"the moments of parameter {i} have another shape")
        optimizer.load_state_dict(found)
    with _named_file(path / "rng_state.pth"):
        extra = torch.load(path / "rng_state.pth", map_location="cpu", weights_only=True)
        torch.set_rng_state(extra.pop("cpu"))
        cuda = extra.pop("cuda")
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda[: torch.cuda.device_count()])  # a machine may have fewer
        sums = torch.cat([extra["sums"], torch.tensor([extra["num_prompts"]], dtype=torch.float64)])
    return sums


@contextlib.contextmanager
def _named_file(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        found = shortened(str(error) or type(error).__name__, 200, one_line=True)
        raise D2OError(f"{file} cannot be used: {found}. Resume from another checkpoint") from error


def rng_state() -> dict[str, Any]:
    """The states of the global generators, which dropout uses."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def step_of(path: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(path.name.removeprefix(PREFIX))


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)

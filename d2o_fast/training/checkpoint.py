"""Checkpoints that are whole or absent, even if the process is killed at any instant.

    output_dir/
      checkpoint-N/                    written to the disk as .tmp-checkpoint-N, then renamed
        model.safetensors, config.json (or adapter_model.safetensors, adapter_config.json): ``save_pretrained``
        optimizer.pt                   AdamW's state
        rng_state.pth                  dropout's generators, and the metrics since the last log line
        trainer_state.json             ``TrainerState``: position in the data, counters, digests, settings

The schedule and the order of the prompts depend only on the settings and the step, so they need no state.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from d2o_fast.config import D2OConfig, fixed
from d2o_fast.errors import D2OError
from d2o_fast.files import FINAL, TEMPORARY, atomic_folder
from d2o_fast.forward.sharing import Sharing

PREFIX = "checkpoint-"


@dataclass
class TrainerState:
    """The progress of a run, saved as ``trainer_state.json``."""

    global_step: int = 0
    epoch: float = 0.0
    num_tokens: int = 0  #: tokens of the data so far, as Example.num_tokens counts them
    digests: dict[str, str] = field(default_factory=dict)  #: digests of the stores, by "train" and "eval"
    metrics: dict[str, float] = field(default_factory=dict)  #: the last metrics of training and of evaluation
    config: dict[str, Any] = field(default_factory=dict)
    shared: bool | None = None  #: whether prompts are shared; None before the first step
    #: digest of the window of refreshed anchors (``training/refresh.py``); None while the store's anchors are used
    window: str | None = None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints in ``output_dir``, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name)]
    return sorted(found, key=step_of)


def find_checkpoint(output_dir: str | Path, resume: str | bool | None) -> Path | None:
    """The checkpoint to continue from, or None for a fresh start. Removes the leftovers of a killed writer.

    Args:
        resume: a checkpoint's folder, "latest" or True; None for a fresh start.

    Raises:
        D2OError: there is no checkpoint to resume from; ``resume`` is not the last checkpoint of ``output_dir``; a
            fresh start would write into a folder that holds a run.
    """
    output_dir = Path(output_dir)
    for leftover in (*output_dir.glob(f"{TEMPORARY}{PREFIX}*"), *output_dir.glob(FINAL)):
        shutil.rmtree(leftover)
    existing = checkpoints(output_dir)
    if not resume:
        _refuse_used(output_dir, existing)
        return None
    if not existing:
        raise D2OError(
            f"resume_from_checkpoint is {resume!r} but {output_dir} holds no checkpoint; leave it out to start"
        )
    if resume is True or resume == "latest":
        return existing[-1]
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
    extra: dict[str, Any],
    limit: int | None,
) -> Path:
    """Writes ``checkpoint-<state.global_step>``, then removes the oldest checkpoints beyond ``limit``.

    Args:
        extra: tensors and numbers to save in rng_state.pth beside the generators.
    """
    path = Path(output_dir) / f"{PREFIX}{state.global_step}"
    with atomic_folder(path) as folder:
        save_model(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        torch.save({**_rng_state(), **extra}, folder / "rng_state.pth")
        (folder / "trainer_state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n")
    for old in checkpoints(output_dir)[: -limit if limit else 0]:
        # Renamed first, so that a kill during the removal leaves no half checkpoint under a valid name.
        doomed = old.with_name(f"{TEMPORARY}{old.name}")
        os.rename(old, doomed)
        shutil.rmtree(doomed)
    return path


def load_state(path: Path) -> TrainerState:
    """Reads the state of the checkpoint at ``path``.

    Raises:
        D2OError: ``path`` is not a checkpoint of this program.
    """
    try:
        return TrainerState(**json.loads((path / "trainer_state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise D2OError(f"{path} is not a checkpoint of d2o-fast: trainer_state.json: {error}") from error


def check_unchanged(path: Path, state: TrainerState, config: D2OConfig) -> None:
    """Refuses other settings of training than the checkpoint's. The stores' digests cover the settings of the data.

    Raises:
        D2OError: a setting that a resumed run keeps differs from the checkpoint's.
    """
    before, now = fixed(state.config), fixed(json.loads(json.dumps(dataclasses.asdict(config))))
    changed = [name for name in before if before[name] != now.get(name)]
    if changed:
        lines = "\n".join(f"  {name}: {before[name]!r} in the checkpoint, now {now.get(name)!r}" for name in changed)
        raise D2OError(f"{path} cannot be continued under other settings:\n{lines}\nSet these back, or start anew")


def check_digest(path: Path, state: TrainerState, name: str, digest: str, source: str) -> None:
    """Refuses another store than the checkpoint's.

    Raises:
        D2OError: the store at ``source`` is not the one that the checkpoint was trained with.
    """
    if state.digests.get(name) != digest:
        raise D2OError(
            f"{path} was trained with other {name} anchors and references (digest {state.digests.get(name)}) than "
            f"those in {source} (digest {digest}). A resumed run never makes new ones: give it the old ones back"
        )


def check_window(path: Path, state: TrainerState, digest: str) -> None:
    """Refuses other refreshed anchors than the checkpoint's.

    Raises:
        D2OError: the window's anchors on the disk are not the ones that the checkpoint was trained with.
    """
    if state.window != digest:
        raise D2OError(
            f"{path} was trained with other anchors than those in {path.parent / 'refreshed'} (digest {state.window}, "
            f"found {digest}). The policy that drew them is gone: give the run its folder back, or start anew"
        )


def check_sharing(path: Path, state: TrainerState, sharing: Sharing) -> None:
    """Refuses a change between shared and separate prompts.

    Raises:
        D2OError: the run shared prompts and would no longer, or the other way round.
    """
    if state.shared is not None and state.shared != sharing.on:
        before = "read each prompt once for all its responses" if state.shared else "read one row per response"
        raise D2OError(
            f"{path} {before}, and here it would be: {sharing.text}. The run would go on with other roundings: "
            "continue it where it was started, or start anew with shared_prefix set"
        )


def load_tensors(path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores the optimizer and the generators; returns the ``extra`` of ``save_checkpoint``."""
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    extra = torch.load(path / "rng_state.pth", map_location="cpu", weights_only=True)
    torch.set_rng_state(extra.pop("cpu"))
    cuda = extra.pop("cuda")
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
    return extra


def _rng_state() -> dict[str, Any]:
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def step_of(path: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(path.name.removeprefix(PREFIX))


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)

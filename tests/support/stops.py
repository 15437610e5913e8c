"""Training runs that are left on the way, or killed there."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from d2o_fast import D2OTrainer
from d2o_fast.training.checkpoint import SUMS
from helpers import DEADLINE


class Stop(Exception):
    """Raised by a callback to stop a run."""


def stop_at(step: int, event: str = "log") -> Callable[..., None]:
    """A callback that raises ``Stop`` at the first ``event`` at or after ``step``."""

    def callback(run: D2OTrainer, found: str, metrics: dict[str, float]) -> None:
        if found == event and run.state.global_step >= step:
            raise Stop

    return callback


def sign(checkpoint: Path) -> None:
    """Makes the digests of a checkpoint those of its files as they are."""
    files = sorted(path for path in checkpoint.iterdir() if path.name != SUMS)
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (checkpoint / SUMS).write_text("".join(sums))


def killed(command: list[str], function: str, path: Path, count: int = 1) -> None:
    """Runs ``d2o command`` until SIGKILL ends it at the ``count``-th call of ``function`` while ``path`` is there."""
    dying = [sys.executable, str(Path(__file__).with_name("dying.py")), function, str(count), str(path)]
    done = subprocess.run([*dying, *command], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == -signal.SIGKILL, f"it was not killed: {done.returncode}\n{done.stdout}{done.stderr}"

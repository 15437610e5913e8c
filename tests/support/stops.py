"""Training runs that are left on the way."""

from __future__ import annotations

from collections.abc import Callable

from d2o_fast import D2OTrainer


class Stop(Exception):
    """Raised by a callback to leave a run."""


def stop_at(step: int, event: str = "log") -> Callable[..., None]:
    """A callback that leaves at the first ``event`` at or after ``step``."""

    def callback(run: D2OTrainer, found: str, metrics: dict[str, float]) -> None:
        if found == event and run.state.global_step >= step:
            raise Stop

    return callback

"""How a run ends before its last step: a signal, or an error of the machine.

A first signal lets the step under way finish; the trainer then writes a checkpoint. A second one kills at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import torch

from d2o_fast.errors import D2OError, shortened

#: a scheduler's word, Ctrl-C, a closed terminal, and the warnings of Slurm, LSF and SGE before their time limit
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
_ADVICE = (
    ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free space. "),
    ((errno.EACCES, errno.EPERM, errno.EROFS), "The folder cannot be written: mend its rights or choose another. "),
    ((errno.EEXIST, errno.ENOTDIR), "A file has the name of a folder: choose another. "),
)
_SYSTEM = re.compile(r"os error (\d+)")  # in the errors of safetensors and tokenizers
_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)


class Stopped(SystemExit):
    """A signal ended the run after a whole step. The exit code is 128 + the signal's number, as in a shell."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class Signals:
    """Notes the signals that end a run, as a context manager. Handlers and ignored signals of others stay.

    Only the main thread can handle signals. In another thread nothing changes.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}
        self._at_once = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def check(self) -> None:
        """Raises ``Stopped`` if a signal came."""
        if self.number is not None:
            raise Stopped(self.number)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises ``Stopped`` without waiting for a step: nothing there changes the weights."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
        if self._at_once:
            raise Stopped(number)
        # Not the logger, whose lock the interrupted code may hold.
        with contextlib.suppress(OSError):  # the terminal may be gone: that is a cause of SIGHUP
            os.write(2, f"\n{signal.Signals(number).name}: the step under way is finished first\n".encode())


def explained(error: BaseException, place: str, safe: str) -> D2OError | None:
    """A full disk, a folder that cannot be written or a lack of memory in one line; None for other errors.

    Args:
        place: the part of the run that failed.
        safe: the saved state and how to go on, in words.
    """
    if isinstance(error, D2OError):
        return None
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
    ):
        found = shortened(str(error) or "out of memory", 200, one_line=True)
        return D2OError(
            f"{place}: out of memory ({found}). Lower per_device_train_batch_size or tokens_per_micro_batch, or set "
            f"gradient_checkpointing. {safe}"
        )
    system = _SYSTEM.search(str(error))
    if system and not isinstance(error, OSError):
        error = OSError(int(system[1]), os.strerror(int(system[1])))
    if isinstance(error, OSError):
        file = f"'{error.filename}': " if error.filename else ""
        advice = next((text for codes, text in _ADVICE if error.errno in codes), "")
        return D2OError(f"{place}: {file}{error.strerror or error}. {advice}{safe}")
    return None

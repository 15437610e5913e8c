"""The metrics of a run: sums on the device, means in ``metrics.jsonl``, TensorBoard and the progress bar.

The names are TRL's. Shapes: S responses, G prompts, K anchors of one prompt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from d2o_fast.config import D2OConfig
from d2o_fast.errors import D2OError
from d2o_fast.files import atomic_file
from d2o_fast.loss.layout import ResponseLayout
from d2o_fast.loss.reference import D2OOutput

logger = logging.getLogger("d2o_fast")

NAMES = (
    "loss",
    "logps/chosen",  # mean over prompts of the anchors' mean log pi(y_i), in nats
    "logps/rejected",
    "rewards/chosen",  # beta * mean over the anchors of D(y_i)
    "rewards/rejected",  # alpha * D(y_l)
    "rewards/margins",  # z
    "rewards/accuracies",  # share of prompts with z > 0
)


class PromptMeans:
    """Means of ``NAMES`` over prompts. The sums are on the device; only ``read`` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=device)  # the last counts prompts

    @torch.no_grad()
    def add(self, out: D2OOutput, layout: ResponseLayout, num_prompts: int) -> None:
        """Adds a batch. ``out.loss`` is the sum over the layout's prompts, divided by ``num_prompts``."""
        device = out.logps.device
        is_negative = layout.tensor("is_negative", device)
        num_anchors = layout.tensor("num_anchors", device)[layout.tensor("response_group", device)]
        anchors = torch.where(is_negative, 0.0, out.logps / num_anchors)
        values = (
            out.loss.detach() * num_prompts,
            anchors.sum(),
            torch.where(is_negative, out.logps, 0.0).sum(),
            out.chosen_rewards.sum(),
            out.rejected_rewards.sum(),
            out.margins.sum(),
            (out.margins > 0).sum(),
        )
        self.sums[:-1] += torch.stack([value.double() for value in values])
        self.sums[-1] += layout.num_prompts

    def read(self) -> dict[str, float]:
        """The means of all batches since the last ``reset``; NaN if there was none."""
        return dict(zip(NAMES, (self.sums[:-1] / self.sums[-1]).tolist(), strict=True))

    def reset(self) -> None:
        self.sums.zero_()


class MetricLog:
    """``metrics.jsonl`` in ``output_dir`` (an object with ``step`` per line), a progress bar, optionally TensorBoard.

    Args:
        start_step: the step of the checkpoint to continue from. Lines after it are removed, because a resumed run
            writes them again.
        position: ``position()`` when the checkpoint was written; {} for a fresh start and for older checkpoints.

    Raises:
        D2OError: the file is not a log of metrics, or lines before ``position`` were changed or removed.
    """

    def __init__(
        self, config: D2OConfig, start_step: int, num_steps: int, position: Mapping[str, Any] | None = None
    ) -> None:
        self.path = Path(config.output_dir) / "metrics.jsonl"
        if self.path.exists() and not self.path.is_file():
            raise D2OError(f"{self.path} is not a regular file; remove it")
        if position:
            _cut(self.path, position)
        else:
            _truncate(self.path, start_step)
        self.file = open(self.path, "ab")  # noqa: SIM115 - stays open for the whole run
        written = self.path.read_bytes()
        self._size, self._digest = len(written), hashlib.sha256(written)
        self.board = None
        if "tensorboard" in config.report_to:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(Path(config.output_dir) / "tensorboard")
            self.board = SummaryWriter(folder, purge_step=start_step + 1 if start_step else None)
        interval = 0.2 if sys.stderr.isatty() else 30.0  # seconds; a log file needs few lines
        self.bar = tqdm(total=num_steps, initial=start_step, desc="train", unit="step", mininterval=interval)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        # NaN is not JSON and is written as null: of steps that were left out, or of an evaluation that overflows.
        record = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = f"{json.dumps({'step': step, **record})}\n".encode()
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._size += len(line)
        self._digest.update(line)
        if self.board is not None:
            for name, value in metrics.items():
                # TensorBoard makes one page per first part of the name
                place = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                self.board.add_scalar(place, value, step)
        if "loss" in metrics:
            self.bar.set_postfix_str(
                f"loss {metrics['loss']:.4f}, margin {metrics['rewards/margins']:+.3f}, "
                f"{metrics['tokens_per_second']:,.0f} tokens/s",
                refresh=False,
            )

    def position(self) -> dict[str, Any]:
        """The lines so far: their size in bytes and their SHA-256. A checkpoint keeps it."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def sync(self) -> None:
        """Forces all lines to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def tick(self) -> None:
        """Moves the bar by a step. A run goes on where nobody reads its bar any more."""
        with contextlib.suppress(OSError):
            self.bar.update()

    def close(self) -> None:
        for file in (self.file, self.bar):
            with contextlib.suppress(OSError):  # a line that could not be written was an error then
                file.close()
        if self.board is not None:
            self.board.close()


class TokenRate:
    """Tokens per second since the last ``read``, without the time between ``pause`` and ``go``.

    The device must finish its work before ``read`` and ``pause``, because a step returns before it is computed.
    """

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self.go()

    def go(self) -> None:
        self.started = time.perf_counter()

    def pause(self) -> None:
        self.seconds += time.perf_counter() - self.started

    def read(self) -> float:
        self.pause()
        rate = self.tokens / max(self.seconds, 1e-9)
        self.tokens, self.seconds = 0, 0.0
        self.go()
        return rate


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, without an incomplete last line (its writer was killed).

    Raises:
        D2OError: another line is not a record.
    """
    lines = Path(path).read_bytes().splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n") and (number > 1 or line[:9] == b'{"step": '[: len(line)]):
            break
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise D2OError(f"{path}, line {number}: not a record of metrics; repair or remove the file") from error
        records.append(record)
    return records


def _cut(path: Path, position: Mapping[str, Any]) -> None:
    """Cuts a log to the lines that a checkpoint knows, and makes sure that these are the ones that were written."""
    size = position["bytes"]
    if not path.exists():
        if size:
            logger.warning("%s is gone: the log begins with the next step", path)
        return
    with open(path, "rb") as file:
        found = file.read(size)
    if len(found) != size or hashlib.sha256(found).hexdigest() != position["sha256"]:
        raise D2OError(
            f"{path} does not hold the lines that were written before the checkpoint: some were changed or removed. "
            "Give it back, or move it away to begin a log with the next step"
        )
    os.truncate(path, size)


def _truncate(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_log(path) if record["step"] <= last_step]
    kept = kept if last_step else []
    with atomic_file(path) as file:
        file.writelines(f"{json.dumps(record)}\n".encode() for record in kept)

"""The prompts of each step, and the windows of steps that use anchors drawn together.

Both depend only on the settings and the step, so a resumed run needs no state for them.
"""

from __future__ import annotations

import hashlib
import math

import torch

from d2o_fast.config import D2OConfig


class PromptOrder:
    """The order of ``count`` prompts. Steps are counted from 0."""

    def __init__(self, config: D2OConfig, count: int) -> None:
        self.config, self.count = config, count
        self.prompts_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(count / self.prompts_per_step)
        self._shuffled: tuple[int, torch.Tensor] | None = None  # (epoch, order) of the last call

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.config.max_steps > 0:
            return self.config.max_steps
        return math.ceil(self.config.num_train_epochs * self.steps_per_epoch)

    def prompts_of(self, step: int) -> list[int]:
        """Data indices of the step's prompts; fewer than ``prompts_per_step`` at the end of an epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._shuffled is None or self._shuffled[0] != epoch:
            digest = hashlib.sha256(f"{self.config.seed}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self._shuffled = epoch, torch.randperm(self.count, generator=generator)
        first = position * self.prompts_per_step
        return self._shuffled[1][first : first + self.prompts_per_step].tolist()

    def epoch_of(self, step: int) -> float:
        """Epochs done before ``step``; 1.5 in the middle of the second."""
        full, position = divmod(step, self.steps_per_epoch)
        return full + position * self.prompts_per_step / self.count

    def window_of(self, step: int) -> int:
        """The first step of the window of ``step``. Its anchors are drawn before it; window 0 uses the store's."""
        if not self.config.refresh_every:
            return 0
        unit = self.steps_per_epoch if self.config.refresh_strategy == "epoch" else 1
        return step - step % (self.config.refresh_every * unit)

    def prompts_of_window(self, start: int) -> list[int]:
        """Data indices of all prompts in the window that begins at step ``start``, ascending."""
        prompts: set[int] = set()
        for step in range(start, self.num_steps):
            if self.window_of(step) != start or len(prompts) == self.count:
                break
            prompts.update(self.prompts_of(step))
        return sorted(prompts)

"""Dropout of a model, switched off in training as it is in its references.

A log-ratio of a policy with dropout to a reference without any is noise: GPT-2's own 0.1 moves it by nats. An adapter
keeps its dropout, because ``lora_dropout`` asks for it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from d2o_fast.config import D2OConfig
from d2o_fast.model.parts import base_of

logger = logging.getLogger("d2o_fast")

#: Models keep the probabilities of functional dropout, skipped layers and router noise as numbers under such names.
_NOISE = re.compile("drop|jitter")


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the Hugging Face model, without the parts that an adapter added."""
    pending: list[tuple[str, nn.Module]] = [("", base_of(model))]
    while pending:
        name, module = pending.pop()
        adapted = type(module).__module__.startswith("peft.tuners")
        if not adapted:
            yield name, module
        for child, inner in module.named_children():
            if not adapted or child == "base_layer":
                pending.append((f"{name}.{child}".lstrip("."), inner))


def noise_of(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(name, module, attribute) of every number above 0 in the model that is a probability of dropout or the like."""
    found = []
    for name, module in own_modules(model):
        for attribute, value in vars(module).items():
            is_dropout = attribute == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
            if (is_dropout and value > 0) or _is_noise(attribute, value):
                found.append((f"{name}.{attribute}".lstrip("."), module, attribute))
    return found


def apply_dropout_setting(model: nn.Module, config: D2OConfig) -> None:
    """Sets all dropout of ``model`` to 0, but an adapter's, if ``config.disable_dropout``; else warns of it.

    The model's configuration keeps its values, so that they are saved with it.
    """
    found = noise_of(model)
    if config.disable_dropout:
        for _, module, attribute in found:
            setattr(module, attribute, 0.0)
        for _, module in own_modules(model):
            if isinstance(vars(module).get("config"), PreTrainedConfig) and not isinstance(module, PreTrainedModel):
                module.config = _Quiet(module.config)  # type: ignore[assignment]
    elif found:
        logger.warning(
            "disable_dropout is false: the policy in training has dropout (%s, %d in all), and its references have "
            "none. Rewards and margins are those of a noisy policy, and the first loss is not ln 2",
            f"{found[0][0]} = {getattr(found[0][1], found[0][2]):g}",
            len(found),
        )


def _is_noise(attribute: str, value: Any) -> bool:
    return isinstance(value, float) and value > 0 and _NOISE.search(attribute) is not None


class _Quiet:
    """A layer's view of the model's configuration, with all noise at 0 (Falcon's layers read their dropout there)."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_config" or name.startswith("__"):  # asked for while a copy is made
            raise AttributeError(name)
        value = getattr(self._config, name)
        return 0.0 if _is_noise(name, value) else value

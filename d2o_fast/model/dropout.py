"""Dropout of a model, switched off in training as it is in its references.

A log-ratio of a policy with dropout to a reference without any is noise: GPT-2's own 0.1 moves it by nats. An adapter
keeps its dropout, because ``lora_dropout`` asks for it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from torch import nn

from d2o_fast.config import D2OConfig
from d2o_fast.model.parts import base_of

logger = logging.getLogger("d2o_fast")

#: Models keep the probabilities of functional dropout, skipped layers and router noise as numbers under such names.
_NOISE = re.compile("drop|jitter|pdrop")


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
            if isinstance(value, float) and value > 0 and (is_dropout or _NOISE.search(attribute)):
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
    elif found:
        logger.warning(
            "disable_dropout is false: the policy in training has dropout (%s, %d in all), and its references have "
            "none. Rewards and margins are those of a noisy policy, and the first loss is not ln 2",
            f"{found[0][0]} = {getattr(found[0][1], found[0][2]):g}",
            len(found),
        )

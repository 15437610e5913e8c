"""The arguments of ``D2OTrainer``, checked before anything is loaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from d2o_fast.anchors.store import AnchorStore
from d2o_fast.checks import world_size
from d2o_fast.config import D2OConfig
from d2o_fast.data.reading import rows_from
from d2o_fast.data.row import Row
from d2o_fast.errors import D2OError, refusal
from d2o_fast.model.parts import base_of


def name_of(model: Any, args: D2OConfig) -> str:
    """The model's name for settings and card.

    Raises:
        D2OError: the settings name another model.
    """
    given = args.model_name_or_path
    if not isinstance(model, str):
        return given or base_of(model).config._name_or_path
    if given and os.path.expanduser(model) != given:
        raise refusal("model_name_or_path", given, f"left out, or the model's name that D2OTrainer is given: {model!r}")
    return model


def refuse_wrong_objects(args: Any, train_dataset: Any, peft_config: Any, callbacks: Any) -> None:
    """Refuses objects of other kinds before anything is loaded.

    Raises:
        D2OError: names the argument.
    """
    if not isinstance(args, D2OConfig):
        raise refusal("args", args, "a D2OConfig; it has the names of TrainingArguments")
    if train_dataset is None:
        raise refusal("train_dataset", None, "the negatives: rows, a datasets.Dataset, or an AnchorStore")
    if peft_config is not None and not hasattr(peft_config, "peft_type"):
        raise refusal("peft_config", peft_config, "a LoraConfig of peft")
    if not isinstance(callbacks, Sequence | None):
        raise refusal("callbacks", callbacks, "a list of functions callback(trainer, event, metrics)")
    for i, callback in enumerate(callbacks or ()):
        if not callable(callback) or isinstance(callback, type):
            raise refusal(f"callbacks[{i}]", callback, "a function callback(trainer, event, metrics)")


def rows_of(data: Any, name: str) -> AnchorStore | Sequence[Row] | None:
    """The rows of a data set in any of its forms; a store as it is."""
    return data if data is None or isinstance(data, AnchorStore) else rows_from(data, name)


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Puts ``what`` before the message of every D2OError inside."""
    try:
        yield
    except D2OError as error:
        raise D2OError(f"{what}: {error}") from error


def refuse_many_processes() -> None:
    """Refuses to run as one of several processes.

    Raises:
        D2OError: ``torchrun`` or a similar launcher started more than one process.
    """
    if world_size() > 1:
        raise D2OError(
            f"started as one of {world_size()} processes (WORLD_SIZE), but d2o-fast trains in one process on one "
            "device for now: each would train a model of its own. Start it without torchrun or with --nproc-per-node "
            "1, and choose the device with CUDA_VISIBLE_DEVICES"
        )

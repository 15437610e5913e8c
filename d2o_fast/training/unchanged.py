"""Whether a checkpoint can be continued here: its settings, data, model and the way that its steps are computed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from d2o_fast.config import D2OConfig, having
from d2o_fast.config import fixed as fixed_settings
from d2o_fast.errors import D2OError
from d2o_fast.forward.sharing import Sharing
from d2o_fast.model.parts import base_of
from d2o_fast.training.checkpoint import TrainerState

logger = logging.getLogger("d2o_fast")

_LENGTH = ("max_steps", "num_train_epochs")  #: settings that may grow when a run goes on


def check_unchanged(path: Path, state: TrainerState, config: D2OConfig) -> None:
    """Refuses other settings of training than the checkpoint's. The stores' digests cover the settings of the data.

    The length of the run is left to ``check_length``.

    Raises:
        D2OError: a setting that a resumed run keeps differs from the checkpoint's.
    """
    before, now = fixed_settings(state.config), fixed_settings(json.loads(json.dumps(dataclasses.asdict(config))))
    changed = [name for name in before if name not in _LENGTH and before[name] != now.get(name)]
    _refuse_changed(path, "other settings", {name: (before[name], now.get(name)) for name in changed})


def check_length(path: Path, state: TrainerState, before: int, now: int, in_window: bool) -> None:
    """Lets a run grow from ``before`` to ``now`` steps, and refuses that it shrinks.

    Args:
        in_window: whether the checkpoint is in the middle of a window of refreshed anchors.

    Raises:
        D2OError: the run would be shorter than before, or its window has no anchors for the new steps.
    """
    if now < before:
        raise D2OError(
            f"{path}: the run had {before} steps and would now have {now}; max_steps and num_train_epochs can only grow"
        )
    if now > before and in_window:
        raise D2OError(
            f"{path}: the run grows from {before} to {now} steps in the middle of a window of refreshed anchors, which "
            "were drawn for the old length; resume with the old length, or from a checkpoint where a window begins"
        )
    if now > before and state.config.get("lr_scheduler_type") != "constant":
        text = "%s: the run grows from %d to %d steps. The learning rate goes on as in a run of %d steps from the start"
        logger.warning(text, path, before, now, now)


def describe_trained(model: Any) -> dict[str, Any]:
    """The trained part of a model: its adapter's configuration, and a digest of its parameters' names and shapes."""
    found = [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters() if p.requires_grad]
    adapter: dict[str, Any] = {}
    for config in getattr(model, "peft_config", {}).values():
        ignored = ("base_model_name_or_path", "auto_mapping", "inference_mode", "peft_version", "revision")
        adapter |= {name: value for name, value in config.to_dict().items() if name not in ignored}
    plain = json.loads(
        json.dumps(adapter, default=lambda value: sorted(map(str, value)) if isinstance(value, set) else str(value))
    )
    digest = hashlib.sha256("\n".join(found).encode()).hexdigest()
    return {**plain, "parameters": f"{len(found)} with names and shapes {digest[:16]}"}


def check_trained(path: Path, state: TrainerState, now: Mapping[str, Any]) -> None:
    """Refuses another adapter, or other trained parameters, than the checkpoint's.

    Raises:
        D2OError: a field of the adapter's configuration or the parameters differ.
    """
    before = state.trained or now  # older versions did not keep it
    names = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    _refuse_changed(path, "another adapter or other parameters", {n: (before.get(n), now.get(n)) for n in names})


def _refuse_changed(path: Path, kind: str, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    if pairs:
        lines = "\n".join(f"  {name}: {old!r} in the checkpoint, now {new!r}" for name, (old, new) in pairs.items())
        raise D2OError(f"{path} cannot be continued under {kind}:\n{lines}\nSet these back, or start anew")


def environment(model: Any, config: D2OConfig) -> dict[str, Any]:
    """Software, device and settings that decide the roundings of a run."""
    device: torch.device = model.device
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "torch build": hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16],
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "AMX": torch.cpu._is_amx_tile_supported(),
        "attention": base_of(model).config._attn_implementation,
        "fp32 products": torch.backends.cuda.matmul.fp32_precision,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        **{name: getattr(config, name) for name in having("rounds")},
    }


def warn_of_rounding(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Says once which part of the environment is another than the checkpoint's."""
    pairs = {name: (before[name], now.get(name)) for name in before if before[name] != now.get(name)}
    if pairs:
        listed = ", ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in pairs.items())
        logger.warning(
            "%s goes on elsewhere (%s): results agree with an unbroken run to rounding, not in bits", path, listed
        )


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

"""What stands ready before the first step: the initial model, its adapter, and its anchors with their scores."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from d2o_fast.anchors.build import AnchorStore, build_store, expected_fingerprint
from d2o_fast.config import D2OConfig
from d2o_fast.data.on_disk import Digests
from d2o_fast.data.reading import Row, prompt_key, read_rows, split_by_prompt
from d2o_fast.errors import D2OError
from d2o_fast.model.adapters import adapter_base, put_adapter
from d2o_fast.model.loading import base_of, load_model, quiet_transformers, refuse_quantised

logger = logging.getLogger("d2o_fast")


def refuse_many_processes() -> None:
    """
    Raises:
        D2OError: started by ``torchrun`` or the like with more than one process.
    """
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size > 1:
        raise D2OError(
            f"started as one of {world_size} processes (WORLD_SIZE), but d2o-fast trains in one process on one device "
            "for now: each would train a model of its own. Start it without torchrun or with --nproc-per-node 1, and "
            "choose the device with CUDA_VISIBLE_DEVICES"
        )


def read_datasets(config: D2OConfig) -> tuple[Sequence[Row], Sequence[Row] | None]:
    """(training rows, held-out rows or None) as the settings name them.

    Raises:
        D2OError: no dataset_name, or both eval_dataset_name and eval_fraction.
        DataError: a fault in the data.
    """
    if config.dataset_name is None:
        raise D2OError("dataset_name is not set; give a .jsonl, .json or .parquet file, or a name on the hub")
    rows = read_rows(config.dataset_name, config.dataset_split)
    if config.eval_dataset_name is not None:
        if config.eval_fraction > 0:
            raise D2OError("eval_dataset_name and eval_fraction are both set; held-out data come from one of them")
        held_out = read_rows(config.eval_dataset_name, config.dataset_split)
        shared = Digests(map(prompt_key, rows)).shared_with(Digests(map(prompt_key, held_out)))
        if shared:
            logger.warning("%d prompts of eval_dataset_name are in dataset_name too, and trained on", shared)
        return rows, held_out
    if config.eval_fraction > 0:
        return split_by_prompt(rows, config.eval_fraction)
    return rows, None


def initial_model(config: D2OConfig, model: str | PreTrainedModel | Any) -> Any:
    """The model with fp32 master weights on the device, liger-kernel's parts in it where asked for.

    A model object is changed in place.

    Raises:
        D2OError: it cannot be loaded, is quantised, or liger-kernel cannot serve it here.
    """
    if isinstance(model, str):
        with quiet_transformers():
            model = load_model(config, model)
    base = base_of(model)
    refuse_quantised(model, "the model")
    model = model.float().to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if config.use_liger_kernel:
        _apply_liger(base)
    return model


def _apply_liger(model: PreTrainedModel) -> None:
    if model.device.type != "cuda":
        raise D2OError("use_liger_kernel needs a CUDA device, and none is here; leave it out")
    try:
        from liger_kernel.transformers.monkey_patch import (
            MODEL_TYPE_TO_APPLY_LIGER_FN,
            _apply_liger_kernel_to_instance,
        )
    except ImportError as error:
        raise D2OError(f"use_liger_kernel: {error}; pip install 'd2o-fast[gpu]'") from error
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise D2OError(f"use_liger_kernel: liger-kernel has nothing for models of type '{kind}'; leave it out")
    # The head and its loss are ours.
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)


def add_adapter(model: Any, config: D2OConfig, peft_config: Any = None) -> Any:
    """The model with a fresh adapter if one is asked for, else as it is. Its initial values are seeded by ``seed``.

    Raises:
        D2OError: peft is missing, the model has adapters already, or the configuration does not fit it.
    """
    adapters = getattr(model, "peft_config", None)
    if adapters is not None:
        if peft_config is not None or config.use_peft:
            raise D2OError("the model has an adapter already; leave peft_config and use_peft out")
        if len(adapters) > 1:
            raise D2OError(f"the model has {len(adapters)} adapters ({', '.join(adapters)}); keep the one to train")
    elif peft_config is not None or config.use_peft:
        model = _with_lora(model, config, peft_config)
    if not any(p.requires_grad for p in model.parameters()):
        raise D2OError("no parameter of the model requires a gradient; load the adapter with is_trainable=True")
    return model


def _with_lora(model: PreTrainedModel, config: D2OConfig, peft_config: Any) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise D2OError(f"LoRA needs peft ({error}); pip install 'd2o-fast[lora]'") from error
    if peft_config is None:
        peft_config = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
        )
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        try:
            return get_peft_model(model, peft_config)
        except ValueError as error:
            raise D2OError(f"LoRA does not fit {type(model).__name__}: {error}. Set lora_target_modules") from error


def load_weights(model: Any, folder: Path) -> None:
    """Puts the weights that ``save_pretrained`` wrote into ``folder`` into ``model``, in place.

    Raises:
        D2OError: they belong to another model.
    """
    try:
        if hasattr(model, "peft_config"):
            from peft import load_peft_weights, set_peft_model_state_dict

            (name,) = model.peft_config
            found = load_peft_weights(str(folder if name == "default" else folder / name), device="cpu")
            result: Any = set_peft_model_state_dict(model, found, adapter_name=name)
            if result.unexpected_keys:
                raise RuntimeError(f"unexpected keys {result.unexpected_keys[:4]}")
        else:
            # from_pretrained and not the file itself: transformers may store weights under other names than it runs.
            with quiet_transformers():
                saved = type(model).from_pretrained(folder, dtype=torch.float32)
            model.load_state_dict(saved.state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        raise D2OError(f"{folder}: its weights do not fit {type(base_of(model)).__name__}: {error}") from error


def trained_model(config: D2OConfig, folder: str) -> Any:
    """The model that ``D2OTrainer`` wrote into ``folder``; an adapter is put on the initial model, in place of its own.

    Raises:
        D2OError: there is none.
    """
    if not Path(folder, "adapter_config.json").exists():
        if Path(folder).is_dir() and not Path(folder, "config.json").exists():
            raise D2OError(f"'{folder}' holds no trained model; run `d2o train` first, or name it with --eval_model")
        return initial_model(config, folder)
    initial = config.model_name_or_path
    return put_adapter(initial_model(config, adapter_base(initial) or initial), folder)


def anchors_folder(config: D2OConfig, name: str) -> Path:
    """Where the store of ``name`` ("train" or "eval") lies."""
    return Path(config.anchors_dir or Path(config.output_dir) / "anchors") / name


def open_store(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: AnchorStore | Sequence[Row],
    config: D2OConfig,
    name: str,
    may_build: bool = True,
) -> AnchorStore:
    """The complete store of ``data``, checked against the initial ``model``; made, or completed, if it may be.

    Says how many rows have lost all their anchors to the filters.

    Raises:
        D2OError: it may not be made and is missing or incomplete; no row has any anchors.
        FingerprintError: it was made under other conditions.
    """
    store = _checked_store(model, tokenizer, data, config, name, may_build)
    lost = store.lost()
    if not store.usable:
        raise D2OError(f"{name}: {lost}. Nothing is left; loosen the filters, or raise num_draws")
    if lost is not None:
        logger.warning("%s: %s", name, lost)
    return store


def _checked_store(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: AnchorStore | Sequence[Row],
    config: D2OConfig,
    name: str,
    may_build: bool,
) -> AnchorStore:
    if not isinstance(data, AnchorStore):
        folder = anchors_folder(config, name)
        if may_build:
            with contextlib.closing(_Progress(name)) as progress:
                return build_store(model, tokenizer, data, config, folder, progress)
        store, rows = AnchorStore.open(folder), data
    else:
        store, rows = data, data.rows()  # an incomplete store has no rows to give: rows() says so
    store.check(expected_fingerprint(model, tokenizer, rows, config))
    return store


class _Progress:
    """A progress bar over rows, shown once there is something left to do."""

    def __init__(self, name: str) -> None:
        self.name, self.bar = name, None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None and done < total:
            self.bar = tqdm(total=total, initial=done, desc=f"anchors ({self.name})", unit="prompt")
        elif self.bar is not None:
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

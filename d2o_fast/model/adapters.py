"""Adapters of peft: finds them, puts them on their base, and tells the initial policy of a model with one.

A *fresh* adapter changes nothing yet: the initial policy is the model without it, and all runs on the same base share
it. Any other adapter is a part of the initial policy and stays active when that policy draws or scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from d2o_fast.config import D2OConfig
from d2o_fast.errors import D2OError, refusal
from d2o_fast.model.parts import base_of
from d2o_fast.model.whole import loading, read_json, refuse_difference, refuse_odd_files, refuse_pickled


def adapter_base(name: str) -> str | None:
    """The name of the base of the adapter in a folder or under a hub name; None if no adapter is there.

    Raises:
        OSError: no such name on the hub.
        D2OError: the adapter's configuration is damaged or names no base.
    """
    path = find_adapter_config_file(name)
    if path is None:
        return None
    base = read_json(Path(path), f"the adapter in '{Path(path).parent}'").get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise D2OError(
            f"{path} does not say which model the adapter belongs to: set base_model_name_or_path in it to a folder "
            "or a hub name"
        )
    return base


def put_adapter(base: Any, name: str, trainable: bool = False) -> Any:
    """A PeftModel: ``base`` with the adapter from a folder or hub name.

    Raises:
        D2OError: peft is missing, the adapter does not fit, or its weights are not whole.
    """
    try:
        from peft import PeftModel, load_peft_weights
    except ImportError as error:
        raise D2OError(f"the adapter in '{name}' needs peft ({error}); pip install 'd2o-fast[lora]'") from error
    what = f"the adapter in '{name}'"
    if Path(name).is_dir():
        refuse_odd_files(Path(name), what)
        refuse_pickled(Path(name), what)
    with loading(f"{what} for {type(base).__name__}", "Give the adapter's own base, or copy the adapter again"):
        held = _held_of_base(base, load_peft_weights(name, device="cpu"))  # peft may overwrite the base
        model = PeftModel.from_pretrained(base, name, is_trainable=trainable)
    refuse_tied_embedding(model)
    read_adapter(model, name, what, held)
    return model


def _held_of_base(base: Any, found: dict[str, torch.Tensor]) -> set[str]:
    """The names in an adapter's file whose tensors are, to the bit, the base's own.

    peft saves the embedding with an adapter on it.
    """
    own = {f"base_model.model.{name}": tensor for name, tensor in base.state_dict().items()}
    pairs = ((name, tensor, own.get(name.replace(".base_layer.", "."))) for name, tensor in found.items())
    return {
        name
        for name, tensor, mine in pairs
        if mine is not None and mine.shape == tensor.shape and torch.equal(mine.cpu().float(), tensor.float())
    }


def read_adapter(model: Any, folder: str | Path, what: str, held: Collection[str] = ()) -> None:
    """Reads the weights of a PeftModel's only adapter from a folder or hub name, in place.

    Args:
        held: tensors in its file that belong to the base, and may be there.

    Raises:
        D2OError: they cannot be read, a tensor is missing, or one has no place in the adapter.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    if Path(folder).is_dir():
        refuse_pickled(Path(folder), what)
    with loading(what, "They belong to another adapter, or are damaged"):
        (name,) = model.peft_config
        found = load_peft_weights(str(folder), device="cpu")
        _, wanted = adapter_of(model)
        # peft would put other tensors into the base. An adapter saved without them would then have another base.
        refuse_difference(wanted.keys() - found.keys(), found.keys() - wanted.keys() - {*held}, what)
        odd = [key for key, tensor in found.items() if not tensor.is_floating_point()]
        if odd:
            raise ValueError(f"{odd[0]} has the type {found[odd[0]].dtype}")
        set_peft_model_state_dict(model, found, adapter_name=name)


def is_fresh(model: nn.Module) -> bool:
    """Whether a PeftModel is, to the bit, the model without its adapters; True for a model without any.

    LoRA is fresh if A or B is zero and ``modules_to_save`` are unchanged. Any other adapter (DoRA, IA3, ...) counts as
    trained: the model with the adapter is a right initial policy in any case.
    """
    if not hasattr(model, "peft_config"):
        return True
    if any(config.peft_type != "LORA" for config in model.peft_config.values()):  # type: ignore[union-attr, operator]
        return False
    state: dict[str, torch.Tensor] = model.get_base_model().state_dict()  # type: ignore[operator]
    return all(_adds_nothing(name, tensor, state) for name, tensor in state.items())


def _adds_nothing(name: str, tensor: torch.Tensor, state: dict[str, torch.Tensor]) -> bool:
    module, dot, adapted = name.partition(".modules_to_save.")
    if dot:
        return tensor.equal(state[f"{module}.original_module.{adapted.partition('.')[2]}"])
    for a, b in ((".lora_A.", ".lora_B."), (".lora_embedding_A.", ".lora_embedding_B.")):
        if a in name:
            return True  # checked with its B
        if b in name:
            partner = state.get(name.replace(b, a))
            return not tensor.any() or (partner is not None and not partner.any())
    return ".lora_" not in name and ".trainable_tokens_" not in name


def initial_policy(model: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which an untrained model is the initial policy: its adapter is disabled if it is fresh."""
    if not hasattr(model, "peft_config") or not is_fresh(model):
        return contextlib.nullcontext()
    return model.disable_adapter()


def adapter_of(model: Any) -> tuple[Any, dict[str, Any]]:
    """(peft's configuration, tensors by name) of a PeftModel's only adapter. The names omit the adapter's own name.

    Raises:
        D2OError: more than one adapter.
    """
    from peft import get_peft_model_state_dict

    if len(model.peft_config) > 1:
        names = ", ".join(model.peft_config)
        raise D2OError(f"the model has {len(model.peft_config)} adapters ({names}); keep the one to train")
    ((name, config),) = model.peft_config.items()
    return config, get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def add_adapter(model: Any, config: D2OConfig, peft_config: Any = None) -> Any:
    """The model, with a fresh adapter if one is asked for. ``config.seed`` seeds the adapter's initial values.

    Raises:
        D2OError: peft is missing; the model has an adapter besides the one to train; the configuration does not fit the
            model; no parameter is trainable.
    """
    if getattr(peft_config, "is_prompt_learning", False):
        raise refusal("peft_config", peft_config, "a LoraConfig: learned prompts add tokens of their own")
    adapters = getattr(model, "peft_config", None)
    if adapters is not None:
        if peft_config is not None or config.use_peft:
            raise D2OError("the model has an adapter already; leave peft_config and use_peft out")
        if len(adapters) > 1:
            raise D2OError(f"the model has {len(adapters)} adapters ({', '.join(adapters)}); keep the one to train")
    elif peft_config is not None or config.use_peft:
        model = _with_lora(model, config, peft_config)
    refuse_tied_embedding(model)
    if not any(p.requires_grad for p in model.parameters()):
        fix = "load the adapter with is_trainable=True" if adapters else "call its requires_grad_(True)"
        raise D2OError(f"no parameter of the model requires a gradient; {fix}")
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
        what, fix = "LoRA", "Mend lora_r or lora_target_modules"
    else:
        what, fix = "peft_config", "Mend its rank or target modules"
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        with loading(what, fix, f"does not fit {type(model).__name__}"):
            return get_peft_model(model, peft_config)


def refuse_tied_embedding(model: Any) -> None:
    """Refuses an adapter on an embedding whose weight is also the head's: merged, it would change the head as well.

    Raises:
        D2OError: the model has such an adapter.
    """
    base = base_of(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    own = list(embedding.parameters())
    if len(own) > 1 and any(parameter is getattr(head, "weight", None) for parameter in own):
        raise D2OError(
            f"the adapter changes the embedding of {type(base).__name__}, whose weight is also that of the head "
            "(tie_word_embeddings): merged, it would be another model. Leave the embedding out of lora_target_modules "
            "and modules_to_save"
        )

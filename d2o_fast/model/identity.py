"""Digests of a model's or a tokenizer's content. Moving or renaming the folder does not change them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from d2o_fast.model.adapters import adapter_of, is_fresh
from d2o_fast.model.parts import base_of

# Keys of a model's configuration that do not change its log-probabilities. EOS is compared as stop_token_ids.
_NO_EFFECT = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"),
    *("_attn_implementation", "attn_implementation", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("initializer_range", "output_attentions", "output_hidden_states", "return_dict", "output_router_logits"),
}
# The same for an adapter's configuration.
_NO_EFFECT_ADAPTER = {
    *("base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version"),
    "init_lora_weights",
}


class Identity(NamedTuple):
    """Two models with equal identities give the same log-probabilities, up to rounding."""

    weights: str
    config: str
    adapter: str | None  #: weights and configuration of an adapter that is not fresh, else None


def identity_of(model: nn.Module) -> Identity:
    """The digests that identify ``model``.

    Raises:
        D2OError: several adapters, or one that learns prompts.
    """
    config, adapter = config_digest(base_of(model).config), None
    if not is_fresh(model):
        kind, tensors = adapter_of(model)
        adapter = digest([kind.peft_type, _fields(kind, _NO_EFFECT_ADAPTER), *_described(tensors)])
    return Identity(weights_digest(model), config, adapter)


def weights_digest(model: nn.Module) -> str:
    """32 digits of the SHA-256 over name, dtype, shape and bytes of every tensor in the state dict, without adapters.

    A PeftModel has the digest of the model that it wraps.
    """
    prefix: Any = model.base_model.prefix if hasattr(model, "peft_config") else None  # type: ignore[union-attr]
    tensors = {}
    for name, tensor in base_of(model).state_dict().items():
        if prefix is not None:
            if prefix in name or ".modules_to_save." in name:
                continue
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        tensors[name] = tensor
    return digest(_described(tensors))


def config_digest(config: Any) -> str:
    """Digest of the model's type and of every key of its configuration that may change its logits."""
    return digest([config.model_type, _fields(config, _NO_EFFECT)])


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of everything that decides the ids of a text, special tokens included, but not of the chat template."""
    if hasattr(tokenizer, "backend_tokenizer"):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content.pop("padding"), content.pop("truncation")  # left by the last call
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab()]
    return digest([content, tokenizer.bos_token_id, tokenizer.eos_token_id])


def digest(value: Any) -> str:
    """32 hexadecimal digits of the SHA-256 of ``value`` as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _described(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    lines = []
    for name in sorted(tensors):
        tensor = tensors[name]
        content: Any = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}")
    return lines


def _fields(config: Any, without: set[str]) -> dict[str, Any]:
    # Fields at their default are left out, so that a new version of a library may add fields.
    try:
        default = type(config)().to_dict()
    except (TypeError, ValueError):  # a class whose fields have no defaults: all fields count
        default = {}
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name not in without and "drop" not in name and (name not in default or default[name] != value)
    }

"""What a stored set of anchors and reference scores depends on, as a dict of named fields.

In: the model's weights and configuration, the rows, the tokenizer, truncation, the compute dtype, and how anchors are
drawn and filtered. Each is taken by content, so that a folder may be moved or renamed. Out: whatever belongs to
training (seed, learning rate, output folder), and what changes scores in their rounding alone (attention
implementation, batch sizes of training, fused kernels, device).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from d2o_fast.config import D2OConfig
from d2o_fast.data import Row, stop_token_ids
from d2o_fast.filters import FunctionScorer, load_scorer
from d2o_fast.models import base_of
from d2o_fast.shards import FORMAT

_SETTINGS = (
    "max_length",
    "max_completion_length",
    "truncation_mode",
    "dtype",
    "num_generations",
    "temperature",
    "top_p",
    "sampling_seed",
    "sampling_batch_size",
    "sampling_instruction",
    "drop_duplicate_anchors",
    "drop_empty_anchors",
    "drop_truncated_anchors",
    "max_anchor_overlap",
    "min_anchor_score",
)
# Keys of a model's configuration that leave its log-probabilities as they are; EOS enters by stop_token_ids.
_NO_EFFECT = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"),
    *("_attn_implementation", "attn_implementation", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("initializer_range", "output_attentions", "output_hidden_states", "return_dict"),
}


def expected_fingerprint(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], config: D2OConfig
) -> dict[str, Any]:
    """The fields under which anchors and scores of ``rows`` are valid; of a PeftModel, its base model's."""
    chat = any(not isinstance(row.prompt, str) for row in rows)
    return {
        "format": FORMAT,
        "weights": weights_digest(model),
        "model_config": _config_digest(base_of(model).config),
        "rows": _digest([[row.prompt, row.rejected, row.anchors] for row in rows]),
        "tokenizer": _tokenizer_digest(tokenizer),
        "chat_template": _digest(tokenizer.chat_template) if chat else None,
        "stop_token_ids": stop_token_ids(tokenizer, base_of(model), rows),
        "sampler": "generate" if config.server_url is None else "server",  # a server's draws come back as text
        **{name: getattr(config, name) for name in _SETTINGS},
        "num_draws": None if config.draws == config.num_generations else config.draws,
        "anchor_score": None if config.anchor_score is None else _scorer(config.anchor_score),
    }


def fingerprint_digest(fingerprint: dict[str, Any]) -> str:
    """One name for all fields: the SHA-256 of their JSON."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 (32 digits of it) over name, dtype, shape and bytes of every tensor in the state dict, adapters left out.

    A PeftModel has the digest of the model that it wraps.
    """
    prefix = _adapter_prefix(model)
    digests = {}
    for name, tensor in base_of(model).state_dict().items():
        if prefix is not None:
            if prefix in name or ".modules_to_save." in name:
                continue
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        content = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        description = f"{name} {tensor.dtype} {tuple(tensor.shape)} "
        digests[name] = description + hashlib.sha256(content).hexdigest()
    return _digest([digests[name] for name in sorted(digests)])


def _scorer(name: str) -> dict[str, Any]:
    scorer = load_scorer(name, torch.device("cpu"))
    if isinstance(scorer, FunctionScorer):
        source = scorer.source()
        return {"function": name, "source": None if source is None else _digest(source)}
    return {
        "classifier": type(scorer.model).__name__,
        "weights": weights_digest(scorer.model),
        "model_config": _config_digest(scorer.model.config),
        "tokenizer": _tokenizer_digest(scorer.tokenizer),
        "chat_template": _digest(scorer.tokenizer.chat_template),
    }


def _adapter_prefix(model: nn.Module) -> str | None:
    return model.base_model.prefix if hasattr(model, "peft_config") else None  # type: ignore[union-attr, return-value]


def _config_digest(config: Any) -> str:
    # Fields at their default are left out, so that a new version of transformers may add some.
    try:
        default = type(config)().to_dict()
    except (TypeError, ValueError):  # a class whose fields have no defaults: all of them count
        default = {}
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _NO_EFFECT and "drop" not in name and (name not in default or default[name] != value)
    }
    return _digest(fields)


def _tokenizer_digest(tokenizer: Any) -> str:
    if hasattr(tokenizer, "backend_tokenizer"):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content.pop("padding"), content.pop("truncation")  # the state of the last call
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab()]
    return _digest([content, tokenizer.bos_token_id, tokenizer.eos_token_id])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]

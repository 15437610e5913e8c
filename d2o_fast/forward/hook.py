"""Our entry in transformers' table of attention functions.

transformers looks the attention function up by name at every call. ``install`` replaces the entry that the model uses,
for the rest of the process. Without a ``SharedSequence`` in the call our entry calls the original; with one it computes
``shared_attention``. (An entry removed after the forward would be missing when activation checkpointing recomputes a
layer.)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from d2o_fast.errors import D2OError
from d2o_fast.forward.attention import shared_attention
from d2o_fast.forward.flash import choose_kernel
from d2o_fast.forward.shared_sequence import SharedSequence
from d2o_fast.model.parts import base_of

#: transformers' table has no entry "eager", because every model file brings its own. Such models get this name instead.
EAGER = "d2o_eager"


_HARMLESS = {"position_ids", "cache_position", "position_embeddings"}  # tensor arguments that do not change the result


class SharingRefused(D2OError):
    """One pass per prompt would not be exact for this model; the message says why."""


@dataclass(frozen=True)
class Call:
    """One attention call on a watched row."""

    module: nn.Module
    window: int | None
    how: str


def install(model: nn.Module) -> None:
    """Puts our entry under the name of the model's attention. A second call does nothing.

    Raises:
        SharingRefused: the implementation is neither in transformers' table nor "eager", or cannot be replaced.
    """
    base = base_of(model)
    name = base.config._attn_implementation
    if base.config.output_attentions:  # its configuration could not be saved with a name of ours
        raise SharingRefused("its output_attentions is true, and a shared row has no such weights")
    if name == "eager":
        if EAGER not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(EAGER, _entry(_eager, "eager"))
            AttentionMaskInterface.register(EAGER, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        base.set_attn_implementation(EAGER)
        if base.config._attn_implementation != EAGER:
            raise SharingRefused("it takes no attention but its own")
    elif name not in ALL_ATTENTION_FUNCTIONS:
        raise SharingRefused(f"its attention '{name}' is not in transformers' AttentionInterface")
    elif not hasattr(ALL_ATTENTION_FUNCTIONS[name], "d2o_original"):
        AttentionInterface.register(name, _entry(ALL_ATTENTION_FUNCTIONS[name], name))


def _entry(original: Callable[..., Any], implementation: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def attention(module: nn.Module, *args: Any, shared_sequence: SharedSequence | None = None, **kwargs: Any) -> Any:
        if shared_sequence is None:
            return original(module, *args, **kwargs)
        return _call(module, *args, sequence=shared_sequence, implementation=implementation, **kwargs), None

    attention.d2o_original = original  # type: ignore[attr-defined]
    return attention


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _call(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sequence: SharedSequence,
    implementation: str,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> torch.Tensor:
    """(1, T, A, D) from transformers' (1, A, T, D) queries and (1, B, T, D) keys and values."""
    if dropout > 0:
        raise SharingRefused(f"its attention has a dropout of {dropout:g}")
    if attention_mask is not None and attention_mask.numel() != 1:
        raise SharingRefused(f"it makes a mask of its own, {tuple(attention_mask.shape)}")
    if is_causal is False:
        raise SharingRefused("its attention is not causal")
    if softcap and implementation == "sdpa":
        raise SharingRefused("its attention has a softcap, which sdpa leaves out; set attn_implementation to eager")
    unknown = [name for name, value in others.items() if torch.is_tensor(value) and name not in _HARMLESS]
    if unknown:
        raise SharingRefused(f"its attention takes {', '.join(unknown)}, unknown here")
    device = query.device.type
    # Under autocast, position embeddings leave queries and keys in fp32; the values have autocast's dtype.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out, how = shared_attention(q, k, v, sequence, scale, sliding_window, softcap, choose_kernel(q, v, implementation))
    if sequence.seen is not None:
        sequence.seen.append(Call(module, sliding_window, how))
    return out.unsqueeze(0)

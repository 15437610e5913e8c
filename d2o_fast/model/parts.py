"""An unmodified Hugging Face causal language model, taken apart into decoder and head.

The fused loss computes the head's product with the hidden states. The model's own ``forward`` would build
``[tokens, vocabulary]`` logits; it is called once, on a few tokens, to prove that decoder and head give its logits.

Shapes: T tokens of a row, H hidden.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from d2o_fast.config import D2OConfig
from d2o_fast.errors import D2OError, refusal
from d2o_fast.loss.engine import Head
from d2o_fast.loss.reference import naive_linear_logprob
from d2o_fast.model.whole import loading

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows: the end of a sequence, because a padding token may have no row in the model.

    No real token sees the filler.
    """
    return int(tokenizer.eos_token_id)


def unwrapped(model: Any) -> Any:
    """The model inside wrappers of torch and accelerate (compiled, parallel); a path as a text.

    Raises:
        D2OError: something else than a model of transformers, a PeftModel, a folder or a name.
    """
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    # A compiled model passes every attribute on, so that a compiled PeftModel looks like one.
    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if inner is None:
            break
        model = inner
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise refusal("model", model, "a folder, a hub name, a model of transformers or a PeftModel")
    if "_original_forward" in model.__dict__:  # accelerate's autocast around forward
        model.forward = model.__dict__.pop("_original_forward")
    model._compiled_call_impl = None  # ``model.compile()``; every new length would compile again
    for name, part in model.named_modules():
        if "_orig_mod" in part._modules:
            raise D2OError(f"model: its part {name} is compiled; give the model as it was before torch.compile")
    return model


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, or the one inside a processor for several kinds of input.

    Raises:
        D2OError: it is neither, or has no end-of-sequence token.
    """
    found = getattr(processing_class, "tokenizer", processing_class)
    if not isinstance(found, PreTrainedTokenizerBase):
        raise refusal("processing_class", processing_class, "a tokenizer of transformers, or a processor with one")
    if found.eos_token_id is None:
        raise D2OError("processing_class: the tokenizer has no eos_token; responses could not end. Set eos_token in it")
    return found


def base_of(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a PeftModel (its adapters stay active), or the model itself.

    Raises:
        D2OError: a prompt-learning adapter, which adds its own tokens before the prompt; an adapter in a model that is
            not a PeftModel.
    """
    if not isinstance(model, nn.Module):
        raise refusal("model", model, "a model of transformers or a PeftModel")
    adapters: Any = getattr(model, "peft_config", None)
    if adapters is None:
        return model  # type: ignore[return-value]
    if any(getattr(config, "is_prompt_learning", False) for config in adapters.values()):
        raise D2OError("prompt-learning adapters (prefix, prompt or p-tuning) are not supported; use LoRA")
    if not hasattr(model, "get_base_model"):
        raise D2OError(
            f"{type(model).__name__} holds an adapter but is no PeftModel: load its base, and the adapter on it with "
            "peft.PeftModel.from_pretrained(..., is_trainable=True)"
        )
    return model.get_base_model()  # type: ignore[operator]


def vocabulary_size(model: Any) -> int:
    """The number of ids that have both an embedding and a row of the head."""
    embedding: Any = base_of(model).get_input_embeddings()
    return min(head_of(model).weight.shape[0], embedding.weight.shape[0])


def head_of(model: nn.Module) -> Head:
    """Weight, bias, softcap and logit scale of the model's head.

    Raises:
        D2OError: the head is not a plain linear layer. An adapter on it would be ignored in silence.
    """
    base = base_of(model)
    layer = base.get_output_embeddings()
    if type(layer) is not nn.Linear:
        found = "nothing" if layer is None else type(layer).__name__
        raise D2OError(
            f"the head of {type(base).__name__} is {found}, not a plain linear layer. The fused loss reads its weight "
            "directly and would ignore an adapter or a quantised form: leave lm_head out of lora_target_modules and "
            "modules_to_save, and load it unquantised"
        )
    config = base.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None):  # Cohere: logits are multiplied by it
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None):  # Granite: logits are divided by it
        scale = 1.0 / float(config.logits_scaling)
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None))), None)
    return Head(layer.weight, layer.bias, softcap, scale)


def decoder_of(model: nn.Module) -> nn.Module:
    """The model without its head: ``decoder(input_ids=...).last_hidden_state`` is (rows, T, H).

    Compares decoder and head with the whole model on a few tokens. So a model whose ``forward`` does more than
    ``head_of`` knows is refused, and never trained on other logits than its own.

    Raises:
        D2OError: the two disagree, or the model has no separate decoder.
    """
    base, head = base_of(model), head_of(model)
    decoder = base.base_model
    if decoder is base:  # Llama 4 has the prefix of a larger model
        decoder = getattr(base, "model", base)
    if decoder is base:
        raise D2OError(f"{type(base).__name__} has no decoder apart from its head; use a ...ForCausalLM class")
    base.config.return_dict, kind = True, type(base).__name__
    with evaluating(base), torch.no_grad(), loading(kind, "Use another model", "cannot read tokens"):
        tokens = torch.arange(5, device=head.weight.device)[None] % head.weight.shape[0]
        try:
            logits = base(input_ids=tokens, use_cache=False).logits[0].float()
            hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state[0]
        except Exception as error:  # a model may raise anything
            raise D2OError(f"{type(base).__name__} fails on five tokens ({type(error).__name__}: {error})") from error
        if hidden.shape[-1] != head.weight.shape[1]:
            raise D2OError(f"{type(base).__name__} does more between its decoder and its head than is known here")
        targets = logits.argmax(-1)
        expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        found = naive_linear_logprob(hidden, head.weight, targets, **head.options())
    if not expected.isfinite().all():
        raise D2OError(
            f"{type(base).__name__}: its logits are not finite ({expected.tolist()}): its weights or its configuration "
            "are damaged; load the model again from its source, or an earlier checkpoint"
        )
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 0.1
    if not torch.allclose(found, expected, atol=tolerance, rtol=tolerance):
        raise D2OError(
            f"{type(base).__name__}: its own logits differ from decoder + head (log-probabilities {expected.tolist()} "
            f"against {found.tolist()}): its forward does more to the logits than is known here"
        )
    return decoder


def refuse_quantised(model: nn.Module, what: str) -> None:
    """Refuses quantised weights. The message calls the model ``what``.

    Raises:
        D2OError: the weights are quantised.
    """
    if getattr(base_of(model), "is_quantized", False):
        raise D2OError(f"{what} is quantised; D2O takes fp32 master weights (with LoRA too): load it unquantised")


def autocast(config: D2OConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 compute over fp32 master weights if ``config.dtype`` is "bfloat16"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule is back in its previous mode."""
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

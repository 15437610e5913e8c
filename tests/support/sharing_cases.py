"""Shared prompts against one row per response: log-probabilities and all parameter gradients, model by model.

Small random models of real architectures, with scores well above 0 and windows that bind. Shapes: N response tokens.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from d2o_fast.data.row import Example
from d2o_fast.forward.batch import pack, pack_shared, response_hidden
from d2o_fast.loss.reference import naive_linear_logprob
from d2o_fast.model.parts import base_of, head_of
from helpers import relative_errors

SMALL: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
WINDOW = 4  # positions; binds in every batch used here
_GEMMA2 = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
_GEMMA3 = {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
#: name -> (model type, settings on top of ``SMALL``)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", _GEMMA2),
    "gemma2, window": ("gemma2", {**_GEMMA2, "sliding_window": WINDOW}),
    "gemma3": ("gemma3_text", _GEMMA3),
    "gemma3, window": ("gemma3_text", {**_GEMMA3, "sliding_window": WINDOW}),
    "phi3": ("phi3", {}),
    "phi3, window": ("phi3", {"sliding_window": WINDOW}),
    "olmo2": ("olmo2", {}),
}


def build(kind: str, **extra: Any) -> nn.Module:
    """A random model in fp32 with larger weights than usual: at 0.02, attention would be almost uniform."""
    settings = {**SMALL, **extra}
    implementation = {"attn_implementation": "eager"} if kind == "gemma2" else {}  # sdpa has no softcap
    if kind == "falcon":  # its head_dim follows from the others
        del settings["head_dim"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), **implementation)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0, 0.25)
                elif "norm" not in name:
                    parameter.normal_(0, 0.1)
    return model.eval()


@contextlib.contextmanager
def fp64_throughout() -> Iterator[None]:
    """Context manager: keeps norms, rotations and softmaxes of transformers in fp64, which else go through fp32."""
    to, softmax = torch.Tensor.to, nn.functional.softmax
    wide_types = (torch.float64, torch.int64)  # positions are integers

    def keep(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype in wide_types:
            args = tuple(torch.float64 if argument == torch.float32 else argument for argument in args)
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return to(self, *args, **kwargs)

    def wide(input: torch.Tensor, *args: Any, dtype: Any = None, **kwargs: Any) -> torch.Tensor:
        kwargs["dtype"] = None if input.dtype == torch.float64 else dtype
        return softmax(input, *args, **kwargs)

    def no_float(self: torch.Tensor) -> torch.Tensor:
        return to(self, torch.float64 if self.dtype in wide_types else torch.float32)

    with (
        mock.patch.object(torch.Tensor, "to", keep),
        mock.patch.object(torch.Tensor, "float", no_float),
        mock.patch.object(nn.functional, "softmax", wide),
    ):
        yield


def logps_and_gradients(
    model: nn.Module, batches: Sequence[Sequence[Example]], shared: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Response tokens' log-probabilities (N,), and gradients of a weighted sum of them, batch by batch."""
    head, decoder = head_of(model), base_of(model).base_model
    model.zero_grad()
    found = []
    for examples in batches:
        batch = (pack_shared(examples) if shared else pack(examples, 0)).to(head.weight.device)
        hidden = response_hidden(decoder, batch)
        logps = naive_linear_logprob(hidden, head.weight, batch.targets, **head.options())
        (logps * torch.cos(batch.targets + 1.0)).sum().backward()
        found.append(logps.detach())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return torch.cat(found), gradients


def single_sequences(model: nn.Module, examples: Sequence[Example]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same, one sequence at a time. A batch needs two responses, so each appears twice and counts half."""
    batches = [[Example(e.prompt_ids, response, [response], [])] for e in examples for response in e.responses()]
    logps, gradients = logps_and_gradients(model, batches, shared=False)
    lengths = [len(response) for e in examples for response in e.responses()]
    once = torch.cat([part[: len(part) // 2] for part in logps.split([2 * length for length in lengths])])
    return once, {name: gradient / 2 for name, gradient in gradients.items()}


def errors(
    found: tuple[torch.Tensor, dict[str, torch.Tensor]], true: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> tuple[float, float]:
    """Largest relative error of the log-probabilities, and that of the worst parameter gradient."""
    assert found[1].keys() == true[1].keys()
    return relative_errors(found[0], true[0])[0], max(relative_errors(found[1][n], true[1][n])[0] for n in true[1])


def random_examples(seed: int = 0) -> list[Example]:
    """Three prompts with 4, 3 and 12 responses of ragged lengths, the first prompt of a single token."""
    chance = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [chance.randrange(3, SMALL["vocab_size"]) for _ in range(n)]

    return [
        Example(tokens(prompt), tokens(chance.randint(1, 40)), [tokens(chance.randint(1, 40)) for _ in range(k)], [])
        for prompt, k in ((1, 3), (24, 2), (48, 11))
    ]

"""Heads of real architectures: the operations in place of the model's own logits, results and every gradient.

Shapes: S responses, P tokens of each prompt, R of each response, V vocabulary, H hidden. tests/model/test_models.py
checks that decoder and head are found and give the model's log-probabilities.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from d2o_fast import ResponseLayout, fused_d2o_loss, linear_logprob
from d2o_fast.loss.reference import d2o_loss
from d2o_fast.model.parts import base_of, decoder_of, head_of
from helpers import relative_errors

V, P, R = 61, 3, 4
K = (2, 1)  # anchors of the two prompts: five responses
LAYOUT = ResponseLayout.from_lengths([[R] * (1 + k) for k in K])
REFS = torch.tensor([-17.0, -16.0, -15.5, -18.0, -16.5])
LLAMA_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GPTJ_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 32}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma 2: softcap, tied": ("gemma2", LLAMA_SIZES | {"final_logit_softcapping": 1.5, "tie_word_embeddings": True}),
    "Cohere: scale, tied": ("cohere", LLAMA_SIZES | {"logit_scale": 0.3, "tie_word_embeddings": True}),
    "Granite: divides": ("granite", LLAMA_SIZES | {"logits_scaling": 3.0, "tie_word_embeddings": False}),
    "Phi: bias": ("phi", LLAMA_SIZES),
    "GPT-J: bias, a decoder of another name": ("gptj", GPTJ_SIZES),
    "Llama: plain, tied": ("llama", LLAMA_SIZES | {"tie_word_embeddings": True}),
}
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def built(name: str, dtype: torch.dtype = torch.float64, **extra: Any) -> nn.Module:
    """The model with a nonzero bias and logits far from uniform."""
    model_type, sizes = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=V, pad_token_id=0, bos_token_id=1, eos_token_id=2, **(sizes | extra)
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(20)
        if head.bias is not None:
            head.bias.normal_()
    assert decoder_of(model) is model.base_model  # it compares the two in fp32
    return model.to(dtype)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """(input ids (S, P + R), targets (S, R)); a prompt's responses share it."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, V, (len(K), P), generator=generator).repeat_interleave(torch.tensor(K) + 1, dim=0)
    responses = torch.randint(3, V, (LAYOUT.num_responses, R), generator=generator)
    return torch.cat([prompts, responses], 1), responses


def own_logps(model: nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(S, R) log-probabilities from the model's own logits."""
    logits = model(input_ids=ids, use_cache=False).logits[:, P - 1 : -1]
    return logits.log_softmax(-1).gather(2, targets[..., None]).squeeze(2)


def states(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(S, R, H) states that predict the response tokens, a view of the decoder's (S, P + R, H)."""
    return base_of(model).base_model(input_ids=ids, use_cache=False).last_hidden_state[:, P - 1 : -1]


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model: nn.Module, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The head's gradients must agree to fp64, the others to fp32, in which several models compute their norms."""
    assert found.keys() == expected.keys()
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    own = {id(p) for p in (head.weight, head.bias) if p is not None and not (tied and p is head.weight)}
    for name, parameter in model.named_parameters():
        if name in expected:
            bound = 1e-12 if id(parameter) in own else 1e-6
            assert expected[name].abs().max() > 1e-9, f"{name}: no gradient to compare"
            assert max(relative_errors(found[name], expected[name])) < bound, name


@architectures
@pytest.mark.parametrize("workspace_rows", [3, 20], ids=["staged", "whole"])
def test_the_loss_is_that_of_the_models_own_logits(name: str, workspace_rows: int) -> None:
    model = built(name)
    ids, targets = rows()
    expected = d2o_loss(own_logps(model, ids, targets).sum(1), REFS.double(), LAYOUT, alpha=0.4, beta=0.3)
    expected_gradients = gradients(model, expected.loss)
    head = head_of(model)
    found = fused_d2o_loss(
        states(model, ids).flatten(0, 1),
        head.weight,
        targets.flatten(),
        LAYOUT,
        REFS,
        alpha=0.4,
        beta=0.3,
        workspace_bytes=workspace_rows * 8 * V,
        **head.options(),
    )
    found_gradients = gradients(model, found.loss)
    for field in ("loss", "logps", "margins"):
        assert max(relative_errors(getattr(found, field), getattr(expected, field))) < 1e-12, field
    assert_same_gradients(model, found_gradients, expected_gradients)


@architectures
def test_log_probabilities_are_those_of_the_models_own_logits(name: str) -> None:
    """Tokens are ordered across responses: hidden states are R rows apart in the decoder's output, not contiguous."""
    model = built(name)
    ids, targets = rows()
    upstream = torch.randn(LAYOUT.num_responses, R, generator=torch.Generator().manual_seed(2)).double()
    expected = own_logps(model, ids, targets)
    expected_gradients = gradients(model, (expected * upstream).sum())
    head, hidden = head_of(model), states(model, ids)
    assert not hidden[:, 0].is_contiguous()
    found = torch.stack(
        [linear_logprob(hidden[:, t], head.weight, targets[:, t], **head.options()) for t in range(R)], 1
    )
    assert max(relative_errors(found, expected)) < 1e-12
    assert_same_gradients(model, gradients(model, (found * upstream).sum()), expected_gradients)


@pytest.mark.parametrize(
    ("name", "option", "neutral"),
    [
        ("Gemma 2: softcap, tied", "softcap", None),
        ("Cohere: scale, tied", "logit_scale", 1.0),
        ("Granite: divides", "logit_scale", 1.0),
        ("Phi: bias", "bias", None),
        ("GPT-J: bias, a decoder of another name", "bias", None),
    ],
)
def test_each_part_of_the_head_matters_here(name: str, option: str, neutral: float | None) -> None:
    """A silent omission would fail the tests above: the log-probabilities differ without it."""
    model = built(name)
    ids, targets = rows()
    head, hidden = head_of(model), states(model, ids).flatten(0, 1)
    whole = linear_logprob(hidden, head.weight, targets.flatten(), **head.options())
    without = linear_logprob(hidden, head.weight, targets.flatten(), **head.options() | {option: neutral})
    assert (whole - without).abs().max() > 0.1


@architectures
def test_bf16_log_probabilities_are_nearer_than_the_models_own(name: str) -> None:
    """The model rounds its logits to bf16, and again after the cap; here they stay fp32."""
    model = built(name, torch.bfloat16)
    ids, targets = rows()
    with torch.no_grad():
        own = own_logps(model, ids, targets).flatten()
        head, hidden = head_of(model), states(model, ids).flatten(0, 1)
        options = head.options()
        found = linear_logprob(hidden, head.weight, targets.flatten(), **options)
        wide = options | {"bias": None if head.bias is None else head.bias.double()}
        exact = linear_logprob(hidden.double(), head.weight.double(), targets.flatten(), **wide)
    for ours, theirs in zip(relative_errors(found, exact), relative_errors(own, exact), strict=True):
        assert ours < 0.01 * theirs


@pytest.mark.parametrize("name", ["Gemma 2: softcap, tied", "Cohere: scale, tied", "Phi: bias"])
def test_the_triton_path(name: str, device: torch.device) -> None:
    """Compares the fp32 kernels and the model's own fp32 logits with fp64 logits of the same hidden states."""
    model = built(name, torch.float32).to(device)
    ids, targets = (x.to(device) for x in rows())
    head = head_of(model)
    with torch.no_grad():
        hidden = states(model, ids).flatten(0, 1)
    exact = wide_gradients(hidden.double(), head, targets, "torch", torch.float64)
    found = wide_gradients(hidden, head, targets, "triton", torch.float32)
    for key in exact:
        assert max(relative_errors(found[key], exact[key])) < 3e-6, key
    expected = own_logps(model, ids, targets).view(-1).split(R)
    assert max(relative_errors(found["logps"], torch.stack([part.sum() for part in expected]))) < 3e-6


def wide_gradients(
    hidden: torch.Tensor, head: Any, targets: torch.Tensor, backend: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    leaves = [
        x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, head.weight, head.bias) if x is not None
    ]
    options = head.options() | {"bias": leaves[2] if head.bias is not None else None}
    refs = REFS.to(hidden.device)
    out = fused_d2o_loss(*leaves[:2], targets.flatten(), LAYOUT, refs, backend=backend, **options)
    out.loss.backward()
    return {"loss": out.loss, "logps": out.logps} | {f"gradient {i}": leaf.grad for i, leaf in enumerate(leaves)}


def test_a_tied_weight_gains_the_gradient_of_the_head_and_of_the_embedding() -> None:
    """Compares with a copy of the model in which the two are separate; their gradients are added by hand."""
    tied = built("Llama: plain, tied")
    apart = built("Llama: plain, tied", tie_word_embeddings=False)
    weights = tied.state_dict()
    apart.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert apart.get_output_embeddings().weight is not apart.get_input_embeddings().weight
    ids, targets = rows()
    for model in (tied, apart):
        hidden = states(model, ids).flatten(0, 1)
        fused_d2o_loss(hidden, head_of(model).weight, targets.flatten(), LAYOUT, REFS).loss.backward()
    of_head, of_embedding = apart.get_output_embeddings().weight.grad, apart.get_input_embeddings().weight.grad
    assert min(of_head.abs().max(), of_embedding.abs().max()) > 1e-4
    assert max(relative_errors(tied.get_input_embeddings().weight.grad, of_head + of_embedding)) < 1e-6


def test_lora_beside_a_frozen_head() -> None:
    """The adapters' gradients equal those of the model's own logits, and nothing else gets a gradient."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(built("Granite: divides"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids, targets = rows()
    expected = d2o_loss(own_logps(model.eval(), ids, targets).sum(1), REFS.double(), LAYOUT)
    expected_gradients = gradients(model, expected.loss)
    head = head_of(model)
    assert not head.weight.requires_grad
    hidden = states(model, ids).flatten(0, 1)
    found = fused_d2o_loss(hidden, head.weight, targets.flatten(), LAYOUT, REFS, **head.options())
    assert max(relative_errors(found.loss, expected.loss)) < 1e-12
    found_gradients = gradients(model, found.loss)
    assert all("lora_" in name for name in found_gradients)
    assert len(found_gradients) == 2 * 2 * 2  # two layers, two modules, A and B
    assert_same_gradients(base_of(model), *(strip(g) for g in (found_gradients, expected_gradients)))


def strip(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as in the model inside the adapter's wrapper."""
    return {name.removeprefix("base_model.model."): gradient for name, gradient in named.items()}

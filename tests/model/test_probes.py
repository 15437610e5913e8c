"""A model that is not what training and scoring assume of it is refused by name, before the first draw and step."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import RwkvConfig, RwkvForCausalLM, XLNetConfig, XLNetLMHeadModel
from transformers.modeling_utils import AttentionInterface

from d2o_fast import D2OConfig, D2OTrainer
from d2o_fast.data.row import Example
from d2o_fast.errors import D2OError
from d2o_fast.forward.batch import pack, response_hidden
from d2o_fast.model.limits import check_positions
from d2o_fast.model.parts import decoder_of
from d2o_fast.model.probes import refuse_non_finite, refuse_unfit
from helpers import relative_errors
from sharing_cases import MODELS, build
from tiny import VOCAB_SIZE, tiny_model, tiny_rows, tiny_tokenizer

ROW = [(7 * i) % 58 + 3 for i in range(21)]
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "mamba": ("mamba", {"state_size": 8}),
    "recurrent_gemma": ("recurrent_gemma", {"lru_width": 32, "logits_soft_cap": 1.0}),
    "xlstm": ("xlstm", {"num_heads": 4, "output_logit_soft_cap": 1.0}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "falcon_h1": ("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}),
}


def rwkv(layers: int) -> nn.Module:
    ids = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": layers, "attention_hidden_size": 32, "context_length": 64}
    return RwkvForCausalLM(RwkvConfig(**ids, **settings)).eval()


def refuse(model: nn.Module, row: list[int] = ROW, quiet: bool = True) -> None:
    refuse_unfit(model, decoder_of(model), row, 0, quiet)


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
@pytest.mark.parametrize("row", [ROW, ROW[:2], [5] * 9, ROW * 4], ids=["row", "two tokens", "one word", "long"])
def test_causal_models_pass(name: str, row: list[int]) -> None:
    kind, extra = {**MODELS, **OTHERS}[name]
    refuse(build(kind, **extra), row)


@pytest.mark.parametrize("name", ["llama", *OTHERS])
def test_padding_and_other_rows_change_no_score(name: str) -> None:
    """Rows are padded on the right and have no mask, models with a state included."""
    kind, extra = {**MODELS, **OTHERS}[name]
    model = build(kind, **extra)
    examples = [Example(ROW[:4], ROW[4:6], [ROW[7:]], []), Example(ROW[2:12], ROW[4:9], [[5]], [])]
    with torch.no_grad():
        together = response_hidden(decoder_of(model), pack(examples, 0))
        alone = [
            response_hidden(decoder_of(model), pack([Example(e.prompt_ids, response, [], [])], 0, min_anchors=0))
            for e in examples
            for response in e.responses()
        ]
    assert relative_errors(together, torch.cat(alone))[0] < 1e-4


# --- Not causal ------------------------------------------------------------------------------------------------------


def with_attention(name: str, sees: Any, **config: Any) -> nn.Module:
    """A Llama whose queries see the keys at which ``sees(query, key)``, both as positions, is true."""

    def attention(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> tuple[torch.Tensor, None]:
        at = torch.arange(q.shape[2])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, sees(at[:, None], at))
        return out.transpose(1, 2), None

    AttentionInterface.register(name, attention)
    model = tiny_model(**config)
    model.set_attn_implementation(name)
    return model


LEAKS: dict[str, Any] = {
    "all": lambda q, k: k + q >= 0,
    "blocks of 4": lambda q, k: k // 4 <= q // 4,
    "blocks of 2": lambda q, k: k // 2 <= q // 2,
    "one ahead": lambda q, k: k <= q + 1,
    "a prefix of 8": lambda q, k: (k <= q) | (k < 8),
    "five ahead": lambda q, k: (k <= q) | (k == q + 5),
}


@pytest.mark.parametrize("name", LEAKS)
@pytest.mark.parametrize("length", [12, 13, 16, 17])
def test_attention_to_later_tokens_is_refused(name: str, length: int) -> None:
    model = with_attention(f"sees {name}", LEAKS[name])
    with pytest.raises(D2OError, match="LlamaForCausalLM is not causal"):
        refuse(model, ROW[:length])


def test_causal_attention_under_another_name_passes() -> None:
    refuse(with_attention("sees the past", lambda q, k: k <= q))


def test_a_config_that_is_not_causal_is_refused() -> None:
    model = tiny_model()
    model.config.is_causal = False
    with pytest.raises(D2OError, match="is not causal"):
        refuse(model)


def test_xlnet_is_refused() -> None:
    torch.manual_seed(0)
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48)).eval()
    check_positions(model, D2OConfig())  # its max_position_embeddings of -1 is no damage
    with pytest.raises(D2OError, match="XLNetLMHeadModel is not causal"):
        refuse(model)


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
def test_nothing_is_drawn_from_it_and_nothing_scored(given: bool, tmp_path: Path) -> None:
    model, drawn = tiny_model(), []
    model.config.is_causal = False
    model.generate = lambda *args, **kwargs: drawn.append(1)
    rows = [{**row, "anchors": [" yes"]} for row in tiny_rows(3)] if given else tiny_rows(3)
    args = D2OConfig(output_dir=str(tmp_path), max_steps=1, num_generations=1, max_length=64, max_completion_length=8)
    with pytest.raises(D2OError, match="the initial model cannot score: LlamaForCausalLM is not causal"):
        D2OTrainer(model, args, rows, processing_class=tiny_tokenizer()).train()
    assert not drawn
    assert not list((tmp_path / "anchors").rglob("*.parquet"))


def test_training_on_a_finished_store_is_refused_too(tmp_path: Path) -> None:
    """The store may be older than the fault: an ``attn_implementation`` is no part of its fingerprint."""
    args = D2OConfig(output_dir=str(tmp_path), max_steps=1, num_generations=1, max_length=64, max_completion_length=8)
    good = D2OTrainer(tiny_model(), args, tiny_rows(3), processing_class=tiny_tokenizer())
    good._prepare("train")
    bad = with_attention("sees everything", LEAKS["all"])
    with pytest.raises(D2OError, match="is not causal"):
        D2OTrainer(bad, args, good.stores["train"], processing_class=tiny_tokenizer()).train()


# --- Random, mixing, changing ----------------------------------------------------------------------------------------


def with_forward(change: Any) -> nn.Module:
    """A Llama whose first MLP does ``change(hidden states, module)``."""
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = types.MethodType(lambda self, x: plain(change(x, self)), mlp)
    return model


def remembered(x: torch.Tensor, module: Any) -> torch.Tensor:
    last = getattr(module, "last", 0.0)
    module.last = x.mean().item()
    return x + last


FAULTS: dict[str, tuple[Any, str]] = {
    "dropout that is always on": (lambda x, module: nn.functional.dropout(x, 0.1), "it draws at random"),
    "a mean over rows": (lambda x, module: x - x.mean(0), "other hidden states"),
    "a mean over the row": (lambda x, module: x - x.mean(1, keepdim=True), "is not causal"),
    "the row's length": (lambda x, module: x * x.shape[1], "if padding follows it"),
    "a state between calls": (remembered, "if the model read others before"),
    "noise in training": (lambda x, module: x * (1 + module.training * 0.1 * torch.randn(())), "in training mode"),
    "other values in training": (lambda x, module: x * 1.1 if module.training else x, "in training mode"),
    "infinities": (lambda x, module: x * torch.inf, "NaN or infinite, though its weights are finite"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_model_whose_rows_are_not_its_own_is_refused(name: str) -> None:
    change, reason = FAULTS[name]
    model = with_forward(change)
    with pytest.raises(D2OError, match=f"LlamaForCausalLM .*{reason}"):
        refuse_unfit(model, model.model, ROW, 0, quiet=True)


def test_noise_in_training_may_be_asked_for() -> None:
    model = with_forward(FAULTS["noise in training"][0])
    refuse(model, quiet=False)


def test_weights_that_a_forward_changes_are_refused() -> None:
    """RWKV divides the weights of layers past the sixth when it is evaluated, and multiplies them in training."""
    with pytest.raises(D2OError, match=r"changes its own weights \(rwkv.blocks.6.*rescale_every to 0"):
        refuse(rwkv(8))
    refuse(rwkv(2))  # too shallow: it divides by 1
    model = rwkv(8)
    model.config.rescale_every = 0
    refuse(model)


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(D2OError, match=r"1 of its \d+ parameters .* \(the first: model.layers.1.mlp.up_proj.weight\)"):
        refuse_non_finite(model)
    with pytest.raises(D2OError, match=r"mlp\.up_proj"):
        refuse_unfit(model, model.model, ROW, 0)


def test_generators_modes_and_precision_are_left_alone() -> None:
    model = tiny_model(attention_dropout=0.1).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    refuse_unfit(model, model.model, ROW, 0)
    with pytest.raises(D2OError):
        refuse_unfit(model, model.model, ROW, 0, quiet=True)
    assert torch.equal(torch.rand(2), expected)
    assert [module.training for module in model.modules()] == modes


def test_a_row_is_its_own_text() -> None:
    """The probe reads no id that is not in the row, but the padding."""
    model, seen = tiny_model(), set()
    hook = model.model.embed_tokens.register_forward_pre_hook(
        lambda module, ids: seen.update(ids[0].flatten().tolist())
    )
    refuse_unfit(model, model.model, ROW, 0)
    hook.remove()
    assert seen <= {0, *ROW}
    assert max(ROW) < VOCAB_SIZE

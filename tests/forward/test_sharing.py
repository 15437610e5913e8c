"""One pass per prompt inside unmodified models: equal to one sequence at a time, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from d2o_fast.arguments import parse
from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Example
from d2o_fast.errors import D2OError
from d2o_fast.forward import sharing
from d2o_fast.forward.batch import pack, pack_shared, response_hidden
from d2o_fast.forward.hook import EAGER, SharingRefused, install
from d2o_fast.forward.sharing import choose_sharing
from d2o_fast.model.parts import decoder_of
from helpers import relative_errors
from sharing_cases import MODELS, build, errors, fp64_throughout, logps_and_gradients, random_examples, single_sequences

EXAMPLES = [
    Example([3, 4, 5, 6, 7, 8], [9, 10, 2], [[11, 12, 13, 14, 15, 16, 17, 18, 2], [19, 2], [2]], [-1.0] * 4),
    Example([20], [21, 22, 2], [[23, 24, 25, 26, 2]], [-1.0] * 2),
    Example([27, 28, 29, 30], [31, 2], [[32, 33, 34, 2], [35, 36, 2]], [-1.0] * 3),
]


@pytest.fixture
def fp64() -> Iterator[None]:
    with fp64_throughout():
        yield


def largest_errors(model: nn.Module, batches: list[list[Example]]) -> tuple[float, float]:
    """Errors of log-probabilities and of all gradients, shared against one sequence at a time."""
    exact = single_sequences(model, EXAMPLES)
    assert exact[1].keys() == {name for name, _ in model.named_parameters()}
    install(model)
    return errors(logps_and_gradients(model, batches, shared=True), exact)


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_and_all_gradients_are_those_of_single_sequences(name: str, fp64: None) -> None:
    kind, extra = MODELS[name]
    model = build(kind, **extra).double()
    logps, gradients = largest_errors(model, [EXAMPLES])
    assert logps < 1e-13
    assert gradients < 1e-12


def distances_from_fp64(name: str, dtype: torch.dtype, device: str) -> list[tuple[float, float]]:
    """``errors`` of padded rows and of shared prompts in one type, against single sequences in fp64."""
    kind, extra = MODELS[name]
    examples, model = random_examples(), build(kind, **extra).to(device)
    with fp64_throughout():
        exact = single_sequences(copy.deepcopy(model).double(), examples)
    install(model)
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        return [errors(logps_and_gradients(model, [examples], shared), exact) for shared in (False, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral, window", "gemma2, window", "phi3"])
def test_sharing_adds_no_rounding_to_that_of_the_type(name: str, dtype: torch.dtype) -> None:
    factor = 4 if dtype == torch.float32 else 2  # the largest of a few errors of 1e-7 varies with the machine
    for padded, shared in zip(*distances_from_fp64(name, dtype, "cpu"), strict=True):
        assert shared < factor * padded


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral, window", "gemma2, window"])
def test_sharing_on_a_gpu_adds_no_rounding_to_that_of_the_type(name: str) -> None:
    for padded, shared in zip(*distances_from_fp64(name, torch.bfloat16, "cuda"), strict=True):
        assert shared < 2 * padded


def test_micro_batches_and_their_order_change_nothing(fp64: None) -> None:
    logps, gradients = largest_errors(build("llama").double(), [EXAMPLES[:1], EXAMPLES[1:]])
    assert max(logps, gradients) < 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2, window"])
def test_activation_checkpointing_is_exact(name: str, reentrant: bool, fp64: None) -> None:
    kind, extra = MODELS[name]
    model = build(kind, **extra).double()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    logps, gradients = largest_errors(model.train(), [EXAMPLES])
    assert max(logps, gradients) < 1e-12


def test_lora_with_and_without_its_adapter(fp64: None) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])).double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, 0, 0.3)
    plain, expected = logps_and_gradients(model, [EXAMPLES], shared=False)
    install(model)
    found, gradients = logps_and_gradients(model, [EXAMPLES], shared=True)
    assert relative_errors(found, plain)[0] < 1e-12
    assert gradients.keys() == expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert max(relative_errors(gradients[n], expected[n])[0] for n in expected) < 1e-12
    with model.disable_adapter(), torch.no_grad():
        without = [response_hidden(decoder_of(model), batch) for batch in (pack_shared(EXAMPLES), pack(EXAMPLES, 0))]
    assert relative_errors(*without)[0] < 1e-12


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3, window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_no_worse_than_without_sharing(name: str, dtype: torch.dtype) -> None:
    """Compares both with fp32: sharing must add less error than half precision's rounding already has."""
    kind, extra = MODELS[name]
    model = build(kind, **extra)
    install(model)
    exact, exact_gradients = logps_and_gradients(model, [EXAMPLES], shared=False)
    errors = {}
    for shared in (False, True):
        with torch.autocast("cpu", dtype=dtype):
            logps, gradients = logps_and_gradients(model, [EXAMPLES], shared=shared)
        errors[shared] = (
            relative_errors(logps, exact)[1],
            sum(relative_errors(gradients[n], exact_gradients[n])[1] for n in gradients) / len(gradients),
        )
    assert 0 < errors[True][0] < 1.5 * errors[False][0] + 1e-4
    assert 0 < errors[True][1] < 1.5 * errors[False][1]


# --- Without a shared row nothing changes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2, window"])
def test_plain_forwards_keep_their_bits_and_generate_works(name: str) -> None:
    kind, extra = MODELS[name]
    tokens = torch.arange(3, 20)[None]
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            logits = [model(tokens).logits, model(tokens, attention_mask=mask).logits]
            return [*logits, model.generate(tokens, max_new_tokens=12, do_sample=False)]

    before = outputs(build(kind, **extra))
    model = build(kind, **extra)
    install(model)
    install(model)  # a second time changes nothing
    with torch.no_grad():
        response_hidden(decoder_of(model), pack_shared(EXAMPLES))
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))
    loaded = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(loaded), strict=True))


def test_an_eager_model_is_saved_without_our_name(tmp_path: Any) -> None:
    model = build("gemma2")
    assert model.config._attn_implementation == "eager"
    install(model)
    assert model.config._attn_implementation == EAGER
    model.save_pretrained(tmp_path)
    assert EAGER not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation in ("eager", "sdpa")


def test_a_softcap_that_sdpa_leaves_out_is_no_reference() -> None:
    """Older versions of transformers silently compute Gemma 2 under sdpa without it."""
    q, k = torch.zeros(1, 4, 28, 8), torch.zeros(1, 2, 28, 8)
    install(build("llama"))
    with pytest.raises(SharingRefused, match="set attn_implementation to eager"):
        ALL_ATTENTION_FUNCTIONS["sdpa"](
            nn.Module(), q, k, k, None, shared_sequence=pack_shared(EXAMPLES).shared, softcap=50.0
        )


# --- Refusals --------------------------------------------------------------------------------------------------------

HYBRID = {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon": ("falcon", {"new_decoder_architecture": False}, "0 of its 2 layers"),
    "stablelm": ("stablelm", {}, "0 of its 2 layers"),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "1 of its 2 layers"),
    "falcon_h1": ("falcon_h1", HYBRID, "a change in one response changes others"),
    "mamba": ("mamba", {"state_size": 8}, "0 of its 2 layers|failed on a shared row"),
}


def choose(model: nn.Module, setting: Any = "auto", training: bool = True, **settings: Any) -> sharing.Sharing:
    config = D2OConfig(shared_prefix=setting, **settings)
    return choose_sharing(model, decoder_of(model), EXAMPLES, config, 0, training)


@pytest.mark.parametrize("name", MODELS)
def test_exact_models_are_found_to_be(name: str) -> None:
    kind, extra = MODELS[name]
    found = choose(build(kind, **extra))
    assert found.on, found.text
    assert ("segment by segment" in found.text) == ("window" in name or kind == "gemma2")
    assert ("flash" in found.text) != (name in ("gemma2", "gemma2, window", "mistral, window", "phi3, window"))


@pytest.mark.parametrize("name", ["llama", "gemma2, window"])
def test_exact_models_are_found_to_be_in_bf16(name: str) -> None:
    kind, extra = MODELS[name]
    assert choose(build(kind, **extra), dtype="bfloat16").on


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name: str) -> None:
    kind, extra, reason = REFUSED[name]
    model = build(kind, **extra)
    before = model.config._attn_implementation
    found = choose(model)
    assert not found.on
    assert found.text.startswith("one row per response (")
    assert f"prompts cannot be shared by {type(model).__name__}: " in found.text
    with pytest.raises(D2OError, match=rf"shared_prefix is true, but prompts cannot be shared by .*({reason})"):
        choose(model, True)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("flag", "value"), [("auto", "auto"), ("true", True), ("false", False)])
def test_the_setting_on_the_command_line(flag: str, value: Any) -> None:
    found = parse("train", ["--shared_prefix", flag])[1]["shared_prefix"]
    assert (type(found), found) == (type(value), value)


def test_false_shares_nothing() -> None:
    assert choose(build("llama"), False) == (False, "one row per response (sdpa), as shared_prefix is false")


@pytest.mark.parametrize("kind", ["attention", "residual"])
def test_dropout_is_refused_in_training_alone(kind: str) -> None:
    if kind == "attention":
        model = build("llama", attention_dropout=0.2)
    else:
        model = build("phi3", resid_pdrop=0.2)
    found = choose(model, disable_dropout=False)
    assert not found.on
    assert "dropout of 0.2" in found.text
    assert choose(model, training=False).on
    with pytest.raises(D2OError, match="in training mode than in evaluation mode"):  # nobody has switched it off
        choose(model)
    assert not model.training
    install(model)
    if kind == "attention":  # switched on later, it stops the run
        with pytest.raises(D2OError, match=r"dropout of 0\.2"):
            response_hidden(decoder_of(model.train()), pack_shared(EXAMPLES))


def test_lora_dropout_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    assert "lora_dropout" in choose(model).text


def test_a_window_that_the_call_does_not_tell_is_refused() -> None:
    """The model's own masks include it; ours would be wrong only for long sequences, after the check."""
    model = build("llama", sliding_window=512)
    assert "layer 0 has a window of 512, but its attention call says None" in choose(model).text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"attention_mask": torch.zeros(1, 1, 14, 14)}, "makes a mask of its own"),
        ({"s_aux": torch.zeros(4)}, "takes s_aux, unknown here"),
        ({"position_bias": torch.zeros(1, 4, 14, 14)}, "takes position_bias, unknown here"),
        ({"is_causal": False}, "is not causal"),
        ({"dropout": 0.1}, "dropout of 0.1"),
    ],
)
def test_calls_that_ask_for_more_are_refused(arguments: dict[str, Any], reason: str) -> None:
    batch = pack_shared(EXAMPLES)
    tokens = batch.input_ids.shape[1]
    q, k, v = torch.zeros(1, 4, tokens, 8), torch.zeros(1, 2, tokens, 8), torch.zeros(1, 2, tokens, 8)
    install(build("llama"))
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    arguments = {"attention_mask": torch.zeros(1, 1, 1, 1), **arguments}
    with pytest.raises(SharingRefused, match=reason):
        attention(nn.Module(), q, k, v, shared_sequence=batch.shared, **arguments)


def test_layers_of_an_unknown_type_are_refused() -> None:
    model = build("llama", layer_types=["full_attention", "chunked_attention"])
    assert "layer 1 is of the type 'chunked_attention'" in choose(model).text


def test_wrong_log_probabilities_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may pass the probe and still be wrong; here its positions are."""
    positions = sharing.SharedSequence.position_ids
    monkeypatch.setattr(sharing.SharedSequence, "position_ids", lambda row: torch.arange(len(positions(row))))
    for dtype in ("float32", "bfloat16"):
        found = choose(build("llama"), dtype=dtype)
        assert not found.on
        assert "log-probabilities of the first prompt's response tokens differ" in found.text


@pytest.mark.parametrize(("kind", "extra"), [("llama", {}), ("falcon", {"hidden_dropout": 0.2})])
def test_the_generators_and_the_mode_are_left_alone(kind: str, extra: dict[str, Any]) -> None:
    model = build(kind, **extra).train()
    frozen = list(model.modules())[-1].eval()  # a user keeps a layer in evaluation mode
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    assert choose(model, disable_dropout=False).on == (kind == "llama")
    assert [module for module in model.modules() if not module.training] == [frozen]
    assert torch.equal(torch.rand(2), expected)


def test_each_finding_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    sharing._said.clear()
    with caplog.at_level("INFO", logger="d2o_fast"):
        for _ in range(2):
            choose(build("llama"))
            choose(build("falcon"))
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "FalconForCausalLM" in caplog.text

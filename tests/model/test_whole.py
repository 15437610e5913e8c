"""Damaged folders of models, tokenizers and adapters: each is refused by name, and none of their code runs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from d2o_fast.config import D2OConfig
from d2o_fast.errors import D2OError
from d2o_fast.model.adapters import add_adapter
from d2o_fast.model.loading import initial_model, load_model, load_tokenizer, load_weights, trained_model
from d2o_fast.model.parts import decoder_of
from helpers import DEADLINE
from tiny import save_tiny, tiny_model, tiny_rows

Damage = Callable[[Path], Any]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"
GONE = object()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny(tmp_path_factory.mktemp("whole") / "model"))


def fields(file: str, **values: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(json.dumps({name: x for name, x in content.items() if x is not GONE}))

    return damage


def config(**values: Any) -> Damage:
    return fields("config.json", **values)


def replaced(file: str, content: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content)


def removed(*files: str) -> Damage:
    return lambda folder: [(folder / file).unlink() for file in files]


def halved(file: str) -> Damage:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size // 2)


def pipe(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / file)
        change(found)
        save_file(found, folder / file, metadata={"format": "pt"})

    return damage


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor], file: str = WEIGHTS) -> Damage:
    return tensors(lambda found: found.update({name: value(found[name]).contiguous()}), file)


def one_bad(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.flatten().index_fill(0, torch.tensor([3]), value).view_as(tensor)


def flipped(place: int) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / WEIGHTS).read_bytes())
        content[place] ^= 0xFF
        (folder / WEIGHTS).write_bytes(content)

    return damage


def sharded(change: Callable[[Path, dict[str, Any]], Any] = lambda folder, index: None) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
        for part in (0, 1):
            names = sorted(found)[part::2]
            save_file({name: found[name] for name in names}, folder / f"{part}.safetensors", metadata={"format": "pt"})
            index["weight_map"] |= dict.fromkeys(names, f"{part}.safetensors")
        change(folder, index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


class Harm:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"a": Harm()}, folder / "pytorch_model.bin")


def own_code(file: str, **values: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "code.py").write_text("open('ran', 'w')\nclass A: pass\n")
        fields(file, **values)(folder)

    return damage


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return damage


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
OWN = {"AutoConfig": "code.A", "AutoModelForCausalLM": "code.A"}
DAMAGES: dict[str, tuple[Damage, str]] = {
    # config.json
    "no config": (removed("config.json"), "has no config.json"),
    "empty config": (replaced("config.json", b""), "config.json cannot be loaded"),
    "half a config": (halved("config.json"), "config.json cannot be loaded"),
    "config is a list": (replaced("config.json", b"[]"), "config.json cannot be loaded: it holds .* not an object"),
    "config is no UTF-8": (replaced("config.json", b'{"a":"\xff"}'), "config.json cannot be loaded"),
    "config is deep": (replaced("config.json", DEEP), "config.json cannot be loaded: RecursionError"),
    "a head that the config ties": (config(tie_word_embeddings=True), "says tie_word_embeddings, but its files hold a"),
    "config is a pipe": (pipe("config.json"), "config.json is neither a file nor a folder"),
    "vocabulary of 4000 digits": (config(vocab_size=int("9" * 4000)), "config.json cannot be loaded"),
    "no type": (config(model_type=GONE), "config.json has no model_type"),
    "unknown type": (config(model_type="foo"), "config.json cannot be loaded: .*foo"),
    "type is a list": (config(model_type=["llama"]), "config.json cannot be loaded"),
    "another type": (config(model_type="qwen2"), "makes Qwen2ForCausalLM"),
    "another type with the same tensors": (config(model_type="gemma"), "makes GemmaForCausalLM"),
    "no causal type": (config(model_type="t5"), "config.json cannot be loaded"),
    "unknown activation": (config(hidden_act="foo"), "config.json cannot be loaded: it names 'foo'"),
    "activation is a number": (config(hidden_act=5), "config.json cannot be loaded: .*hidden_act"),
    "hidden size not divisible": (config(hidden_size=33), "config.json cannot be loaded: .*not a multiple"),
    "hidden size is a text": (config(hidden_size="32"), "config.json cannot be loaded: .*hidden_size"),
    "hidden size of 0": (config(hidden_size=0), "does not fit its weights"),
    "hidden size of 10**12": (config(hidden_size=10**12), "config.json asks for .* values"),
    "vocabulary of 10**10": (config(vocab_size=10**10), "config.json asks for .* values"),
    "vocabulary too small": (config(vocab_size=100), "is .160, 32. and not .100, 32."),
    "vocabulary too large": (config(vocab_size=200), "is .160, 32. and not .200, 32."),
    "vocabulary negative": (config(vocab_size=-5), "config.json cannot be loaded"),
    "no heads": (config(num_attention_heads=0), "config.json cannot be loaded"),
    "other heads": (config(num_key_value_heads=4), "does not fit its weights"),
    "a layer more": (config(num_hidden_layers=3), "not whole: its weights lack model.layers.2.*and 6 more"),
    "a layer less": (config(num_hidden_layers=1), "another model .* also hold model.layers.1"),
    "layers negative": (config(num_hidden_layers=-1), "another model"),
    "layers of 10**9": (config(num_hidden_layers=10**9), "asks for 1000000000 layers"),
    "biases": (config(attention_bias=True), "its weights lack .*bias"),
    "dropout of 2": (config(attention_dropout=2.0), "attention_dropout is 2.0"),
    "padding beyond": (config(pad_token_id=500), "config.json cannot be loaded"),
    "epsilon is no number": (config(rms_norm_eps=float("nan")), "config.json cannot be loaded: it holds NaN"),
    "epsilon is negative": (config(rms_norm_eps=-1.0), "logits are not finite"),
    "rotary base of 0": (config(rope_parameters={"rope_type": "default", "rope_theta": 0.0}), "not finite .*inv_freq"),
    "unknown rotary type": (config(rope_parameters={"rope_type": "foo", "rope_theta": 1e4}), "it names 'foo'"),
    "attention from a hub": (config(attn_implementation="a/kernel"), "'a/kernel', which is code from a hub"),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantised"),
    # weights
    "no weights": (removed(WEIGHTS), "has no weights"),
    "empty weights": (replaced(WEIGHTS, b""), "model.safetensors cannot be loaded"),
    "half the weights": (halved(WEIGHTS), "model.safetensors cannot be loaded"),
    "a pointer in place of weights": (replaced(WEIGHTS, b"version 1\nsize 12\n"), "model.safetensors cannot be loaded"),
    "weights are a pipe": (pipe(WEIGHTS), "neither a file"),
    "flipped length": (flipped(0), "model.safetensors cannot be loaded"),
    "flipped header": (flipped(40), "model.safetensors cannot be loaded"),
    "no head": (tensors(lambda found: found.pop(HEAD)), "not whole: its weights lack lm_head.weight"),
    "no tensor of a layer": (tensors(lambda found: found.pop(UP)), f"its weights lack {UP}"),
    "no tensors": (tensors(lambda found: found.clear()), "the weights hold 0 tensors"),
    "a score": (tensors(lambda found: found.update({"score.weight": torch.ones(1, 32)})), "also hold score.weight"),
    "other shape": (put("model.norm.weight", lambda x: x[:5]), "is .5. and not .32."),
    "transposed": (put(UP, lambda x: x.T), "is .32, 64. and not .64, 32."),
    "integers": (put(UP, lambda x: x.to(torch.int8)), "has the type I8"),
    "NaN": (put(UP, one_bad(float("nan"))), f"not finite .{UP}"),
    "infinity": (put(HEAD, one_bad(float("inf"))), f"not finite .{HEAD}"),
    "pickled": (pickled, "pickled weights .pytorch_model.bin.*save_pretrained"),
    "no shard": (sharded(lambda folder, index: (folder / "1.safetensors").unlink()), "names 1.safetensors"),
    "empty shard": (sharded(lambda folder, index: (folder / "1.safetensors").write_bytes(b"")), "1.safetensors cannot"),
    "half an index": (lambda folder: (sharded()(folder), halved(INDEX)(folder)), "index.json cannot be loaded"),
    "no map": (sharded(lambda folder, index: index.pop("weight_map")), "has no weight_map"),
    "a map to elsewhere": (
        sharded(lambda folder, index: index["weight_map"].update({HEAD: "../x.safetensors"})),
        "names ../x.safetensors",
    ),
    "pickle in the index": (
        sharded(lambda f, index: (torch.save({"a": Harm()}, f / "a.bin"), index["weight_map"].update({HEAD: "a.bin"}))),
        "a.bin cannot be loaded",
    ),
    # code
    "own code": (own_code("config.json", model_type="own", auto_map=OWN), "needs code of its own"),
    "own code without a type": (own_code("config.json", model_type=GONE, auto_map=OWN), "needs code of its own"),
    "tokenizer's own code": (
        own_code("tokenizer_config.json", tokenizer_class="A", auto_map={"AutoTokenizer": ["code.A", None]}),
        "the tokenizer of .* needs code of its own",
    ),
    # generation_config.json
    "empty generation config": (replaced("generation_config.json", b""), "generation_config.json cannot be loaded"),
    "stop is a text": (fields("generation_config.json", eos_token_id="x"), "eos_token_id is 'x'"),
    "stop is negative": (fields("generation_config.json", eos_token_id=[2, -1]), "eos_token_id is .2, -1."),
    # tokenizer
    "no tokenizer": (removed("tokenizer.json", "tokenizer_config.json"), "the tokenizer of .* is missing"),
    "no vocabulary file": (removed("tokenizer.json"), "the tokenizer of .* cannot be loaded"),
    "half a tokenizer": (halved("tokenizer.json"), "the tokenizer of .* cannot be loaded"),
    "tokenizer is deep": (replaced("tokenizer.json", DEEP), "the tokenizer of .* cannot be loaded"),
    "unknown kind of tokenizer": (tokenizer(lambda x: x["model"].update(type="Foo")), "the tokenizer of .* cannot be"),
    "negative id": (tokenizer(lambda x: x["model"]["vocab"].update(h=-4)), "the tokenizer of .* cannot be loaded"),
    "empty vocabulary": (tokenizer(lambda x: x["model"].update(vocab={}, merges=[])), "has no vocabulary"),
    "no settings of the tokenizer": (removed("tokenizer_config.json"), "has no eos_token"),
    "length is a text": (fields("tokenizer_config.json", model_max_length="x"), "model_max_length 'x'"),
    "bad template": (fields("tokenizer_config.json", chat_template="{% for %}"), "template of .* is no Jinja template"),
    "template is a number": (fields("tokenizer_config.json", chat_template=5), "template of .* is 5"),
}


def load(folder: str, **settings: Any) -> Any:
    config = D2OConfig(model_name_or_path=folder, **settings)
    load_tokenizer(config)
    model = initial_model(config, folder)
    decoder_of(model)
    return model


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(
    name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where harmful code would leave its mark
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    folder = shutil.copytree(whole, tmp_path / "model")
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(D2OError, match=message) as error:
        load(str(folder))
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert len(text) < 900
    assert "trust_remote_code" not in text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        sharded(),
        tensors(lambda found: found.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})),
        tensors(lambda found: found.update({name: x.bfloat16() for name, x in found.items()})),
        tensors(lambda found: found.update({"v_head.summary.weight": torch.ones(1, 32)})),
        config(return_dict=False),
        own_code("config.json", auto_map=OWN),  # transformers knows the model without that code
    ],
    ids=["shards", "old buffers", "bf16", "value head", "tuples", "known type with code"],
)
def test_a_whole_folder_is_loaded(change: Damage, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    change(shutil.copytree(whole, tmp_path / "model"))
    state, expected = load(str(tmp_path / "model")).state_dict(), tiny_model().state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-2, rtol=1e-2)
    assert not (tmp_path / "ran").exists()


def test_a_tied_head_may_be_missing(tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert HEAD not in load_file(tmp_path / WEIGHTS)
    model = initial_model(D2OConfig(), str(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["", "a b", "a\0b", "file.gguf", "./none", "x" * 300])
def test_a_name_that_is_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    with pytest.raises(D2OError, match="model_name_or_path") as error:
        initial_model(D2OConfig(), name)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{% if %}", "is no Jinja template: line 1"), (b"\xff\xfe", "cannot be read as UTF-8: .*utf-8")],
)
def test_a_template_file_is_read_before_the_rows(content: bytes, message: str, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(D2OError, match=f"chat_template_path '{tmp_path}/t.jinja' {message}"):
        load_tokenizer(D2OConfig(model_name_or_path=str(whole), chat_template_path=str(tmp_path / "t.jinja")))


# --- Weights of a checkpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (removed("config.json"), None),  # the model in memory says how it is built
        (config(num_hidden_layers=1), None),
        (tensors(lambda found: found.pop(HEAD)), "its weights is not whole|lack lm_head.weight"),
        (tensors(lambda found: found.update(foo=torch.ones(2))), "also hold foo"),
        (put("model.norm.weight", lambda x: x[:5]), "is .5. and not .32."),
        (put(UP, one_bad(float("nan"))), f"not finite .{UP}"),
        (halved(WEIGHTS), "cannot be loaded"),
        (removed(WEIGHTS), "has no weights"),
        (pickled, "pickled"),
    ],
)
def test_weights_of_a_checkpoint_are_read_whole_or_not_at_all(
    damage: Damage, message: str | None, tmp_path: Path
) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path / "checkpoint")
    damage(tmp_path / "checkpoint")
    model = tiny_model()
    if message is None:
        load_weights(model, tmp_path / "checkpoint")
        assert torch.equal(model.lm_head.weight, tiny_model(seed=1).lm_head.weight)
        return
    with pytest.raises(D2OError, match=message) as error:
        load_weights(model, tmp_path / "checkpoint")
    assert str(error.value).startswith(f"{tmp_path}/checkpoint")


# --- Adapters ----------------------------------------------------------------------------------------------------

ADAPTER = "adapter_model.safetensors"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def adapter(**values: Any) -> Damage:
    return fields("adapter_config.json", **values)


@pytest.fixture(scope="module")
def whole_adapter(whole: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(whole), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(whole.parent / "adapter")
    return whole.parent / "adapter"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replaced("adapter_config.json", b""), "adapter_config.json cannot be loaded"),
        (replaced("adapter_config.json", DEEP), "adapter_config.json cannot be loaded"),
        (adapter(base_model_name_or_path=5), "does not say which model"),
        (adapter(base_model_name_or_path="/none/x"), "its base_model_name_or_path '/none/x' is not a folder"),
        (adapter(peft_type="FOO"), "it names 'FOO'"),
        (adapter(r=3), "size mismatch"),
        (adapter(r=10**12), "cannot be loaded"),
        (adapter(lora_alpha="x"), "cannot be loaded"),
        (adapter(lora_alpha=float("nan")), "it holds NaN"),
        (adapter(target_modules=["q_proj", "v_proj"]), "its weights lack .*v_proj"),
        (adapter(target_modules=["v_proj"]), "its weights lack .*v_proj"),
        (adapter(target_modules=["foo"]), "cannot be loaded: Target modules"),
        (removed(ADAPTER), "has no weights"),
        (halved(ADAPTER), "cannot be loaded"),
        (pipe(ADAPTER), "neither a file"),
        (tensors(lambda found: found.pop(A), ADAPTER), f"its weights lack {A}"),
        (tensors(lambda found: found.update({A.replace("s.0", "s.9"): found[A].clone()}), ADAPTER), "also hold"),
        (
            tensors(lambda found: found.update({"base_model.model.lm_head.weight": torch.zeros(160, 32)}), ADAPTER),
            "also hold base_model.model.lm_head.weight",  # it would replace the base's
        ),
        (put(A, lambda x: x[:1], ADAPTER), "size mismatch"),
        (put(A, one_bad(float("nan")), ADAPTER), "not finite"),
        (put(A, lambda x: x.to(torch.int8), ADAPTER), "has the type torch.int8"),
        (
            lambda folder: (torch.save({"a": Harm()}, folder / "adapter_model.bin"), (folder / ADAPTER).unlink()),
            "pickled weights .adapter_model.bin",
        ),
    ],
)
def test_a_damaged_adapter_is_refused(
    damage: Damage, message: str, whole_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(whole_adapter, tmp_path / "adapter")
    decoder_of(initial_model(D2OConfig(), str(folder)))
    damage(folder)
    with pytest.raises(D2OError, match=message) as error:
        decoder_of(initial_model(D2OConfig(), str(folder)))
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("way", [{"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["embed_tokens"]}])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_a_tied_embedding_is_refused(way: dict[str, Any], tied: bool) -> None:
    """Merged, it would change the head too, and training would not have seen that."""
    from peft import LoraConfig

    model = tiny_model(tie_word_embeddings=tied)
    peft_config = LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **way})
    if not tied:
        add_adapter(model, D2OConfig(), peft_config)
        return
    with pytest.raises(D2OError, match="tie_word_embeddings"):
        add_adapter(model, D2OConfig(), peft_config)


# --- As a user sees it -------------------------------------------------------------------------------------------


def test_an_evaluated_model_is_whole(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    put(UP, one_bad(float("nan")))(folder)
    with pytest.raises(D2OError, match=rf"'{folder}': its weights are not finite"):
        trained_model(D2OConfig(model_name_or_path=str(whole)), str(folder))


def test_missing_tensors_are_told_once(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    tensors(lambda found: found.pop(HEAD))(folder)
    with caplog.at_level(logging.WARNING), pytest.raises(D2OError):
        load(str(folder))
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no head", "own code"])
def test_the_command_refuses_in_one_line(name: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    DAMAGES[name][0](folder)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(2)))
    command = [sys.executable, "-m", "d2o_fast.cli", "train", "--model_name_or_path", str(folder)]
    command += ["--dataset_name", "data.jsonl", "--output_dir", "run"]
    done = subprocess.run(
        command, cwd=tmp_path, input="yes\n" * 9, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode not in (0, 124, 137)
    assert "Traceback" not in done.stderr
    assert f"model_name_or_path '{folder}'" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "ran").exists()
    assert not list(tmp_path.glob("run/**/*.safetensors"))


def test_a_head_that_no_version_ties_may_differ(tmp_path: Path) -> None:
    """BigBirdPegasus has tie_word_embeddings in its configuration and a head of its own."""
    settings = {
        "vocab_size": 61,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
    }
    config = AutoConfig.for_model("bigbird_pegasus", **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load_model(D2OConfig(model_name_or_path=str(tmp_path))).lm_head.weight.shape == (61, 32)


def _tied_by_hand(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


OTHER_FORMS: dict[str, Callable[[Any], Any]] = {
    "lm_head|tie_word_embeddings": _tied_by_hand,
    "extra.weight": lambda model: model.add_module("extra", torch.nn.Linear(3, 3)),
    "model.layers.1": lambda model: setattr(model.model, "layers", model.model.layers[:1]),
    "embed_tokens": lambda model: setattr(model.config, "vocab_size", 999),
}


@pytest.mark.parametrize("found", OTHER_FORMS)
def test_an_object_that_its_config_does_not_describe_is_refused(found: str) -> None:
    """It would train, and the saved folder could not be loaded."""
    model = tiny_model()
    OTHER_FORMS[found](model)
    with pytest.raises(D2OError, match=f"not the one that its config describes.*({found})"):
        initial_model(D2OConfig(), model)

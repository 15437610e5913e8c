"""Model folders: damaged files, configurations that do not fit the weights, tokenizers, foreign code, adapters."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from case import Call, Case, Cases, Check, byte_damages, drop, fine, put, same_weights, says, set_json, some, train
from cases_checkpoints import TENSOR_DAMAGES

WEIGHTS, CONFIG = Path("model/model.safetensors"), Path("model/config.json")
TOKENIZER, TOKENIZER_CONFIG = Path("model/tokenizer.json"), Path("model/tokenizer_config.json")
NAMES = (("model_name_or_path", "'model'", "model/", "LlamaForCausalLM"),)


def new(change: Callable[[], Any], **settings: Any) -> Callable[[], Call]:
    """A training with a new store after ``change``."""

    def prepare() -> Call:
        change()
        return train(anchors_dir="new", **settings)

    return prepare


def cases(chance: random.Random, good: Path) -> Cases:
    """All cases of the kind."""
    for path in (WEIGHTS, CONFIG, TOKENIZER, TOKENIZER_CONFIG):
        for name, damage in byte_damages(chance, flips=0).items():
            if name.startswith("without") and path != WEIGHTS:
                continue  # the last newline
            right, either = None, False
            if path == TOKENIZER_CONFIG and name in ("missing", "a link to nowhere", "a folder"):
                right, either = fine, True
            if path == WEIGHTS and name.startswith("zeros"):
                right, either = fine, True  # zeros are numbers
            yield Case("models", f"{path.name}: {name}", new(partial(damage, path)), NAMES, right, either=either)
    yield from _config_cases(chance)
    yield from _tensor_cases(chance, good)
    yield from _tokenizer_cases(chance)
    yield from _code_cases()
    yield from _architecture_cases()
    yield from _reference_cases(chance)
    yield from _right_cases()


# --- The configuration -------------------------------------------------------------------------------------------


def _config(
    name: str, change: Callable[[Any], Any], words: Any = NAMES, right: Check | None = None, **options: Any
) -> Case:
    either = right is not None
    return Case(
        "models", f"config.json: {name}", new(partial(set_json, CONFIG, change), **options), words, right, either
    )


#: fields of the configuration with values that do not fit the weights, or nothing at all
WRONG_CONFIG: dict[str, tuple[Any, ...]] = {
    "model_type": ("nothing_known", "", None, 5, "bert", "t5", "vit"),
    "hidden_act": ("swooosh", None, 3, ""),
    "hidden_size": (0, -32, 33, 64, "32", None, 10**9),
    "intermediate_size": (0, 63, "64", None),
    "num_hidden_layers": (0, 1, 3, -1, "2", None, 10**7),
    "num_attention_heads": (0, 3, 5, "4", None),
    "num_key_value_heads": (0, 3, 4, "2", -1),
    "vocab_size": (0, 100, 161, -1, "160", None, 2**40),
    "max_position_embeddings": (0, -1, "512", None),
    "rms_norm_eps": ("x", None, -5.0, float("nan")),
    "head_dim": (7, 0, "8"),
    "rope_parameters": ({"rope_type": "unheard"}, {"rope_type": "default"}, "x", 5, {"rope_theta": "x"}),
    "attention_dropout": ("x", 7.0, -1.0),
    "architectures": ("x", 5, [7]),
    "quantization_config": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "nope"}, 5),
    "dtype": ("float7", 5, ["x"]),
    "eos_token_id": (5000, -3, "x", [5000], 1.5),
    "pad_token_id": (5000, -3, "x"),
    "tie_word_embeddings": (True, "x", 3),
    "attention_bias": (True, "x"),
    "mlp_bias": (True,),
}
#: values that give the same model, or that only a reader of the source could call wrong
HARMLESS = {
    *(("architectures", repr(value)) for value in WRONG_CONFIG["architectures"]),
    *(("dtype", repr(value)) for value in WRONG_CONFIG["dtype"]),
    *(("eos_token_id", repr(value)) for value in WRONG_CONFIG["eos_token_id"]),
    *(("pad_token_id", repr(value)) for value in WRONG_CONFIG["pad_token_id"]),
    *(("attention_dropout", "-1.0"), ("attention_dropout", "7.0"), ("model_type", "'mistral'")),
    *(("rope_parameters", repr(value)) for value in WRONG_CONFIG["rope_parameters"][1:2]),
    ("max_position_embeddings", "None"),
    ("rms_norm_eps", "-5.0"),
    ("head_dim", "'8'"),
    ("tie_word_embeddings", "3"),
    ("tie_word_embeddings", "'x'"),
}


def _config_cases(chance: random.Random) -> Cases:
    for field, values in WRONG_CONFIG.items():
        for value in some(chance, values, 3):
            right = fine if (field, repr(value)) in HARMLESS else None
            yield _config(f"{field}: {value!r}", put(field, value=value), right=right)
    for field in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        yield _config(f"without {field}", drop(field))
    yield _config("a list", lambda _: [1])
    yield _config("a text", lambda _: "x")
    short = put("max_position_embeddings", value=chance.randint(8, 40))
    yield _config("a context shorter than max_length", short, ("max_length",), says("max_length"))


# --- The tensors -------------------------------------------------------------------------------------------------


def _tensor_cases(chance: random.Random, good: Path) -> Cases:
    names = sorted(load_file(good / "base" / WEIGHTS))
    heads = ["lm_head.weight", "model.embed_tokens.weight"]
    for tensor in [*heads, *some(chance, [name for name in names if name not in heads], 2)]:
        for name, change in TENSOR_DAMAGES.items():
            right = fine if name.startswith("half") else None
            prepare = new(partial(_resave, partial(change, name=tensor)))
            yield Case("models", f"weights: {name} {tensor}", prepare, NAMES, right)
        for name, value in {"inf": float("inf"), "1e38": 1e38}.items():
            prepare = new(partial(_resave, partial(_fill, tensor, value)))
            right = fine if name == "1e38" else None  # a norm may follow
            yield Case("models", f"weights: {tensor} of {name}", prepare, NAMES, right, either=True)
    yield Case("models", "weights: a tensor more", new(partial(_resave, _more)), NAMES)
    yield Case("models", "weights: no tensor", new(partial(_resave, lambda tensors: tensors.clear())), NAMES)
    headers: dict[str, bytes] = {
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
        "a header that is no JSON": struct.pack("<Q", 4) + b"oops",
        "a header of an unknown type": _header({"x": {"dtype": "F9", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        "a header beyond the file": _header({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}) + bytes(4),
        "a header that overlaps": _header(
            {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("x", "y")}
        )
        + bytes(4),
        "a header with a shape of 2^60": _header({"x": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 4]}}),
    }
    for name, data in headers.items():
        yield Case("models", f"weights: {name}", new(partial(WEIGHTS.write_bytes, data)), NAMES)
    indexes: dict[str, Any] = {
        "an index of a shard that is not there": {"weight_map": {"lm_head.weight": "gone.safetensors"}},
        "an index without a map": {"metadata": {}},
        "an index that is a list": [1],
        "an index of a path outside": {"weight_map": {"lm_head.weight": "../other/model.safetensors"}},
    }
    for name, index in indexes.items():
        yield Case("models", f"weights: {name}", new(partial(_index, index)), NAMES)


def _header(content: dict[str, Any]) -> bytes:
    data = json.dumps(content).encode()
    return struct.pack("<Q", len(data)) + data


def _resave(change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(WEIGHTS)
    change(tensors)
    save_file(tensors, WEIGHTS, {"format": "pt"})


def _fill(name: str, value: float, tensors: dict[str, torch.Tensor]) -> None:
    tensors[name].fill_(value)


def _more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.ones(2, 2)


def _index(content: Any) -> None:
    WEIGHTS.unlink()
    Path("model/model.safetensors.index.json").write_text(json.dumps(content))


# --- The tokenizer -----------------------------------------------------------------------------------------------


def _tokenizer_cases(chance: random.Random) -> Cases:
    changes: dict[str, tuple[Path, Callable[[Any], Any]]] = {
        "no end token": (TOKENIZER_CONFIG, drop("eos_token")),
        "an end token that is not there": (TOKENIZER_CONFIG, put("eos_token", value="<nope>")),
        "an end token that is a number": (TOKENIZER_CONFIG, put("eos_token", value=5)),
        "an unknown class": (TOKENIZER_CONFIG, put("tokenizer_class", value="NoSuchTokenizer")),
        "a class that is a number": (TOKENIZER_CONFIG, put("tokenizer_class", value=5)),
        "an unknown model": (TOKENIZER, put("model", "type", value="Nope")),
        "no vocabulary": (TOKENIZER, drop("model", "vocab")),
        "an empty vocabulary": (TOKENIZER, put("model", "vocab", value={})),
        "ids that are texts": (TOKENIZER, put("model", "vocab", value={"a": "x"})),
        "ids below 0": (TOKENIZER, put("model", "vocab", value={"a": -1})),
        "ids beyond the embedding": (TOKENIZER, _beyond),
        "an added token beyond the embedding": (TOKENIZER, _added),
        "merges of tokens that are not there": (TOKENIZER, put("model", "merges", value=[["q", "zz"]])),
        "no model": (TOKENIZER, drop("model")),
        "an unknown normalizer": (TOKENIZER, put("normalizer", value={"type": "Nope"})),
        "a list": (TOKENIZER, lambda _: []),
    }
    for name, (path, change) in changes.items():
        right = fine if name == "an unknown class" else None  # tokenizer.json says all
        prepare = new(partial(set_json, path, change))
        yield Case("models", f"tokenizer: {name}", prepare, (("tokenizer", "model"),), right, either=True)
    chat = [{"prompt": [{"role": "user", "content": "hi"}], "rejected": [{"role": "assistant", "content": "no"}]}]
    templates: dict[str, str] = {
        "that is not closed": "{% for m in messages %}{{ m.content }}",
        "with an unknown filter": "{{ messages | nothing_like_it }}",
        "that raises": "{{ raise_exception('not with me') }}",
        "that divides by 0": "{{ 1 / 0 }}{{ messages[0].content }}",
        "that repeats for long": "{% for i in range(999999999) %}{% for j in range(999) %}x{% endfor %}{% endfor %}",
        "that reaches for the system": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "that is empty": " ",
        "that says nothing of the messages": "hello",
        "that drops the answer": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    }
    for name, template in templates.items():
        yield Case("models", f"a chat template {name}", partial(_chat, chat, template), (("template", "row 1"),))
    yield Case("models", "messages without a chat template", partial(_chat, chat, None), ("chat template",))
    yield Case("models", "the tokenizer of another model", _foreign_tokenizer, ("tokenizer",), fine, either=True)


def _beyond(content: Any) -> None:
    vocab = content["model"]["vocab"]
    for token in [token for token, number in vocab.items() if number > 20]:
        vocab[token] += 1000


def _added(content: Any) -> None:
    token = {"id": 160, "content": " go", "special": False, "normalized": False}
    content["added_tokens"].append(token | {"single_word": False, "lstrip": False, "rstrip": False})


def _chat(records: list[Any], template: str | None) -> Call:
    Path("chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {}
    if template is not None:
        Path("chat.jinja").write_text(template)
        options = {"chat_template_path": "chat.jinja"}
    return train(dataset_name="chat.jsonl", anchors_dir="new", **options)


def _foreign_tokenizer() -> Call:
    content = json.loads(TOKENIZER.read_text())
    vocab = content["model"]["vocab"]
    names = sorted(vocab, key=vocab.__getitem__)
    content["model"]["vocab"] = dict(zip(names[:20] + names[20:][::-1], range(len(names)), strict=True))
    TOKENIZER.write_text(json.dumps(content))
    return train(anchors_dir="new")


# --- Code in the folder ------------------------------------------------------------------------------------------

_CODE = """open({place!r}, 'w').write('run')
from transformers import LlamaConfig, LlamaForCausalLM
class Mine(LlamaForCausalLM): pass
class MineConfig(LlamaConfig): model_type = 'mine'
"""


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def _code_cases() -> Cases:
    def remote(file: str, stdin: str) -> Case:
        def prepare() -> Call:
            Path("model/mine.py").write_text(_CODE.format(place=str(Path("pwned").resolve())))
            classes = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
            if file == "config.json":
                set_json(CONFIG, lambda found: found | {"auto_map": classes, "model_type": "mine"})
            elif file == "a known kind":
                set_json(CONFIG, lambda found: found | {"auto_map": classes})
            else:
                value = {"AutoTokenizer": ["mine.Mine", None]}
                set_json(TOKENIZER_CONFIG, lambda found: found | {"auto_map": value, "tokenizer_class": "Mine"})
            return train(anchors_dir="new")

        name = f"code named by {file}, {'yes to all questions' if stdin else 'nothing to read'}"
        harmless = fine if file != "config.json" else None
        return Case("models", name, prepare, (("trust_remote_code", "code"), *NAMES), harmless, True, stdin=stdin)

    for file in ("config.json", "a known kind", "tokenizer_config.json"):
        for stdin in ("", "y\n" * 1000):
            yield remote(file, stdin)
    for name in ("pytorch_model.bin", "model.bin"):
        yield Case("models", f"a pickle that runs code as {name}", new(partial(_pickled, name)), NAMES)
    yield Case("models", "a pickle of the weights", new(_honest_pickle), NAMES, fine, either=True)


def _pickled(name: str) -> None:
    WEIGHTS.unlink()
    Path("model", name).write_bytes(pickle.dumps({"lm_head.weight": _Evil()}))


def _honest_pickle() -> None:
    torch.save(load_file(WEIGHTS), "model/pytorch_model.bin")
    WEIGHTS.unlink()


# --- Architectures -----------------------------------------------------------------------------------------------


def _architecture_cases() -> Cases:
    import transformers as hf

    small = {"vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    gpt2 = {"vocab_size": 160, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    t5 = {"vocab_size": 160, "d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 32, "d_kv": 16}
    made: dict[str, tuple[Callable[[], Any], tuple[Any, ...]]] = {
        "an encoder (BERT)": (lambda: hf.BertForMaskedLM(hf.BertConfig(**small, intermediate_size=32)), NAMES),
        "a decoder from an encoder": (
            lambda: hf.BertLMHeadModel(hf.BertConfig(**small, intermediate_size=32, is_decoder=False)),
            ((*NAMES[0], "Bert"),),
        ),
        "an encoder and a decoder (T5)": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5)), NAMES),
        "8 learned positions": (
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2, n_positions=8)),
            (("max_length", "positions"),),
        ),
        "a smaller vocabulary": (
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**(gpt2 | {"vocab_size": 100}), n_positions=64)),
            (("tokenizer", "vocab"),),
        ),
        "an untied model without a head": (
            lambda: hf.GPT2Model(hf.GPT2Config(**gpt2, n_positions=64, tie_word_embeddings=False)),
            NAMES,
        ),
        "a classifier": (lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**gpt2, n_positions=64)), NAMES),
    }
    for name, (make, words) in made.items():
        yield Case("models", f"another model: {name}", new(partial(_made, make)), words)


def _made(make: Callable[[], Any]) -> None:
    model = make()
    for path in (WEIGHTS, CONFIG, Path("model/generation_config.json")):
        path.unlink()
    model.save_pretrained("model")


# --- Other models of a run ---------------------------------------------------------------------------------------


def _reference_cases(chance: random.Random) -> Cases:
    """References and classifiers that are damaged."""
    for setting in ("ref_model_neg", "ref_model_pos", "anchor_score"):
        for file in ("model.safetensors", "config.json"):
            damages = {name: damage for name, damage in byte_damages(chance, flips=0).items() if "zeros" not in name}
            if file == "config.json":
                damages = {name: damage for name, damage in damages.items() if not name.startswith("without")}
            for name, damage in some(chance, damages.items(), 4):
                prepare = partial(_referred, setting, partial(damage, Path("other", file)))
                yield Case(
                    "models", f"{setting}, {file}: {name}", prepare, ((setting, "'other'", "other/", "./other"),)
                )
    whole: dict[str, tuple[str, Callable[[], Any]]] = {
        "a model as a classifier": ("anchor_score", lambda: None),
        "a classifier of two labels": ("anchor_score", partial(_classifier, num_labels=2)),
        "a smaller vocabulary": ("ref_model_neg", partial(_reference, vocab_size=80)),
        "an encoder": ("ref_model_pos", partial(_classifier, num_labels=1)),
    }
    for name, (setting, change) in whole.items():
        yield Case("models", f"{setting} is {name}", partial(_referred, setting, change), ((setting, "./other"),))


def _referred(setting: str, change: Callable[[], Any]) -> Call:
    change()
    more = {"min_anchor_score": 0.0} if setting == "anchor_score" else {}
    return train(anchors_dir="new", **{setting: "./other"}, **more)


def _classifier(num_labels: int) -> None:
    import transformers as hf

    config = hf.BertConfig(
        vocab_size=160, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.num_labels = num_labels
    hf.BertForSequenceClassification(config).save_pretrained("other")


def _reference(vocab_size: int) -> None:
    from tiny import tiny_model

    tiny_model(vocab_size=vocab_size).save_pretrained("other")


# --- Folders that are odd and right ------------------------------------------------------------------------------


def _right_cases() -> Cases:
    same = same_weights("out", "out")
    odd: dict[str, Callable[[], Any]] = {
        "without generation_config.json": lambda: os.unlink("model/generation_config.json"),
        "with a file of the user": lambda: Path("model/notes.txt").write_text("mine"),
        "without transformers_version": lambda: set_json(CONFIG, drop("transformers_version")),
        "with a model card": lambda: Path("model/README.md").write_text("---\nbad: [\n"),
        "under another name": lambda: (os.rename("model", "mödel x"), os.symlink("mödel x", "model")),
    }
    for name, change in odd.items():
        yield Case("models", f"the same model {name}", partial(_same, change), right=same)
    hostile = {"temperature": "hot", "do_sample": 5, "max_length": -1}
    for name, content in {"garbage": "{", "wrong types": json.dumps(hostile), "a list": "[1]", "empty": ""}.items():
        path = Path("model/generation_config.json")
        words = (("generation_config", *NAMES[0]),)
        yield Case(
            "models", f"generation_config.json: {name}", new(partial(path.write_text, content)), words, fine, True
        )


def _same(change: Callable[[], Any]) -> Call:
    change()
    return train()


# --- Adapters ----------------------------------------------------------------------------------------------------

ADAPTER = Path("lora/checkpoint-4")
#: fields of adapter_config.json with values that are wrong
WRONG_ADAPTER: dict[str, tuple[Any, ...]] = {
    "base_model_name_or_path": (None, "./gone", "nobody/none", 5, "", "lora/checkpoint-2", "rows.jsonl"),
    "peft_type": ("NOPE", None, 5, "PROMPT_TUNING"),
    "task_type": ("SEQ_CLS", "NOPE"),
    "r": (0, -1, "x", None, 5),
    "lora_alpha": ("x", None),
    "target_modules": (["zz"], None, 5, [], "(q"),
    "lora_dropout": ("x", 7.0),
    "bias": ("some", 5),
}


def adapter_cases(chance: random.Random, good: Path) -> Cases:
    """``model_name_or_path`` is an adapter that is damaged."""
    words = (("adapter", "lora", "model_name_or_path"),)

    def case(name: str, change: Callable[[], Any], right: Check | None = None) -> Case:
        prepare = new(change, model_name_or_path=str(ADAPTER))
        return Case("adapters", name, prepare, words, right, either=True, needs=("lora",))

    yield case("nothing is wrong", lambda: None, fine)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        for name, damage in byte_damages(chance, flips=0).items():
            right = fine if name.startswith(("zeros", "without")) else None
            right = None if file.endswith("json") and name.startswith("zeros") else right
            right = None if file.endswith("tensors") and name.startswith("without") else right
            yield case(f"{file}: {name}", partial(damage, ADAPTER / file), right)
    for field, values in WRONG_ADAPTER.items():
        for value in some(chance, values, 3):
            harmless = field in ("task_type", "lora_dropout", "lora_alpha", "bias") or (field, value) == ("r", "x")
            change = partial(set_json, ADAPTER / "adapter_config.json", put(field, value=value))
            yield case(f"{field}: {value!r}", change, fine if harmless else None)
    path = ADAPTER / "adapter_model.safetensors"
    for tensor in some(chance, sorted(load_file(good / "lora" / path)), 2):
        for name, change in TENSOR_DAMAGES.items():
            right = fine if name.startswith("half") else None
            yield case(f"{name} {tensor}", partial(_resaved, path, partial(change, name=tensor)), right)
    yield case("the base is gone", lambda: shutil.rmtree("model"))
    yield case("the base is another model", lambda: shutil.copy("other/model.safetensors", "model"), fine)


def _resaved(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})

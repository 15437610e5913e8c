"""Settings with values of a wrong type or out of range, from YAML, flags and Python; settings files that are damaged.

The bad values of a setting follow from its type and its rules.
"""

from __future__ import annotations

import dataclasses
import decimal
import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import numpy
import torch
import yaml

from case import TRAIN, Call, Case, Cases, byte_damages, fine, same_weights, set_yaml, some, train
from d2o_fast.config import FIELDS, KINDS, D2OConfig

#: settings that have no effect without others, with values for these
COMPANIONS: dict[str, dict[str, Any]] = {
    "server_model": {"server_url": "http://127.0.0.1:9/v1"},
    "min_anchor_score": {"anchor_score": "userland:score"},
    **{name: {"use_peft": True} for name in FIELDS if name.startswith("lora_")},
}


def bad_values(name: str) -> dict[str, Any]:
    """{its YAML: a value that the setting must refuse}"""
    kinds = get_args(KINDS[name]) if get_origin(KINDS[name]) not in (None, list, Literal) else (KINDS[name],)
    rules, found = FIELDS[name].metadata, list[Any]()
    numbers = int in kinds or float in kinds
    texts = str in kinds or any(get_origin(kind) is Literal for kind in kinds)
    lists = any(get_origin(kind) is list for kind in kinds)
    if numbers:
        found += ["abc", "1e-5x", [1], {"a": 1}, True, math.nan, math.inf, -math.inf, 10**23, -(10**400), "", "0x1g"]
        found += [rules["min"] - 1, rules["min"] - 0.5] if "min" in rules else []
        found += [rules["above"], rules["above"] - 1] if "above" in rules else []
        found += [rules["max"] + 1, rules["max"] + 1e-6] if "max" in rules else []
        found += [rules["below"], rules["below"] + 3] if "below" in rules else []
        found += [1.5, 2.000001] if float not in kinds else []
    elif bool in kinds:
        found += ["sometimes", 2, 0.5, [True], {"true": 1}, "wahr", 10**30]
    else:
        found += [5, 1.5, True, {"a": "b"}, [["a"]], math.nan]
        found += [[1], [""], [None], [{}]] if lists else [["a"]]
        found += ["   ", "\t"] if texts else []
    literal = [kind for kind in kinds if get_origin(kind) is Literal]
    if literal and bool not in kinds:
        choice = str(get_args(literal[0])[0])
        found += [choice.upper(), choice + "s", choice[:-1], f" {choice}"]
    if lists and str not in kinds:
        found += ["duplicates", ["duplicates"], ["empty", 3]]
    if NoneType not in kinds and not lists:
        found.append(None)
    return {_text(value): value for value in found}


def _text(value: Any) -> str:
    found = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
    return found if len(found) < 60 else found[:50] + "..."


def _each(chance: random.Random, count: int, rest: int = 0) -> Iterator[tuple[str, str, Any]]:
    """``count`` bad values of every setting."""
    for name in FIELDS:
        for text, value in some(chance, bad_values(name).items(), count):
            yield name, text, value


# --- The settings file -------------------------------------------------------------------------------------------


def yaml_cases(chance: random.Random, good: Path) -> Cases:
    for name, text, value in _each(chance, 2):
        yield Case("yaml", f"{name}: {text}", _in_file(name, value), (name,))
    for name, text in HOSTILE_YAML.items():
        yield Case("yaml", name, _appended(text[0]), text[1:])
    for name in some(chance, FIELDS, 6):
        line = f"{name}: {_text(getattr(D2OConfig(), name))}\n"
        yield Case("yaml", f"{name} twice", _appended(line * 2), (name,))
        near = name.replace("_", "-") if "_" in name and chance.random() < 0.5 else name + chance.choice("sx_")
        yield Case("yaml", f"{near}, a wrong name", _appended(f"{near}: 1\n"), (near,))
    for name, damage in byte_damages(chance, flips=0).items():
        words: tuple[str | tuple[str, ...], ...] = ("c.yaml",)
        if name == "empty":
            words = (("dataset_name", "model_name_or_path"),)
        elif name.startswith(("cut", "without", "zeros")):
            continue  # a part of a YAML file is a YAML file
        yield Case("yaml", f"the file: {name}", _damaged_file(damage), words)
    for name, change in SAME_YAML.items():
        yield Case("yaml", name, _rewritten(change), right=same_weights("out", "out"))
    for name, settings, word in RELATIONS:
        yield Case("yaml", name, partial(train, **settings), (word,))
    for name, settings in LARGE.items():
        yield Case("yaml", name, partial(train, **settings), right=fine)


def _in_file(name: str, value: Any) -> Callable[[], Call]:
    def prepare() -> Call:
        set_yaml("c.yaml", **COMPANIONS.get(name, {}))
        settings = yaml.safe_load(Path("c.yaml").read_text()) | {name: value}
        Path("c.yaml").write_text(yaml.safe_dump(settings))
        return TRAIN

    return prepare


def _appended(text: str) -> Callable[[], Call]:
    def prepare() -> Call:
        with open("c.yaml", "a", encoding="utf-8") as file:
            file.write(text)
        return TRAIN

    return prepare


def _damaged_file(damage: Callable[[Path], None]) -> Callable[[], Call]:
    def prepare() -> Call:
        damage(Path("c.yaml"))
        return TRAIN

    return prepare


def _rewritten(change: Callable[[bytes], bytes]) -> Callable[[], Call]:
    def prepare() -> Call:
        Path("c.yaml").write_bytes(change(Path("c.yaml").read_bytes()))
        return TRAIN

    return prepare


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
#: text at the end of c.yaml, and the words of the message
HOSTILE_YAML: dict[str, tuple[str, ...]] = {
    "a text without a name": ("\njust words\n", "c.yaml"),
    "an open quote": ('judge: "never closed\n', "c.yaml"),
    "a tab as indentation": ("report_to:\n\t- none\n", "c.yaml"),
    "an open list": ("report_to: [none\n", "c.yaml"),
    "a Python object": ("judge: !!python/object/apply:os.system ['echo bad > pwned']\n", "c.yaml"),
    "an unknown tag": ("judge: !mine x\n", "c.yaml"),
    "an unknown alias": ("judge: *nothing\n", "c.yaml"),
    "aliases that grow": (_BOMB, "c.yaml"),
    "two documents": ("---\nseed: 1\n", "c.yaml"),
    "lists 3000 deep": ("report_to: " + "[" * 3000 + "]" * 3000 + "\n", "c.yaml"),
    "lists 100000 deep": ("report_to: " + "[" * 100000 + "]" * 100000 + "\n", "c.yaml"),
    "an open list 100000 deep": ("report_to: " + "[" * 100000 + "\n", "c.yaml"),
    "a number of 6000 digits": ("seed: " + "9" * 6000 + "\n", "c.yaml"),
    "a number of 400 digits": ("learning_rate: " + "9" * 400 + "\n", "learning_rate"),
    "a number as a name": ("7: 1\n", "c.yaml"),
    "nothing as a name": ("~: 1\n", "c.yaml"),
    "a list as a name": ("[a, b]: 1\n", "c.yaml"),
    "a mapping as a name": ("{a: b}: 1\n", "c.yaml"),
    "true as a name": ("true: 1\n", "c.yaml"),
    "a date": ("seed: 2020-01-01\n", "seed"),
    "a day that there is not": ("seed: 2020-13-45\n", "c.yaml"),
    "base 60": ("learning_rate: 1:30:99x\n", "learning_rate"),
    "a merge of no mapping": ("<<: 5\n", "c.yaml"),
    "an escape sequence": ('judge: "\\e[31mred"\n', "judge"),
    "a control character": ("judge: \x01\n", "c.yaml"),
    "a name with an escape sequence": ('"\\e[31mseed": 1\n', "c.yaml"),
    "a name of 100000 letters": ("s" * 100000 + ": 1\n", "c.yaml"),
    "a null character in a path": ('dataset_split: x\noutput_dir: "a\\0b"\n', "output_dir"),
    "a set": ("report_to: !!set {none}\n", "report_to"),
    "bytes": ("judge: !!binary aGk=\n", "judge"),
}
SAME_YAML: dict[str, Callable[[bytes], bytes]] = {
    "lines that end in CR LF": lambda data: data.replace(b"\n", b"\r\n"),
    "a byte-order mark": lambda data: b"\xef\xbb\xbf" + data,
    "comments": lambda data: b"# first\n\n" + data + b"# last",
    "one document with a start": lambda data: b"---\n" + data,
    "no last newline": lambda data: data.rstrip(b"\n"),
    "flow style": lambda data: yaml.safe_dump(yaml.safe_load(data), default_flow_style=True).encode(),
    "numbers in other forms": lambda data: data.replace(b"0.001", b"1e-3"),
}
#: two settings that contradict each other, or one that lacks its companion; the setting that is named
RELATIONS: list[tuple[str, dict[str, Any], str]] = [
    ("alpha and beta 0", {"alpha": 0, "beta": 0}, "alpha"),
    ("max_completion_length = max_length", {"max_completion_length": 48}, "max_completion_length"),
    ("max_completion_length > max_length", {"max_completion_length": 4000}, "max_completion_length"),
    ("num_draws < num_generations", {"num_draws": 1}, "num_draws"),
    ("anchor_score alone", {"anchor_score": "userland:score"}, "anchor_score"),
    ("min_anchor_score alone", {"min_anchor_score": 1.0}, "min_anchor_score"),
    ("server_model alone", {"server_model": "x"}, "server_model"),
    ("lora_r without use_peft", {"lora_r": 4}, "lora_r"),
    ("lora_target_modules without use_peft", {"lora_target_modules": ["q_proj"]}, "lora_target_modules"),
    ("lora_dropout without use_peft", {"lora_dropout": 0.5}, "lora_dropout"),
    ("a refresh with a server", {"refresh_every": 1, "server_url": "http://127.0.0.1:9"}, "refresh_every"),
    ("a refresh with a reference", {"refresh_every": 1, "ref_model_neg": "other"}, "refresh_every"),
    ("no steps", {"max_steps": 0}, "max_steps"),
    ("no epochs", {"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs"),
    ("epochs below 0", {"max_steps": -1, "num_train_epochs": -2.5}, "num_train_epochs"),
    ("a part of a warm-up step", {"warmup_steps": 1.5}, "warmup_steps"),
    ("two warm-ups", {"warmup_steps": 2, "warmup_ratio": 0.5}, "warmup_ratio"),
    ("eval_steps without data", {"eval_steps": 1}, "eval_steps"),
    ("a judge without data", {"judge": "userland:judge"}, "judge"),
    ("two sources of held-out data", {"eval_fraction": 0.3, "eval_dataset_name": "held_out.jsonl"}, "eval_fraction"),
    ("a share that leaves no training rows", {"eval_fraction": 0.999999}, "eval_fraction"),
    ("a share that holds nothing out", {"eval_fraction": 1e-12}, "eval_fraction"),
    ("no model", {"model_name_or_path": None}, "model_name_or_path"),
    ("no data", {"dataset_name": None}, "dataset_name"),
    ("a model that is not there", {"model_name_or_path": "./no-model"}, "./no-model"),
    ("a model that is not on the hub", {"model_name_or_path": "nobody/no-model"}, "nobody/no-model"),
    ("a model with a bad name", {"model_name_or_path": "a b//c?d"}, "model_name_or_path"),
    ("a model that is a file", {"model_name_or_path": "./rows.jsonl"}, "model_name_or_path"),
    ("data that are not on the hub", {"dataset_name": "nobody/no-data"}, "nobody/no-data"),
    ("an unknown attention", {"attn_implementation": "flash_attention_9"}, "attn_implementation"),
    ("an attention that needs a GPU", {"attn_implementation": "flash_attention_2"}, "attn_implementation"),
    ("liger-kernel on a CPU", {"use_liger_kernel": True}, "use_liger_kernel"),
    ("an unknown logger", {"report_to": "wandb"}, "report_to"),
    ("a logger and none", {"report_to": ["tensorboard", "none"]}, "report_to"),
    ("a template that is not there", {"chat_template_path": "no.jinja"}, "chat_template_path"),
    ("a template that is a folder", {"chat_template_path": "model"}, "chat_template_path"),
    ("a template that is no text", {"chat_template_path": "model/model.safetensors"}, "chat_template_path"),
    ("LoRA on modules that are not there", {"use_peft": True, "lora_target_modules": ["w_zz"]}, "lora_target_modules"),
    ("LoRA with a bad pattern", {"use_peft": True, "lora_target_modules": "(q_proj"}, "lora_target_modules"),
    ("a reference that is not there", {"ref_model_neg": "./nowhere"}, "ref_model_neg"),
    ("a reference that is a file", {"ref_model_pos": "./rows.jsonl"}, "ref_model_pos"),
    ("no checkpoint to resume from", {"resume_from_checkpoint": "latest"}, "resume_from_checkpoint"),
    ("a checkpoint that is not there", {"resume_from_checkpoint": "out/checkpoint-7"}, "resume_from_checkpoint"),
    ("lengths below a prompt", {"max_length": 2, "max_completion_length": 1}, "max_length"),
    ("lengths that int32 cannot hold", {"max_length": 2**40, "max_completion_length": 2**39}, "max_completion_length"),
    ("a step that overflows", {"learning_rate": 3e38, "max_steps": 1, "warmup_steps": 0}, "learning_rate"),
    ("2^62 steps per epoch", {"max_steps": -1, "num_train_epochs": 1e300}, "num_train_epochs"),
    ("2^40 anchors", {"num_generations": 2**40, "anchors_dir": "new"}, "num_generations"),
    (
        "2^40 requests at a time",
        {"server_concurrency": 2**40, "server_url": "http://127.0.0.1:9", "anchors_dir": "new"},
        "server_",
    ),
    (
        "a time-out that no clock has",
        {"server_timeout": 1e300, "server_url": "http://127.0.0.1:9", "anchors_dir": "new"},
        "server_",
    ),
    ("an adapter of rank 2^40", {"use_peft": True, "lora_r": 2**40}, "lora_r"),
]
#: values that are odd, and mean the same as smaller ones
LARGE: dict[str, dict[str, Any]] = {
    "epochs that are too few for a step": {"max_steps": -1, "num_train_epochs": 1e-9},
    "a batch of 2^30 prompts": {"per_device_train_batch_size": 2**30},
    "2^30 micro-batches": {"gradient_accumulation_steps": 2**30},
    "the largest seed": {"seed": 2**63 - 1},
    "checkpoints every 2^30 steps": {"save_steps": 2**30, "logging_steps": 2**30},
}


# --- Flags -------------------------------------------------------------------------------------------------------


def flag_cases(chance: random.Random, good: Path) -> Cases:
    for name in FIELDS:
        kinds = get_args(KINDS[name]) or (KINDS[name],)
        if str in kinds:
            continue  # such a flag takes any text; the yaml cases hold texts that name nothing
        for text, value in some(chance, bad_values(name).items(), 1):
            if isinstance(value, str) or value is None or _text(value) != text:
                text = chance.choice(["abc", "", "[", "{a", "1e", "--", "0x", "'"])
            yield Case("flags", f"--{name}={text}", _with(f"--{name}={text}", COMPANIONS.get(name, {})), (name,))
    for name, arguments, words in ODD_FLAGS:
        yield Case("flags", name, lambda arguments=arguments: list(arguments), words)
    for name in some(chance, FIELDS, 5):
        near = name[:-1] if chance.random() < 0.5 else name + chance.choice("sxe")
        yield Case("flags", f"--{near}", lambda near=near: [*TRAIN, f"--{near}", "1"], (near,))
        yield Case("flags", f"--{name} without a value", lambda name=name: [*TRAIN, f"--{name}"], (name,))
    same = same_weights("out", "out")
    yield Case("flags", "no c.yaml, all settings as flags", _all_flags, right=same)
    yield Case("flags", "a flag with =", lambda: [*TRAIN, "--max_steps=2"], right=same)
    yield Case(
        "flags", "a flag before the file", lambda: ["train", "--max_steps", "2", "--config", "c.yaml"], right=same
    )


def _with(flag: str, settings: dict[str, Any]) -> Callable[[], Call]:
    return lambda: [*train(**settings), flag]


def _all_flags() -> Call:
    settings = yaml.safe_load(Path("c.yaml").read_text())
    return ["train", *(f"--{name}={value}" for name, value in settings.items())]


_LONG = "x" * 200_000
ODD_FLAGS: list[tuple[str, list[str], tuple[str, ...]]] = [
    ("no file at all", ["train"], ("dataset_name",)),
    ("an unknown command", ["trian", "c.yaml"], ("trian",)),
    ("an empty command", ["", "c.yaml"], ("command",)),
    ("a command with an escape sequence", ["\x1b[31mtrain", "c.yaml"], ("command",)),
    ("two files", ["train", "c.yaml", "c.yaml"], ("c.yaml",)),
    ("a file that is not there", ["train", "no.yaml"], ("no.yaml",)),
    ("a folder as a file", ["train", "model"], ("model",)),
    ("an empty file name", ["train", ""], ("settings file",)),
    ("a file name with a null", ["train", "a\0b"], ("settings file",)),
    ("a file name of 200000 letters", ["train", _LONG], ("settings file",)),
    ("a file name that is not UTF-8", ["train", "no\udcff.yaml"], ("settings file",)),
    ("--config without a file", ["train", "--config"], ("config",)),
    ("a short flag", ["train", "c.yaml", "-x"], ("-x",)),
    ("-- alone", ["train", "c.yaml", "--", "x"], ("--",)),
    ("a value that is no flag", ["train", "c.yaml", "seed", "3"], ("seed",)),
    ("a value of 200000 letters", ["train", "c.yaml", "--judge", _LONG], ("judge",)),
    ("a value that is not UTF-8", ["train", "c.yaml", "--output_dir", "a\udcff\0"], ("output_dir",)),
    ("a value with an escape sequence", ["train", "c.yaml", "--judge", "\x1b[2Jx"], ("judge",)),
    ("a list 100000 deep", ["train", "c.yaml", "--drop_anchors", "[" * 100000], ("drop_anchors",)),
    ("a number of 6000 digits", ["train", "c.yaml", "--seed", "9" * 6000], ("seed",)),
    ("an alias", ["train", "c.yaml", "--seed", "*x"], ("seed",)),
    ("a Python object", ["train", "c.yaml", "--seed", "!!python/name:os.system"], ("seed",)),
    ("--dry-run of train", ["train", "c.yaml", "--dry-run"], ("dry-run",)),
    ("--eval_model of train", ["train", "c.yaml", "--eval_model", "x"], ("eval_model",)),
    ("an eval model that is not there", ["eval", "c.yaml", "--eval_dataset_name", "held_out.jsonl"], ("out",)),
    ("eval without data", ["eval", "c.yaml"], ("eval_dataset_name",)),
    ("anchors without an action", ["anchors"], ("action",)),
    ("anchors with an unknown action", ["anchors", "look", "anchors"], ("look",)),
    ("anchors without a folder", ["anchors", "inspect"], ("folder",)),
    ("inspect with a file to write", ["anchors", "inspect", "anchors/train", "x.jsonl"], ("inspect",)),
    ("export without a file", ["anchors", "export", "anchors/train"], ("export",)),
    ("inspect of a folder that is not there", ["anchors", "inspect", "nowhere"], ("nowhere",)),
    ("inspect of a file", ["anchors", "inspect", "rows.jsonl"], ("rows.jsonl",)),
    ("inspect of a model", ["anchors", "inspect", "model"], ("model",)),
    ("doctor with an argument", ["doctor", "now"], ("now",)),
    ("demo with a bad seed", ["demo", "--seed", "x", "--output_dir", "demo"], ("seed",)),
    ("demo with a seed below 0", ["demo", "--seed", "-1", "--quick", "--output_dir", "demo"], ("seed",)),
    ("demo with a seed of 24 digits", ["demo", "--seed", "1" * 24, "--quick", "--output_dir", "demo"], ("seed",)),
    ("demo in a file", ["demo", "--quick", "--output_dir", "rows.jsonl"], ("rows.jsonl",)),
    ("demo with an unknown flag", ["demo", "--fast"], ("fast",)),
]


# --- Python ------------------------------------------------------------------------------------------------------


def python_cases(chance: random.Random, good: Path) -> Cases:
    kind = "settings from Python"
    for name in FIELDS:
        kinds = get_args(KINDS[name]) or (KINDS[name],)
        values = bad_values(name) | _objects(kinds)
        for text, value in some(chance, values.items(), 2):
            yield Case(kind, f"{name}={text}", partial(_config, name, value), (name,))
    for name, value, wanted in SAME_VALUES:
        prepare = partial(_config, name, value, [wanted])
        yield Case(kind, f"{name}={value!r}", prepare, right=fine)
    yield Case(kind, "replaced by a bad value", lambda: lambda: dataclasses.replace(D2OConfig(), seed=-1), ("seed",))


def _config(name: str, value: Any, wanted: Sequence[Any] = ()) -> Callable[[], Any]:
    """The call that makes a D2OConfig; it must keep the value as the one in ``wanted``."""

    def call() -> None:
        found = getattr(D2OConfig(**(COMPANIONS.get(name, {}) | {name: value})), name)
        if wanted and (found != wanted[0] or type(found) is not type(wanted[0])):
            raise AssertionError(f"kept as {found!r}")

    return call


def _objects(kinds: tuple[Any, ...]) -> dict[str, Any]:
    """Values that only Python has, and that no setting takes."""
    found: dict[str, Any] = {
        "object()": object(),
        "1j": 1j,
        "a set": {1},
        "a function": len,
        "bytes": b"1",
        "an array of two": numpy.ones(2),
        "a tensor of two": torch.ones(2),
        "a class": int,
        "a generator": (i for i in range(2)),
        "Decimal": decimal.Decimal("NaN"),
    }
    if bool not in kinds:
        found["numpy.bool"] = numpy.bool_(True)
    if int in kinds or float in kinds:
        found |= {"numpy.nan": numpy.float32("nan"), "numpy.int64 below all": numpy.int64(-(2**62))}
    return found


SAME_VALUES: list[tuple[str, Any, Any]] = [
    ("learning_rate", numpy.float64(0.5), 0.5),
    ("num_generations", numpy.int32(3), 3),
    ("output_dir", Path("a") / "b", "a/b"),
    ("drop_anchors", ("empty",), ["empty"]),
    ("dataset_name", ("a.jsonl", "b.jsonl"), ["a.jsonl", "b.jsonl"]),
    ("report_to", "none", []),
    ("report_to", None, []),
    ("shared_prefix", False, False),
]

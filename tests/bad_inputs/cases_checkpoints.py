"""Checkpoints: every file with every damage, wrong values in every field, other settings; damaged trained models.

A damaged checkpoint must be refused before training, by the names of the file and of the newest whole checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from case import Call, Case, Cases, byte_damages, drop, fine, put, same_weights, says, set_json, some, void
from d2o_fast.config import having

LAST, FIRST = "checkpoint-4", "checkpoint-2"


def resume(run: str, checkpoint: str = "latest") -> Call:
    return ["train", f"{run}.yaml", "--resume_from_checkpoint", checkpoint]


def cases(chance: random.Random, good: Path) -> Cases:
    """All cases of the kind."""
    for run in ("run", "lora", "online"):
        folder = good / run / run / LAST
        for path in sorted(folder.iterdir()):
            damages = byte_damages(chance, flips=3 if path.suffix in (".safetensors", ".pt") else 1)
            for name, damage in some(chance, damages.items(), 11 if run == "run" else 3):
                yield _file(run, path.name, name, damage, chance)
            other = good / run / run / FIRST / path.name
            if other.read_bytes() != path.read_bytes():
                yield _file(run, path.name, f"that of {FIRST}", partial(_copy, f"{run}/{FIRST}/{path.name}"), chance)
    yield from _state_cases(chance, good)
    yield from _tensor_cases(chance, good)
    yield from _run_cases(chance)


def _file(run: str, file: str, name: str, damage: Callable[[Path], None], chance: random.Random) -> Case:
    by_name = chance.random() < 0.3

    def prepare() -> Call:
        damage(Path(run, LAST, file))
        return resume(run, f"{run}/{LAST}" if by_name else "latest")

    how = "by name" if by_name else "latest"
    return Case("checkpoints", f"{run}, {file}: {name} ({how})", prepare, (file, LAST, FIRST), needs=(run,))


def _copy(source: str, target: Path) -> None:
    shutil.copy(source, target)


# --- Fields of trainer_state.json and of other JSON files --------------------------------------------------------

_WRONG: dict[str, Any] = {
    "nothing": None,
    "a text": "x",
    "-1": -1,
    "a fraction": 2.5,
    "true": True,
    "a list": [],
    "an object": {},
    "10^30": 10**30,
    "3": 3,
}


def _state_cases(chance: random.Random, good: Path) -> Cases:
    state = json.loads((good / "run" / "run" / LAST / "trainer_state.json").read_text())
    for key in state:
        for name, value in some(chance, _WRONG.items(), 3):
            if value != state[key]:
                yield _change("trainer_state.json", f"{key}: {name}", put(key, value=value))
        yield _change("trainer_state.json", f"without {key}", drop(key))
    yield _change("trainer_state.json", "an unknown field", put("surprise", value=1))
    yield _change("trainer_state.json", "a list", lambda _: [1])
    for key in some(chance, state["config"], 3):
        yield _change("trainer_state.json", f"without the setting {key}", drop("config", key))
    config = json.loads((good / "run" / "run" / LAST / "config.json").read_text())
    more: dict[str, Callable[[Any], Any]] = {
        "a layer more": put("num_hidden_layers", value=3),
        "a layer less": put("num_hidden_layers", value=1),
        "another activation": put("hidden_act", value="gelu"),
        "another norm": put("rms_norm_eps", value=0.5),
        "another kind": put("model_type", value="mistral"),
    }
    for name, change in more.items():
        yield _change("config.json", name, change)
    for key in some(chance, config, 4):
        yield _change("config.json", f"without {key}", drop(key))
    adapter = {"another scale": put("lora_alpha", value=64), "another rank": put("r", value=3)}
    for name, change in adapter.items():
        yield _change("adapter_config.json", name, change, "lora")


def _change(file: str, name: str, change: Callable[[Any], Any], run: str = "run") -> Case:
    def prepare() -> Call:
        set_json(Path(run, LAST, file), change)
        return resume(run)

    return Case("checkpoints", f"{run}, {file}: {name}", prepare, (file, LAST, FIRST), needs=(run,))


# --- Tensors -----------------------------------------------------------------------------------------------------


def _tensor_cases(chance: random.Random, good: Path) -> Cases:
    for run, file in (("run", "model.safetensors"), ("lora", "adapter_model.safetensors")):
        names = sorted(load_file(good / run / run / LAST / file))
        for tensor in some(chance, names, 3):
            for name, change in TENSOR_DAMAGES.items():
                yield _tensors(run, file, f"{name} {tensor}", partial(change, name=tensor))
    optimizer: dict[str, Callable[[Any], Any]] = {
        "no state": lambda found: found | {"state": {}},
        "a step of text": lambda found: found["state"][0].__setitem__("step", "x"),
        "a moment of NaN": lambda found: found["state"][1]["exp_avg"].fill_(float("nan")),
        "a moment of another shape": lambda found: found["state"][1].__setitem__("exp_avg", torch.zeros(3)),
        "no groups": lambda found: found.pop("param_groups"),
        "a list": lambda found: [found],
    }
    for name, change in optimizer.items():
        yield _saved("optimizer.pt", name, change)
    random_state: dict[str, Callable[[Any], Any]] = {
        "no sums": lambda found: found.pop("sums"),
        "no generator": lambda found: found.pop("cpu"),
        "a short generator": lambda found: found.__setitem__("cpu", found["cpu"][:5]),
        "another type": lambda found: found.__setitem__("cpu", found["cpu"].float()),
        "sums of NaN": lambda found: found["sums"].fill_(float("nan")),
        "a list": lambda found: [1],
    }
    for name, change in random_state.items():
        yield _saved("rng_state.pth", name, change)


def _without(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _renamed(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}x"] = tensors.pop(name)


def _reshaped(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.zeros(3, 5)


def _not_numbers(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(-1)[0] = float("nan")


def _halved(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].bfloat16()


TENSOR_DAMAGES: dict[str, Callable[..., None]] = {
    "without": _without,
    "another name of": _renamed,
    "another shape of": _reshaped,
    "a NaN in": _not_numbers,
    "half the bits of": _halved,
}


def _tensors(run: str, file: str, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Case:
    def prepare() -> Call:
        path = Path(run, LAST, file)
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
        return resume(run)

    return Case("checkpoints", f"{run}, {file}: {name}", prepare, (file, LAST, FIRST), needs=(run,))


def _saved(file: str, name: str, change: Callable[[Any], Any]) -> Case:
    def prepare() -> Call:
        path = Path("run", LAST, file)
        found = torch.load(path)
        changed = change(found)
        torch.save(
            changed if isinstance(changed, list) or (file.startswith("opt") and name == "no state") else found, path
        )
        return resume("run")

    return Case("checkpoints", f"run, {file}: {name}", prepare, (file, LAST, FIRST), needs=("run",))


# --- The run around a checkpoint ---------------------------------------------------------------------------------


def _run_cases(chance: random.Random) -> Cases:
    log = "metrics.jsonl"
    for name, (run, change, words) in RUN_DAMAGES.items():
        needs = (run, "lora") if change is _foreign else (run,)
        right = says("metrics.jsonl") if name == "metrics.jsonl is missing" else None  # the run can do without
        yield Case("checkpoints", f"{run}: {name}", _then(change, run), words, right, needs=needs)
    hole = chance.randint(0, 3)

    def without_line() -> None:
        lines = Path("run", log).read_text().splitlines(keepends=True)
        Path("run", log).write_text("".join(line for i, line in enumerate(lines) if i != hole))

    yield Case("checkpoints", f"run: {log} without line {hole + 1}", _then(without_line, "run"), (log,), needs=("run",))
    for name, (run, change, checkpoint) in RIGHT_RUNS.items():
        right = same_weights(run, run)
        yield Case("checkpoints", f"{run}: {name}", _then(change, run, checkpoint), right=right, needs=(run,))


def _then(change: Callable[[], Any], run: str, checkpoint: str = "latest") -> Callable[[], Call]:
    def prepare() -> Call:
        change()
        return resume(run, checkpoint)

    return prepare


def _lines(change: Callable[[list[str]], Any]) -> Callable[[], None]:
    def damage() -> None:
        lines = Path("run/metrics.jsonl").read_text().splitlines(keepends=True)
        Path("run/metrics.jsonl").write_text("".join(change(lines) or lines))

    return damage


def _both_cut() -> None:
    for name in (FIRST, LAST):
        os.truncate(f"run/{name}/optimizer.pt", 1000)


def _windows(change: Callable[[Path], Any]) -> Callable[[], None]:
    def damage() -> None:
        paths = [path for path in sorted(Path("online/refreshed").rglob("*")) if path.is_file()]
        for path in paths:
            change(path)

    return damage


def _foreign() -> None:
    shutil.rmtree(f"run/{LAST}")
    shutil.copytree(f"lora/{LAST}", f"run/{LAST}")


#: damage -> (the run, what is done, the words of the message)
RUN_DAMAGES: dict[str, tuple[str, Callable[[], Any], tuple[str | tuple[str, ...], ...]]] = {
    "metrics.jsonl is missing": ("run", lambda: os.unlink("run/metrics.jsonl"), ("metrics.jsonl",)),
    "metrics.jsonl is empty": ("run", lambda: os.truncate("run/metrics.jsonl", 0), ("metrics.jsonl",)),
    "metrics.jsonl ends before the checkpoint": ("run", _lines(lambda lines: lines[:2]), ("metrics.jsonl",)),
    "a line of metrics.jsonl is no JSON": (
        "run",
        _lines(lambda lines: ["{oops\n", *lines]),
        ("metrics.jsonl",),
    ),
    "a line of metrics.jsonl is a list": (
        "run",
        _lines(lambda lines: [*lines[:1], "[1]\n", *lines]),
        ("metrics.jsonl",),
    ),
    "a step of metrics.jsonl is a text": (
        "run",
        _lines(lambda lines: ['{"step": "x"}\n', *lines]),
        ("metrics.jsonl",),
    ),
    "a line of metrics.jsonl is cut": (
        "run",
        _lines(lambda lines: [lines[0], lines[1][:40], *lines[2:]]),
        ("metrics.jsonl",),
    ),
    "lines of metrics.jsonl are not in order": ("run", _lines(lambda lines: lines[::-1]), ("metrics.jsonl",)),
    "metrics.jsonl is a folder": (
        "run",
        lambda: (os.unlink("run/metrics.jsonl"), os.mkdir("run/metrics.jsonl")),
        ("metrics.jsonl",),
    ),
    "both checkpoints are cut": ("run", _both_cut, ("optimizer.pt", LAST)),
    "an empty folder is the newest": ("run", lambda: os.mkdir("run/checkpoint-6"), ("checkpoint-6", LAST)),
    "a file is the newest": ("run", lambda: Path("run/checkpoint-6").touch(), ("checkpoint-6", LAST)),
    "the first under the name of a later": (
        "run",
        lambda: os.rename(f"run/{FIRST}", "run/checkpoint-6"),
        ("checkpoint-6",),
    ),
    "a checkpoint of step 10^30": (
        "run",
        lambda: shutil.copytree(f"run/{LAST}", f"run/checkpoint-{10**30}"),
        (str(10**30),),
    ),
    "a link to nowhere is the newest": (
        "run",
        lambda: os.symlink("nowhere", "run/checkpoint-6"),
        ("checkpoint-6", LAST),
    ),
    "no checkpoint": (
        "run",
        lambda: [shutil.rmtree(f"run/{name}") for name in (FIRST, LAST)],
        ("resume_from_checkpoint",),
    ),
    "the anchors are gone": ("run", lambda: shutil.rmtree("anchors"), ("anchors",)),
    "a shard of the anchors is gone": (
        "run",
        lambda: os.unlink("anchors/train/shard-00001.parquet"),
        ("shard-00001.parquet",),
    ),
    "the data changed": (
        "run",
        lambda: Path("rows.jsonl").write_text('{"prompt": "x", "rejected": "y"}\n'),
        ("anchors",),
    ),
    "the model changed": ("run", lambda: shutil.copy("other/model.safetensors", "model"), ("anchors",)),
    "a checkpoint of another run": ("run", _foreign, (LAST,)),
    "the window is gone": ("online", lambda: shutil.rmtree("online/refreshed"), ("refreshed",)),
    "the window is empty": ("online", _windows(lambda path: os.truncate(path, 0)), ("refreshed",)),
    "the window is cut": ("online", _windows(lambda path: os.truncate(path, path.stat().st_size // 2)), ("refreshed",)),
    "the window is no window": ("online", _windows(lambda path: path.write_bytes(b"[1]\n")), ("refreshed",)),
}


def _flip_older() -> None:
    data = bytearray(Path(f"run/{FIRST}/model.safetensors").read_bytes())
    data[-5] ^= 4
    Path(f"run/{FIRST}/model.safetensors").write_bytes(data)


#: odd runs that continue with the right bits: (the run, what is done, the checkpoint)
RIGHT_RUNS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "nothing is wrong": ("run", lambda: None, "latest"),
    "nothing is wrong, by name": ("run", lambda: None, f"run/{LAST}"),
    "nothing is wrong, by a path with ..": ("run", lambda: None, f"model/../run/{LAST}/"),
    "an older checkpoint is damaged": ("run", _flip_older, "latest"),
    "the newest checkpoint is removed": ("run", lambda: shutil.rmtree(f"run/{LAST}"), "latest"),
    "a torn last line of metrics.jsonl": ("run", _lines(lambda lines: [*lines[:4], lines[4][:30]]), "latest"),
    "half a checkpoint of a killed writer": ("run", lambda: os.mkdir("run/.tmp-checkpoint-6"), "latest"),
    "a file of the user beside it": ("run", lambda: Path("run/notes.txt").write_text("mine"), "latest"),
    "a folder named alike": ("run", lambda: os.mkdir("run/checkpoint-best"), "latest"),
    "nothing is wrong with the adapter": ("lora", lambda: None, "latest"),
    "nothing is wrong with the window": ("online", lambda: None, "latest"),
}


# --- Other settings on resuming ----------------------------------------------------------------------------------

#: values that differ from the good run's and are valid there
OTHER: dict[str, Any] = {
    "dtype": "bfloat16",
    "refresh_every": 2,
    "refresh_strategy": "epoch",
    "alpha": 0.2,
    "beta": 0.05,
    "anchor_weight": 0.5,
    "learning_rate": 0.002,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "seed": 7,
    "disable_dropout": False,
    "use_peft": True,
    "max_length": 40,
    "max_completion_length": 5,
    "num_generations": 3,
    "temperature": 0.7,
    "sampling_seed": 3,
    "model_name_or_path": "other",
    "dataset_name": "held_out.jsonl",
}


def resumed_cases(chance: random.Random, good: Path) -> Cases:
    """Settings that a resumed run must keep."""
    kind = "resumed settings"
    for name in having("fixed"):
        assert name in OTHER or name.startswith(("lora_", "warmup_ratio", "num_train", "max_steps")), name
    for name, value in OTHER.items():
        words = (name,) if name not in ("dataset_name", "model_name_or_path") else (("anchors", name),)
        yield Case(kind, f"{name}: {value}", partial(_other, "run", {name: value}), words, needs=("run",))
    for name, value in {"lora_alpha": 5, "lora_dropout": 0.3, "lora_r": 4, "lora_target_modules": ["q_proj"]}.items():
        yield Case(kind, f"{name}: {value}", partial(_other, "lora", {name: value}), (name,), needs=("lora",))
    yield Case(kind, "fewer steps", partial(_other, "run", {"max_steps": 3}), ("max_steps",), needs=("run",))
    for name, value in {"logging_steps": 3, "save_steps": 1, "save_total_limit": 1, "eval_steps": 0}.items():
        right = same_weights("run", "run")
        yield Case(kind, f"{name}: {value}", partial(_other, "run", {name: value}), right=right, needs=("run",))

    for name, (change, settings, word) in DIFFERENCES.items():
        prepare = partial(_differs, change, settings)
        yield Case(kind, name, prepare, (word,), says(word), either=True, needs=("run",))


def _threads() -> None:
    torch.set_num_threads(2)


def _version() -> None:
    torch.__version__ = type(torch.__version__)("9.9.0")


#: differences that change bits by rounding, which must be said: (what is done, settings, the word that is said)
DIFFERENCES: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "other micro-batches": (void, {"tokens_per_micro_batch": 30}, "tokens_per_micro_batch"),
    "checkpointed gradients": (void, {"gradient_checkpointing": True}, "gradient_checkpointing"),
    "prompts that are not shared": (void, {"shared_prefix": False}, "shared_prefix"),
    "another attention": (void, {"attn_implementation": "eager"}, "attention"),
    "another number of threads": (_threads, {}, "threads"),
    "another version of torch": (_version, {}, "9.9.0"),
}


def _differs(change: Callable[[], Any], settings: dict[str, Any]) -> Call:
    change()
    return _other("run", settings)


def _other(run: str, settings: dict[str, Any]) -> Call:
    found = yaml.safe_load(Path(f"{run}.yaml").read_text()) | settings
    Path(f"{run}.yaml").write_text(yaml.safe_dump(found))
    return resume(run)


# --- Trained models that are evaluated ---------------------------------------------------------------------------


def trained_cases(chance: random.Random, good: Path) -> Cases:
    """``d2o eval`` of a folder that is not whole."""
    kind = "trained models"
    command = ["eval", "c.yaml", "--eval_dataset_name", "held_out.jsonl", "--eval_model", "trained"]
    for file in ("model.safetensors", "config.json"):
        for name, damage in byte_damages(chance, flips=0).items():
            if file == "config.json" and name.startswith("without"):
                continue  # the last newline
            prepare = partial(_damaged, Path("trained", file), damage, command)
            right = fine if name.startswith("zeros") and file != "config.json" else None  # zeros are numbers
            yield Case(kind, f"{file}: {name}", prepare, ("trained",), right, either=True, needs=("trained",))
    names = sorted(load_file(good / "trained" / "trained" / "model.safetensors"))
    for tensor in some(chance, names, 2):
        for name, change in TENSOR_DAMAGES.items():
            if name != "half the bits of":
                prepare = partial(
                    _damaged, Path("trained/model.safetensors"), partial(_resave, change, tensor), command
                )
                yield Case(kind, f"{name} {tensor}", prepare, ("trained",), needs=("trained",))
    for name, change in {"a layer more": put("num_hidden_layers", value=4), "no kind": drop("model_type")}.items():
        prepare = partial(_damaged, Path("trained/config.json"), partial(_set, change), command)
        yield Case(kind, f"config.json: {name}", prepare, ("trained",), needs=("trained",))
    yield Case(kind, "nothing is wrong", lambda: command, right=fine, needs=("trained",))
    for name, place in {
        "a file": "rows.jsonl",
        "an empty folder": "out",
        "not there": "./gone",
        "data": "anchors",
    }.items():
        prepare = partial(_at, command[:-1], place)
        yield Case(kind, name, prepare, (place,), needs=("trained",))
    yield Case(kind, "eval.json is a folder", partial(_blocked, command), ("eval.json",), needs=("trained",))


def _set(change: Callable[[Any], Any], path: Path) -> None:
    set_json(path, change)


def _resave(change: Callable[..., None], tensor: str, path: Path) -> None:
    tensors = load_file(path)
    change(tensors, name=tensor)
    save_file(tensors, path, {"format": "pt"})


def _damaged(path: Path, damage: Callable[[Path], None], command: list[str]) -> Call:
    damage(path)
    return command


def _at(command: list[str], place: str) -> Call:
    Path("out").mkdir()
    return [*command, place]


def _blocked(command: list[str]) -> Call:
    Path("out/eval.json").mkdir(parents=True)
    return command

"""Reads the arguments of ``d2o COMMAND`` and the settings file.

The value of a flag is read as YAML, like the file's. ``d2o_fast/config.py`` checks both, as it checks Python's.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from d2o_fast.config import DEFAULTS, FIELDS, KINDS, RENAMED, allowed, checked
from d2o_fast.errors import D2OError, refusal

COMMANDS = {
    "demo": "align a small model from start to finish and show the result",
    "sample": "draw K anchors per prompt and score them and the negatives",
    "anchors": "inspect the stored anchors, or export them for other trainers",
    "train": "train a model away from its negatives (samples missing anchors first)",
    "eval": "compare the initial and the trained model on held-out data: loss, rewards, judge",
    "doctor": "show this machine's devices and software, and which paths run on them",
}
_FILE = {"--config": {"metavar": "FILE", "help": "the settings file; it may also come first, without --config"}}
#: the arguments of each command; a command with --config also takes every setting as a flag
ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "demo": {
        "--output_dir": {"type": Path, "default": Path("runs/demo"), "help": "folder of the demo's files"},
        "--seed": {"type": int, "default": 1, "help": "seed of all randomness"},
        "--quick": {"action": "store_true", "help": "check in seconds that the demo runs; the model learns little"},
    },
    "sample": {
        **_FILE,
        "--dry-run": {"action": "store_true", "help": "print a summary of the data and stop"},
    },
    "anchors": {
        "action": {
            "choices": ["inspect", "export"],
            "help": "inspect: counts, lengths, duplicates, samples; export: prompt, chosen, rejected of each anchor",
        },
        "folder": {"type": Path, "help": "a store (<output_dir>/anchors/train); inspect also takes its parent"},
        "out": {"type": Path, "nargs": "?", "help": "the .jsonl file to export to"},
    },
    "train": _FILE,
    "eval": {**_FILE, "--eval_model": {"help": "folder of the trained model; output_dir if not given"}},
    "doctor": {"--json": {"action": "store_true", "help": "print one JSON object instead of the table"}},
}


def parse(command: str, arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of ``ARGUMENTS``, settings of the file and the flags). Flags win over the file.

    Raises:
        D2OError: a name is unknown, a setting does not take a value, the file cannot be read.
    """
    from jsonargparse import ArgumentError

    arguments, own = list(arguments), ARGUMENTS[command]
    takes_settings = "--config" in own
    if takes_settings and arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--config")
    names = [name.removeprefix("--") for name in own] + (list(FIELDS) if takes_settings else [])
    for flag in (argument for argument in arguments if argument.startswith("--")):
        name = flag[2:].split("=")[0]
        if name not in names:
            raise D2OError(f"unknown flag --{name}{instead(name, names, '--')}")
    try:
        options = vars(parser(command).parse_args(arguments))
    except ArgumentError as error:
        raise D2OError(f"{' '.join(str(error).split())}. See d2o {command} --help") from error
    if not takes_settings:
        return options, {}
    file = options.pop("config")
    flags = {name: _flag_value(name, options.pop(name)) for name in FIELDS if name in options}
    return options, {**({} if file is None else read_file(file)), **flags}


def parser(command: str) -> Any:
    """The parser of one command. Its help shows each setting's help, allowed values and default."""
    from jsonargparse import ArgumentParser

    own = ARGUMENTS[command]
    text = f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}."
    if "--config" in own:
        text += " A setting given as a flag wins over the file's."
    found = ArgumentParser(prog=f"d2o {command}", description=text, exit_on_error=False, allow_abbrev=False)
    for name, options in own.items():
        found.add_argument(name, **options)
    if "--config" not in own:
        return found
    found.usage = f"d2o {command} [config.yaml] {'[--dry-run] ' if '--dry-run' in own else ''}[--setting value ...]"
    group = found.add_argument_group("settings")
    for name, setting in FIELDS.items():
        default = "" if DEFAULTS[name] in (None, "", []) else f"; default: {DEFAULTS[name]}"
        text = f"{setting.metadata['help']} ({allowed(name)}{default})"
        group.add_argument(f"--{name}", metavar="VALUE", default=argparse.SUPPRESS, help=text)
    return found


def _flag_value(name: str, text: str) -> Any:
    """``text`` read as YAML; unchanged if the setting takes any text."""
    kinds = get_args(KINDS[name]) or (KINDS[name],)
    is_list = text.startswith("[") and text.endswith("]") and list[str] in kinds
    if str in kinds and not is_list and not (text == "null" and NoneType in kinds):
        return text
    try:
        return _typed(name, yaml.load(text, Loader=_Loader))
    except (yaml.YAMLError, _TwiceError) as error:
        raise refusal(name, text, allowed(name)) from error


def _typed(name: str, value: Any) -> Any:
    """``value``, checked. An integer becomes a float if the setting is a float."""
    found = checked(name, value)
    return float(found) if type(found) is int and float in (KINDS[name], *get_args(KINDS[name])) else found


def read_file(name: str) -> dict[str, Any]:
    """The settings in a YAML file, each checked alone.

    Raises:
        D2OError: the file cannot be read or is not YAML; a name is unknown or set twice; a setting does not take its
            value.
    """
    try:
        with open(name, encoding="utf-8") as file:  # errors of a stream show no line of it, which may hold a password
            settings = yaml.load(file, Loader=_Loader)
    except OSError as error:
        raise D2OError(f"the settings file '{name}' cannot be read: {error.strerror}") from error
    except _TwiceError as error:
        raise D2OError(f"{name}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise D2OError(f"the settings file '{name}' is not YAML: {' '.join(str(error).split())}") from error
    if settings is not None and not isinstance(settings, dict):
        raise D2OError(f"the settings file '{name}' must hold lines of the form 'name: value'")
    found = {}
    for key, value in (settings or {}).items():
        if key not in FIELDS:
            raise D2OError(f"{name}: unknown setting '{key}'{instead(str(key), list(FIELDS))}")
        try:
            found[key] = _typed(key, value)
        except D2OError as error:
            raise D2OError(f"{name}: {error}") from error
    return found


def instead(name: str, names: Sequence[str], prefix: str = "") -> str:
    """The end of a message: the replacement of an old ``name``, or the nearest of ``names``; may be empty."""
    if name in RENAMED:
        return f", a name of older versions; {RENAMED[name]}"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{near[0]}'?" if near else ""


class _TwiceError(Exception):
    """A mapping has a key twice. The message names it."""


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, unlike YAML 1.1, and refuses a repeated key."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _TwiceError(f"'{key.value}' is set twice, in lines {lines[key.value]} and {line}")
            lines[key.value if isinstance(key.value, str) else line] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
)

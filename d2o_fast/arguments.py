"""Reads the arguments of ``d2o COMMAND`` and the settings file.

The value of a flag is read as YAML, like the file's. ``d2o_fast/config.py`` checks both, as it checks Python's.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args

import yaml

from d2o_fast.checks import local_path
from d2o_fast.config import DEFAULTS, FIELDS, KINDS, allowed, checked, instead
from d2o_fast.errors import D2OError, refusal, shown

COMMANDS = {
    "demo": "align a small model from start to finish and show the result",
    "sample": "draw K anchors per prompt and score them and the negatives",
    "anchors": "inspect the stored anchors, or export them for other trainers",
    "train": "train a model away from its negatives (samples missing anchors first)",
    "eval": "compare the initial and the trained model on held-out data: loss, rewards, judge",
    "doctor": "show this machine's devices and software, and which paths run on them",
}
_TAG = "tag:yaml.org,2002:"
_LARGEST_FILE = 1 << 20  # bytes
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
    flags = [argument[2:].split("=")[0] for argument in arguments if argument.startswith("--")]
    for i, name in enumerate(flags):
        if name not in names:
            raise D2OError(f"unknown flag --{name}{instead(name, names, '--')}")
        if name in flags[:i]:
            raise D2OError(f"the flag --{name} is given twice")
    try:
        options = vars(parser(command).parse_args(arguments))
    except ArgumentError as error:
        raise D2OError(f"{' '.join(str(error).split())}. See d2o {command} --help") from error
    file = options.pop("config", None)
    settings = {} if file is None else read_file(file)
    if takes_settings:
        settings |= {name: _flag_value(name, options.pop(name)) for name in FIELDS if name in options}
    for name, value in options.items():
        if isinstance(value, Path) or (name == "eval_model" and value):
            kind = {"output_dir": "folder", "eval_model": "model"}.get(name, "any")
            options[name] = type(value)(local_path(name, str(value), kind))
    return options, settings


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
    if not isinstance(text, str):  # argparse gives [] for "--"
        raise refusal(name, "--", allowed(name))
    kinds = get_args(KINDS[name]) or (KINDS[name],)
    is_list = text.startswith("[") and text.endswith("]") and list[str] in kinds
    takes_null = NoneType in kinds or name == "report_to"
    if str in kinds and not is_list and not (text == "null" and takes_null):
        return checked(name, text)
    try:
        return _typed(name, _value(yaml.compose(text, Loader=_Loader)))
    except (yaml.YAMLError, RecursionError) as error:
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
    path = local_path("the settings file", name, "file")
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise D2OError(f"the settings file '{name}' cannot be read: {error.strerror}") from error
    if len(data) > _LARGEST_FILE:
        raise D2OError(f"{name}: more than {_LARGEST_FILE >> 20} MiB are no settings file")
    found, lines = dict[str, Any](), dict[str, int]()
    for key, line, node in _settings_in(data, name):
        if key in lines:
            raise D2OError(f"{name}: '{key}' is set twice, in lines {lines[key]} and {line}")
        lines[key] = line
        if key not in FIELDS:
            raise D2OError(f"{name}: unknown setting {shown(key)}{instead(key, list(FIELDS))}")
        try:
            found[key] = _typed(key, _value(node))
        except D2OError as error:
            raise D2OError(f"{name}: {error}") from error
    return found


def _settings_in(data: bytes, name: str) -> Iterator[tuple[str, int, yaml.Node]]:
    """Each name, its line and the node of its value."""
    try:
        root = yaml.compose(data.decode("utf-8-sig"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise D2OError(f"the settings file '{name}' is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except RecursionError as error:
        raise D2OError(f"the settings file '{name}' is no list of settings: it is nested too deep") from error
    except yaml.YAMLError as error:
        raise D2OError(f"the settings file '{name}' is not YAML: {_told(error)}") from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise D2OError(f"the settings file '{name}' must hold lines of the form 'name: value'")
    for key, value in [] if root is None else root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise D2OError(f"{name}, line {line}: the name of a setting must be a word")
        yield key.value, line, value


def _told(error: yaml.YAMLError) -> str:
    """The error and its lines, without the text of these lines, which may hold a password."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    parts = ((error.context, error.context_mark), (error.problem, error.problem_mark))
    return ", ".join(f"{text} in line {mark.line + 1}" if mark else text for text, mark in parts if text)


def _value(node: yaml.Node | None) -> Any:
    """The value of a node: a plain one or a list of plain ones; anything else as an object that no setting takes.

    Nothing deeper is built, so an alias cannot multiply and a tag cannot call.
    """
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) if isinstance(item, yaml.ScalarNode) else _Nested() for item in node.value]
    if node is None:
        return None
    if not isinstance(node, yaml.ScalarNode):
        return _Nested()
    loader = _Loader("")
    plain = loader.resolve(yaml.ScalarNode, node.value, (node.style is None, node.style is not None))
    if node.tag == plain and (plain != _TAG + "int" or len(node.value) < 1000):  # Python reads no more digits
        return loader.construct_object(node)
    return node.value if node.tag == _TAG + "str" else _Nested(node)


class _Nested:
    """A part of the file that no setting takes. It is shown, and nothing else."""

    def __init__(self, node: yaml.ScalarNode | None = None) -> None:
        self.text = "a mapping or a list" if node is None else f"{node.tag.removeprefix(_TAG)} {node.value}"

    def __repr__(self) -> str:
        return self.text


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, and 010, 1:30 and dates as texts, unlike YAML 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        first: [(tag, form) for tag, form in forms if tag in (_TAG + "null", _TAG + "bool")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"[-+]?(0|[1-9][\d_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(
        r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$|[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\.(inf|Inf|INF))$"
        r"|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)

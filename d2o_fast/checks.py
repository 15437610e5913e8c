"""Settings as dataclass fields with help and rules. Checks values against their types and rules."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import field
from ipaddress import ip_address
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

from d2o_fast.errors import refusal

MISFIT = object()  #: what ``read`` returns for a value that a setting does not take
_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
_PLAIN = {str: "__str__", int: "__int__", float: "__float__"}
_MOST = 2**31  # of an integer without an upper limit of its own: products of two are still 64-bit integers
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38  # of a float: tensors are fp32
_LONGEST_NAME, _LONGEST_PATH = 200, 3500  # bytes; the system's limits, less the names of a run's files
_SIGNS = {"min": ">=", "above": ">", "max": "<=", "below": "<"}


def setting(default: Any, help: str, **rules: Any) -> Any:
    """A field with metadata.

    Args:
        rules: ``min``, ``above``, ``max``, ``below`` bound a number, which is always finite. ``needs`` names another
            setting, without which this one has no effect. ``path``: it names a place, ``local_path`` says which.
            ``fixed``: a resumed run keeps it. ``fingerprint``: stored anchors depend on it. ``filter``: it decides
            which draws become anchors. ``rounds``: it changes results by rounding only. ``form``: a function that says
            whether a text will do; ``wanted`` is its rule in words. ``shows``: the characters of a text that messages
            may show; a text with any other may be a secret, and no message shows it.
    """
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **rules})
    return field(default=default, metadata={"help": help, **rules})


def read(value: Any, kind: Any, rules: Mapping[str, Any]) -> Any:
    """``value`` as a setting of the type ``kind`` keeps it, or ``MISFIT``.

    A tuple becomes a list, a numpy number or an instance of a subclass a plain one, a path a text. An integer for a
    float stays an integer.
    """
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if not isinstance(value, bool):  # a member of an enumeration, say, is kept as the plain text or number that it is
        plain = next((base for base in (str, int, float) if isinstance(value, base)), None)
        value = value if plain is None else getattr(plain, _PLAIN[plain])(value)
    if _is_union(kind):
        found = (read(value, part, rules) for part in get_args(kind))
        return next((part for part in found if part is not MISFIT), MISFIT)
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else MISFIT
    if get_origin(kind) is list:
        if not isinstance(value, list | tuple):
            return MISFIT
        (item_kind,) = get_args(kind)
        items = [read(item, item_kind, rules) for item in value]
        return MISFIT if any(item is MISFIT or is_blank(item) for item in items) else items
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind in (int, float):
        return value if type(value) in (int, kind) and _in_range(value, rules) else MISFIT
    if kind is str and isinstance(value, str) and "form" in rules and not rules["form"](value):
        return MISFIT
    return value if type(value) is kind and not _strange(value) else MISFIT


def words(kind: Any, rules: Mapping[str, Any]) -> str:
    """The values that ``read`` takes, in words."""
    if _is_union(kind):
        parts = [words(part, rules) for part in get_args(kind) if part is not NoneType]
        return _either(parts) + (", or nothing" if NoneType in get_args(kind) else "")
    if get_origin(kind) is Literal:
        return _either([repr(choice) for choice in get_args(kind)])
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return "a list of texts" if item is str else f"a list of {words(item, rules)}"
    bounds = " and ".join(
        f"{sign} {'2**63' if rules[rule] == 2**63 else rules[rule]}" for rule, sign in _SIGNS.items() if rule in rules
    )
    if kind is float and not bounds:
        return "a finite number"
    if kind is str and "wanted" in rules:
        return str(rules["wanted"])
    return f"{_WORDS[kind]} {bounds}" if bounds and kind in (int, float) else _WORDS[kind]


def hidden(value: object, shows: str) -> str | None:
    """Words in place of a ``value`` that may be a secret; None if all its characters are in ``shows``."""
    found = "a text" if isinstance(value, str) else f"a value of the type {type(value).__name__}"
    odd = [character for character in value if character not in shows] if isinstance(value, str) else [""]
    if not odd:
        return None
    return f"{found}{f' with {odd[0]!a}' if shows and odd[0] else ''}, not shown because it may hold a secret"


#: characters of an address; a text with any other may hold a password
PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._/:[]"
_LABEL = r"(?!-)[\w-]{1,63}(?<!-)"
_ADDRESS = re.compile(
    rf"https?://(?P<host>{_LABEL}(?:\.{_LABEL})*\.?|\[(?P<six>[\da-f:.]+)\])(?::(?P<port>\d{{1,5}}))?(?:/[\w.~/%+:-]*)?",
    re.ASCII | re.IGNORECASE,
)


def is_address(text: str) -> bool:
    """Whether ``text`` is an http or https address of host, port and path alone."""
    found = _ADDRESS.fullmatch(text)
    if found is None or len(found["host"]) > 253 or not 0 < int(found["port"] or 80) < 2**16:
        return False
    return found["six"] is None or _ip(found["six"]) is not None


def is_confidential(address: str) -> bool:
    """Whether nobody between here and ``address`` can read a request: https, or this machine itself."""
    parts = urlsplit(address)
    host = (parts.hostname or "").rstrip(".")
    return parts.scheme == "https" or host == "localhost" or getattr(_ip(host), "is_loopback", False)


def is_variable(text: str) -> bool:
    """Whether ``text`` can be the name of an environment variable."""
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) is not None


def _ip(text: str) -> Any:
    """The IP address in ``text``, or None."""
    try:
        return ip_address(text)
    except ValueError:
        return None


def limits(value: Any, wanted: str) -> str:
    """``wanted``, and the limit that every setting has and ``value`` breaks."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return wanted if "finite" in wanted else f"{wanted}, and finite"
        return f"{wanted}, and of a size that 32-bit floats hold" if not _fits_float32(value) else wanted
    if isinstance(value, int) and abs(value) >= _MOST and "<" not in wanted:
        return f"{wanted}, and below 2**31"
    strange = next(filter(None, map(_strange, value if isinstance(value, list | tuple) else [value])), None)
    return f"{wanted}, and without the character {strange!r}" if strange else wanted


def local_path(name: str, text: str, kind: str) -> str:
    """The path or name ``text`` of the setting ``name``, with its ``~`` expanded.

    Args:
        kind: "folder" and "file" are local; "model" is a folder or a name on the hub; "any" may be all of these.

    Raises:
        D2OError: the home folder is unknown, the system refuses the path, or something of another kind is there.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        home = text.split("/")[0]
        raise refusal(name, text, f"a path, and {home} is no home folder here (write ./{home} for a file of that name)")
    found = None
    try:
        found = "folder" if stat.S_ISDIR(os.stat(path).st_mode) else "file"
    except FileNotFoundError:
        if kind == "folder" and os.path.islink(path):
            raise refusal(name, text, "a folder, and this is a link to nothing") from None
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.split("/")):
            raise refusal(name, text, f"a path whose names have at most {_LONGEST_NAME} bytes") from None
    except NotADirectoryError as error:
        if kind in ("folder", "file"):
            raise refusal(name, text, "a path through folders, and a part of it is a file") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise refusal(name, text, f"a path that can be read ({reason})") from error
    if kind == "folder" and len(os.fsencode(path)) > _LONGEST_PATH:
        raise refusal(name, text, f"a path of at most {_LONGEST_PATH} bytes, with room for the files in it")
    if kind == "file" and found == "folder":
        raise refusal(name, text, "a file, and this is a folder")
    if kind in ("folder", "model") and found == "file":
        raise refusal(
            name, text, "a folder, and this is a file" + (", or a name on the hub" if kind == "model" else "")
        )
    return path


def world_size() -> int:
    """The number of processes that a launcher started (WORLD_SIZE), 1 without one.

    Raises:
        D2OError: WORLD_SIZE is no such number.
    """
    found = os.environ.get("WORLD_SIZE") or "1"
    if not re.fullmatch(r"[1-9]\d{0,8}", found, re.ASCII):
        raise refusal("the environment variable WORLD_SIZE", found, "a number of processes, or left out")
    return int(found)


def is_blank(value: object) -> bool:
    """An empty text or list, or a text of spaces."""
    return value == [] or (isinstance(value, str) and not value.strip())


def _strange(value: Any) -> str | None:
    """The first character of a text that no file or request holds: a NUL, or half of a pair of UTF-16."""
    found = re.search("[\\0\ud800-\udfff]", value) if isinstance(value, str) else None
    return found and found.group()


def _fits_float32(value: float) -> bool:
    return value == 0 or _SMALLEST <= abs(value) <= _LARGEST


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def _in_range(value: float, rules: Mapping[str, Any]) -> bool:
    if isinstance(value, int):
        most = rules.get("below", _MOST)
        if not -most <= value < most:
            return False
    elif not _fits_float32(value):
        return False
    return (
        rules.get("min", value) <= value <= rules.get("max", value)
        and ("above" not in rules or value > rules["above"])
        and ("below" not in rules or value < rules["below"])
    )


def _either(parts: Sequence[str]) -> str:
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)

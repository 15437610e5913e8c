"""A case of the corpus: one bad (or odd) input, the call that meets it, and the right answer to it.

``prepare`` runs in a folder of its own that holds a copy of the good inputs (``good.py``). It damages them and returns
the call: the arguments of ``d2o``, or a function that calls the package from Python.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Call = list[str] | Callable[[], Any]
#: (the case's folder, the good inputs, the text that it printed) -> the fault of an accepted input; None if it is right
Check = Callable[[Path, Path, str], str | None]


@dataclass(frozen=True, eq=False)
class Case:
    """One input.

    Attributes:
        words: texts that the message must hold; of a tuple, one is enough. They name the file or the setting.
        right: None if the input must be refused; otherwise it is accepted, and the function checks the result.
        either: a clear refusal is right too, beside an accepted input that ``right`` checks.
        needs: further parts of the good inputs, beside ``base``.
        errors: names of exceptions that are clear beside D2OError, in calls from Python.
        stdin: the text that the process can read.
        user: the call runs without root's rights.
        hidden: texts that must not be printed.
        late: the fault can show after the last step, when the model may be saved already.
        leaves: a file that a refused call must leave in the folder.
        limits: limits of the system during the call, by the names of ``resource``.
    """

    kind: str
    name: str
    prepare: Callable[[], Call]
    words: tuple[str | tuple[str, ...], ...] = ()
    right: Check | None = None
    either: bool = False
    needs: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    stdin: str = ""
    user: bool = False
    hidden: tuple[str, ...] = ()
    late: bool = False
    leaves: str = ""
    limits: Mapping[str, int] = field(default_factory=dict)


# --- Calls -------------------------------------------------------------------------------------------------------

TRAIN = ["train", "c.yaml"]


def train(**settings: Any) -> list[str]:
    """``d2o train c.yaml`` after these settings were written into c.yaml; ``None`` takes a setting out."""
    set_yaml("c.yaml", **settings)
    return list(TRAIN)


def set_yaml(name: str, **settings: Any) -> None:
    found = yaml.safe_load(Path(name).read_text()) | settings
    Path(name).write_text(yaml.safe_dump({key: value for key, value in found.items() if value is not None}))


def set_json(path: str | Path, change: Callable[[Any], Any]) -> None:
    """Writes ``change(content)`` into a JSON file; a change in place may return None."""
    content = json.loads(Path(path).read_text())
    changed = change(content)
    Path(path).write_text(json.dumps(content if changed is None else changed))


def put(*keys: Any, value: Any) -> Callable[[Any], None]:
    """A change of JSON: the value at ``keys``."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def drop(*keys: Any) -> Callable[[Any], None]:
    """A change of JSON: nothing at ``keys``."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


# --- Damages of a file -------------------------------------------------------------------------------------------

Damage = Callable[[Path], None]


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def truncated(share: float) -> Damage:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: min(int(len(data) * share), len(data) - 1)])

    return damage


def flipped(share: float, bit: int) -> Damage:
    """One bit of the byte at ``share`` of the file."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(int(len(data) * share), len(data) - 1)] ^= 1 << bit
        path.write_bytes(data)

    return damage


def replaced(content: bytes) -> Damage:
    return lambda path: void(path.write_bytes(content))


def zeroed(share: float) -> Damage:
    """Zeros in the last part of the file, as a disk leaves them that lost power."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        keep = int(len(data) * share)
        path.write_bytes(data[:keep] + bytes(len(data) - keep))

    return damage


def void(*_: Any) -> None:
    pass


def byte_damages(chance: random.Random, flips: int = 2) -> dict[str, Damage]:
    """Damages of any file, by name. The places of cuts and flips come from ``chance``."""
    cut, zero = chance.uniform(0.05, 0.95), chance.uniform(0.3, 0.9)
    found: dict[str, Damage] = {
        "missing": remove,
        "empty": empty,
        f"cut at {cut:.0%}": truncated(cut),
        "without its last byte": truncated(1.0),
        f"zeros from {zero:.0%}": zeroed(zero),
        "a folder": as_folder,
        "a link to nowhere": dangling,
        "random bytes": replaced(chance.randbytes(200)),
    }
    for _ in range(flips):
        place, bit = chance.random(), chance.randrange(8)
        found[f"bit {bit} flipped at {place:.1%}"] = flipped(place, bit)
    return found


def some(chance: random.Random, items: Iterable[Any], count: int) -> list[Any]:
    """At most ``count`` of the items, drawn by ``chance``, in their order."""
    items = list(items)
    places = sorted(chance.sample(range(len(items)), min(count, len(items))))
    return [items[place] for place in places]


# --- Checks of accepted inputs -----------------------------------------------------------------------------------


def fine(folder: Path, good: Path, text: str) -> str | None:
    """Anything that ends without an error."""
    return None


def same_weights(folder: str, reference: str) -> Check:
    """The model in ``folder`` has the bits of the good run's."""

    def check(case: Path, good: Path, text: str) -> str | None:
        for name in ("model.safetensors", "adapter_model.safetensors"):
            wanted = good / "final" / reference / name
            if wanted.exists():
                path = case / folder / name
                return None if path.exists() and path.read_bytes() == wanted.read_bytes() else "other weights"
        raise FileNotFoundError(good / "final" / reference)

    return check


def says(*words: str) -> Check:
    """The text that was printed holds the words."""

    def check(case: Path, good: Path, text: str) -> str | None:
        missing = [word for word in words if word not in text]
        return f"nothing is said of {missing}" if missing else None

    return check


def both(*checks: Check) -> Check:
    def check(case: Path, good: Path, text: str) -> str | None:
        return next((fault for one in checks if (fault := one(case, good, text)) is not None), None)

    return check


Cases = Iterator[Case]

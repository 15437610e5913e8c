"""Folders that are written to: files in the way, links, full disks, no rights, little memory, few open files."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from case import Call, Case, Cases, fine, same_weights, train

KIND = "output and disk"


def cases(chance: random.Random, good: Path) -> Cases:
    """All cases of the kind."""
    same = same_weights("out", "out")
    for name, place in PLACES.items():
        yield Case(
            KIND,
            f"output_dir: {name}",
            partial(_at, place),
            ("output_dir",) if len(place) > 60 or "\0" in place else (("output_dir", place),),
        )
    for name, make in IN_THE_WAY.items():
        yield Case(KIND, f"in output_dir: {name}", partial(_made, make), ("out",))
    for name, make in FINE.items():
        yield Case(KIND, f"in output_dir: {name}", partial(_made, make), right=same)
    for name, make in MINE.items():
        yield Case(KIND, f"in output_dir: {name}", partial(_made, make), ("out",), _still_mine, either=True)
    yield Case(
        KIND, "output_dir that cannot be written", partial(_made, lambda: Path("out").chmod(0o555)), ("out",), user=True
    )
    yield Case(KIND, "a parent that cannot be written", _parent, ("below",), user=True)
    yield Case(KIND, "TMPDIR that cannot be written", _temporary, (("TMPDIR", "/nowhere"),), fine, either=True)
    yield Case(
        KIND, "output_dir with ~", partial(train, output_dir="~/d2o-out"), ("output_dir",), _no_tilde, either=True
    )
    yield Case(KIND, "output_dir that is the model", partial(train, output_dir="model"), ("model",))
    yield Case(
        KIND, "output_dir that is the data's folder", partial(train, output_dir="."), ("output_dir",), fine, either=True
    )
    yield from _disk_cases(chance)
    yield from _memory_cases(chance)


PLACES = {
    "a file": "rows.jsonl",
    "below a file": "rows.jsonl/out",
    "a device": "/dev/null",
    "below a device": "/dev/null/out",
    "in /proc": "/proc/out",
    "a name of 300 letters": "o" * 300,
    "a path of 9000 letters": "/".join(["o" * 90] * 100),
    "a null": "a\0b",
    "half a character": "a\udcffb",
    "a link to nowhere": "link",
    "a link to itself": "loop",
    "a pipe": "pipe",
    "an escape sequence": "o\x1b[31mx\0",
    "spaces": "   ",
    "a run that is finished": "done",
}


def _at(place: str) -> Call:
    Path("link").symlink_to("/nowhere/at/all")
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    Path("done").mkdir()
    Path("done/model.safetensors").write_bytes(b"mine")
    return ["train", "c.yaml", "--output_dir", place]


def _made(make: Callable[[], Any]) -> Call:
    Path("out").mkdir()
    make()
    return train()


def _folder(name: str) -> Callable[[], None]:
    return lambda: (Path("out") / name / "x").mkdir(parents=True)


def _link(name: str, target: str) -> Callable[[], None]:
    return lambda: (Path("out") / name).symlink_to(target)


def _linked_lock() -> None:
    Path("precious.txt").write_text("mine")
    Path("out/.lock").symlink_to("../precious.txt")


#: what makes a training impossible or dangerous
IN_THE_WAY: dict[str, Callable[[], Any]] = {
    "metrics.jsonl is a folder": _folder("metrics.jsonl"),
    "README.md is a folder": _folder("README.md"),
    "d2o_config.yaml is a folder": _folder("d2o_config.yaml"),
    "config.json is a folder": _folder("config.json"),
    "tokenizer.json is a folder": _folder("tokenizer.json"),
    "model.safetensors is a folder": _folder("model.safetensors"),
    ".lock is a folder": _folder(".lock"),
    ".lock is a link to nowhere": _link(".lock", "/nowhere/x"),
    ".lock is a link to a file": _linked_lock,
    "an older checkpoint": _folder("checkpoint-1"),
    "an adapter": lambda: Path("out/adapter_model.safetensors").touch(),
    "an index of weights": lambda: Path("out/model.safetensors.index.json").touch(),
}
FINE: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "a file of the user": lambda: Path("out/notes.txt").write_text("mine"),
    "a folder of the user": _folder("plots"),
    "leftovers of a killed writer": _folder(".tmp-final"),
    "a file by the name of such a leftover": lambda: Path("out/.tmp-final").touch(),
    "half a checkpoint of a killed writer": _folder(".tmp-checkpoint-3"),
}
#: files of the user by names that a run also writes
MINE: dict[str, Callable[[], Any]] = {
    name: partial(lambda name: Path("out", name).write_text("mine"), name)
    for name in ("README.md", "config.json", "tokenizer.json", "d2o_config.yaml", "metrics.jsonl")
}


def _still_mine(case: Path, good: Path, text: str) -> str | None:
    kept = any(path.is_file() and path.read_bytes() == b"mine" for path in (case / "out").rglob("*"))
    return None if kept else "the user's file was overwritten"


def _no_tilde(case: Path, good: Path, text: str) -> str | None:
    return "a folder named ~ was made" if (case / "~").exists() else None


def _parent() -> Call:
    Path("below").mkdir()
    Path("below").chmod(0o555)
    return train(output_dir="below/out")


def _temporary() -> Call:
    import tempfile

    os.environ["TMPDIR"] = "/nowhere"
    tempfile.tempdir = "/nowhere"
    return train(anchors_dir="new")


# --- A full disk -------------------------------------------------------------------------------------------------


def _disk_cases(chance: random.Random) -> Cases:
    """No file can be larger than some bytes: the answer of the system is as on a full disk."""

    def case(name: str, size: int, prepare: Callable[[], Call], word: str, needs: tuple[str, ...] = ()) -> Case:
        words, limits = ((word, "output_dir"),), {"FSIZE": size}
        return Case(KIND, f"{size} bytes of disk {name}", prepare, words, needs=needs, limits=limits, late=bool(needs))

    for low, high in ((4000, 6000), (10_000, 90_000)):
        size = chance.randrange(low, high)
        yield case("for the anchors", chance.randrange(4000, 6000) + low % 7, partial(train, anchors_dir="new"), "new")
        yield case("at the end", size, train, "out")
        yield case("at a checkpoint", size, partial(train, save_steps=1), "checkpoint-1")
        resumed = ["train", "run.yaml", "--resume_from_checkpoint", "latest"]
        yield case("when a run is resumed", size, partial(list, resumed), "run", ("run",))
    size = chance.randrange(150_000, 230_000)
    yield case("for the optimizer", size, partial(train, save_steps=1), "checkpoint-1")
    export = ["anchors", "export", "anchors/train", "out.jsonl"]
    yield case("for an export", chance.randrange(100, 900), partial(list, export), "out.jsonl")
    yield case("for metrics.jsonl", 9000, partial(train, logging_steps=1, max_steps=200), "metrics.jsonl")
    for event in ("save", "log"):
        name = f"a disk that fills after the first {event}"
        yield Case(KIND, name, partial(_fills, event), ("checkpoint-1",), leaves="out/checkpoint-1/model.safetensors")


def _fills(event: str) -> Call:
    from d2o_fast import D2OConfig, D2OTrainer
    from d2o_fast.data.reading import read_rows

    train(save_steps=1, max_steps=3)
    config = D2OConfig(**yaml.safe_load(Path("c.yaml").read_text()))

    def callback(run: Any, found: str, metrics: Any) -> None:
        if found == event and run.state.global_step >= (1 if event == "save" else 2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return lambda: D2OTrainer("model", config, read_rows("rows.jsonl"), callbacks=[callback]).train()


# --- Memory and open files ---------------------------------------------------------------------------------------


def _memory_cases(chance: random.Random) -> Cases:
    for more in (chance.randrange(1, 4), chance.randrange(8, 24)):
        limits = {"DATA": more << 20}
        yield Case(KIND, f"{more} MiB of memory", train, ("memory",), fine, either=True, limits=limits)
    large = partial(train, anchors_dir="new", num_generations=chance.randrange(20_000, 30_000))
    name = "more anchors than 64 MiB of memory hold"
    yield Case(KIND, name, large, ("memory",), limits={"DATA": 64 << 20})
    for count in (3, 8):
        limits = {"NOFILE": len(os.listdir("/proc/self/fd")) + count}
        prepare = partial(train, anchors_dir="new")
        yield Case(KIND, f"{count} more open files", prepare, ("open files",), fine, either=True, limits=limits)

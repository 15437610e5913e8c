"""Functions of the user: judges, scorers and callbacks that raise, return something else, or cannot be imported."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from case import Call, Case, Cases, Check, fine, train

_COUNTS = "n = 0\ndef f(prompt, response):\n    global n\n    n += 1\n"
#: the bodies of modules that are wrong
BODIES: dict[str, str] = {
    "that raises": "def f(prompt, response):\n    raise ValueError('mine is broken')\n",
    "that raises without a text": "def f(prompt, response):\n    raise KeyError\n",
    "that raises with a long text": "def f(prompt, response):\n    raise ValueError('x\\n' * 5000)\n",
    "that raises with an escape sequence": "def f(prompt, response):\n    raise ValueError('\\x1b[31mred')\n",
    "that divides by 0": "def f(prompt, response):\n    return 1 / 0\n",
    "that calls itself": "def f(prompt, response):\n    return f(prompt, response)\n",
    "that asserts": "def f(prompt, response):\n    assert False\n",
    "that exits": "import sys\ndef f(prompt, response):\n    sys.exit(0)\n",
    "that returns nothing": "def f(prompt, response):\n    pass\n",
    "that returns a list": "def f(prompt, response):\n    return [1.0]\n",
    "that returns an object": "def f(prompt, response):\n    return {'score': 1}\n",
    "that returns bytes": "def f(prompt, response):\n    return b'good'\n",
    "that returns NaN": "def f(prompt, response):\n    return float('nan')\n",
    "that returns inf": "def f(prompt, response):\n    return float('inf')\n",
    "that returns a complex number": "def f(prompt, response):\n    return 1j\n",
    "that returns two numbers of torch": "import torch\ndef f(prompt, response):\n    return torch.ones(2)\n",
    "that is a coroutine": "async def f(prompt, response):\n    return 1.0\n",
    "that is a generator": "def f(prompt, response):\n    yield 1.0\n",
    "with one parameter": "def f(prompt):\n    return 1.0\n",
    "with three parameters": "def f(prompt, response, more):\n    return 1.0\n",
    "with other names alone": "def f(*, question, reply):\n    return 1.0\n",
    "that is a number": "f = 5\n",
    "that is None": "f = None\n",
    "that is not there": "g = len\n",
    "of a module with a fault of syntax": "def f(prompt response):\n",
    "of a module that raises": "raise RuntimeError('mine is broken')\n",
    "of a module that exits": "import sys\nsys.exit(0)\n",
    "of a module that imports nothing known": "import no_such_module_at_all\ndef f(p, r): return 1.0\n",
    "of a module with null bytes": "f = 1\0\n",
    "of an empty module": "",
    "that fails after some calls": f"{_COUNTS}    return 1.0 if n < 3 else 1 / 0\n",
    "that changes its mind": f"{_COUNTS}    return 1.0 if n < 3 else 'good'\n",
}
GOOD: dict[str, str] = {
    "that returns an integer": "def f(prompt, response):\n    return len(response)\n",
    "that returns a number of numpy": "import numpy\ndef f(p, r):\n    return numpy.float32(len(r))\n",
    "that prints": "def f(prompt, response):\n    print('hello', flush=True)\n    return 1.0\n",
    "that is an object": "class F:\n    def __call__(self, prompt, response):\n        return 1.0\nf = F()\n",
    "of a method": "class F:\n    def f(self, prompt, response):\n        return 1.0\nf = F().f\n",
}
NAMES = [
    "",
    ":",
    "mine",
    "mine:",
    ":f",
    "mine:f:g",
    "mine.f",
    "mine.nope:f",
    "no such module:f",
    "..mine:f",
    "mine:f()",
    "os:path",
]


def cases(chance: random.Random, good: Path) -> Cases:
    """All cases of the kind."""
    kind = "user code"
    for role, door in DOORS.items():
        for name, body in (BODIES | GOOD).items():
            words: tuple[Any, ...] = (("mine", role.split()[0], "anchor_score"),)
            if "module" not in name and name.startswith(("that raises", "that divides", "that calls", "that fails")):
                words = (*words, "row ")
            right: Check | None = fine if name in GOOD else None
            if role != "score" and name in ("that returns NaN", "that returns inf"):
                right = fine  # a mean that is not finite says as much
            hidden = ("\x1b[31m",)
            prepare = partial(_with, body, door)
            either = right is not None and name not in GOOD
            yield Case(kind, f"{role} {name}", prepare, words, right, either, hidden=hidden, late=role == "judge")
    for role, name in ((role, name) for role in ("judge", "score") for name in NAMES):
        words = (("judge", "anchor_score"),)
        yield Case(kind, f"{role} named {name!r}", partial(_named, role, name), words)
    labels = {"a number": "5", "numbers": "[1, 2]", "a text": "'ab'"}
    for name, value in labels.items():
        body = f"def f(prompt, response):\n    return 'a'\nf.labels = {value}\n"
        words = (("labels", "judge"),)
        right = fine if name == "a text" else None
        yield Case(
            kind,
            f"judge with labels that are {name}",
            partial(_with, body, DOORS["judge"]),
            words,
            right,
            True,
            late=True,
        )
    for event in ("log", "save", "evaluate", "train_end"):
        error = chance.choice(
            ["ValueError('mine')", "KeyError('mine')", "OSError(28, 'No space')", "RuntimeError('x')"]
        )
        prepare = partial(_callback, event, error)
        name = f"callback that raises {error[:12]} at {event}"
        leaves = "out/checkpoint-1/trainer_state.json"
        yield Case(kind, name, prepare, late=True, errors=ANY, leaves=leaves)


#: the exception of a callback passes as it is: it is the user's own
ANY = ("Exception",)


def _judge() -> Call:
    return train(judge="mine:f", eval_dataset_name="held_out.jsonl")


def _eval_judge() -> Call:
    train(judge="mine:f", eval_dataset_name="held_out.jsonl")
    return ["eval", "c.yaml", "--eval_model", "other"]


def _score() -> Call:
    train(anchor_score="mine:f", min_anchor_score=-1e9, anchors_dir="new")
    return ["sample", "c.yaml"]


DOORS: dict[str, Callable[[], Call]] = {"judge": _judge, "judge of eval": _eval_judge, "score": _score}


def _with(body: str, door: Callable[[], Call]) -> Call:
    Path("mine.py").write_text(body)
    return door()


def _named(role: str, name: str) -> Call:
    Path("mine.py").write_text("def f(prompt, response):\n    return 1.0\n")
    if role == "judge":
        return train(judge=name, eval_dataset_name="held_out.jsonl")
    return train(anchor_score=name, min_anchor_score=0.5, anchors_dir="new")


def _callback(event: str, error: str) -> Call:
    from d2o_fast import D2OConfig, D2OTrainer
    from d2o_fast.data.reading import read_datasets

    train(save_steps=1, max_steps=3, eval_dataset_name="held_out.jsonl", eval_steps=2)
    config = D2OConfig(**yaml.safe_load(Path("c.yaml").read_text()))

    def callback(run: Any, found: str, metrics: Any) -> None:
        if found == event and run.state.global_step >= 2:
            raise eval(error)

    rows, held_out = read_datasets(config)
    return lambda: D2OTrainer("model", config, rows, held_out, callbacks=[callback]).train()

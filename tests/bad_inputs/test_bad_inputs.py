"""A sample of every kind of bad input is answered well, and the instrument tells each verdict from the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from d2o_fast.errors import D2OError
from helpers import DEADLINE
from paths import ROOT

FOLDER = ROOT / "tests" / "bad_inputs"
RIGHT = ("clear", "accepted")
MOST_WRONG = 0.005  #: share of bad answers in the sample


@pytest.mark.slow
def test_a_sample_of_every_kind_is_answered(tmp_path: Path) -> None:
    """``python tests/bad_inputs/run.py`` runs them all."""
    file = tmp_path / "results.jsonl"
    command = [sys.executable, str(FOLDER / "run.py"), "--sample", "6", "--json", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE)
    assert file.exists(), done.stdout + done.stderr
    results = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({result["kind"] for result in results}) >= 14
    wrong = [
        f"{r['kind']}, {r['name']}: {r['verdict']}: {r['found'][:200]}" for r in results if r["verdict"] not in RIGHT
    ]
    assert not [result for result in results if result["verdict"] == "broken"], "\n".join(wrong)
    assert len(wrong) <= MOST_WRONG * len(results), "\n".join(wrong)


def _unsafe(message: str) -> D2OError:
    error = D2OError("")
    error.args = (message,)
    return error


def _raises(error: BaseException) -> Any:
    raise error


def _killed() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _leaves(name: str) -> Any:
    Path(name).write_text("half")
    raise D2OError("rows.jsonl is bad")


#: verdict -> (what the case calls, its further fields)
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clear": (lambda: _raises(D2OError("rows.jsonl is bad")), {}),
    "clear, by the command": (["anchors", "inspect", "rows.jsonl"], {}),
    "accepted": (lambda: None, {"right": lambda *_: None}),
    "traceback": (lambda: _raises(KeyError("rows.jsonl")), {}),
    "silent": (lambda: None, {}),
    "silent, with another result": (lambda: None, {"right": lambda *_: "other bits"}),
    "silent, though it is right": (lambda: _raises(D2OError("rows.jsonl is bad")), {"right": lambda *_: None}),
    "vague": (lambda: _raises(D2OError("something is bad")), {}),
    "vague, with an escape sequence": (lambda: _raises(_unsafe("rows.jsonl \x1b[31m is bad")), {}),
    "vague, of many lines": (lambda: _raises(D2OError("rows.jsonl\n" * 99)), {}),
    "vague, with a secret": (lambda: _raises(D2OError("rows.jsonl of s3cr3t")), {"hidden": ("s3cr3t",)}),
    "hung": (lambda: time.sleep(60), {}),
    "died": (_killed, {}),
    "left": (lambda: _leaves("x.tmp"), {}),
    "left, a file that was changed": (lambda: _leaves("rows.jsonl"), {}),
    "left, code that was run": (lambda: _leaves("pwned"), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_verdict_is_reached(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import verdict
    from case import Case

    monkeypatch.setattr(verdict, "SECONDS", 2 if name == "hung" else 60)
    (tmp_path / "good" / "base").mkdir(parents=True)
    (tmp_path / "good" / "base" / "rows.jsonl").write_text("rows")
    call, fields = CALLS[name]
    case = Case("kind", name, lambda: call, ("rows.jsonl",), **fields)
    (result,) = verdict.run_all([case], tmp_path / "good", tmp_path, 1, lambda result: None)
    assert result.verdict == name.split(",")[0], result.found

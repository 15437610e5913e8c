"""Signals and errors end a run with everything up to the last whole step saved."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from d2o_fast import D2OTrainer
from d2o_fast.errors import D2OError
from d2o_fast.training import trainer as trainer_module
from d2o_fast.training.checkpoint import checkpoints, load_state
from d2o_fast.training.ending import SIGNALS, Signals, Stopped, explained
from d2o_fast.training.metrics import read_log
from helpers import DEADLINE
from stops import Stop, stop_at
from tiny import save_tiny_run, tiny_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    tiny_run(out).train()
    return out


def assert_same(found: Path, expected: Path) -> None:
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    logs = [read_log(folder / "metrics.jsonl") for folder in (found, expected)]
    for record in (*logs[0], *logs[1]):
        for name in ("tokens_per_second", "refresh/seconds"):
            record.pop(name, None)
    assert logs[0] == logs[1]


def names(out: Path) -> list[str]:
    return [path.name for path in checkpoints(out)]


def raised(number: int, event: str = "log", step: int = 4) -> Any:
    """A callback that sends the process a signal."""

    def callback(run: D2OTrainer, found: str, metrics: dict[str, float]) -> None:
        if found == event and run.state.global_step == step:
            os.kill(os.getpid(), number)

    return callback


# --- Signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_saves_the_step_under_way_and_sets_the_exit_code(
    name: str, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    out = tmp_path / "run"
    with pytest.raises(Stopped) as stop:
        tiny_run(out, callbacks=[raised(number)]).train()
    assert stop.value.code == 128 + number
    assert names(out) == ["checkpoint-4"]
    assert f"{name}: stopped after step 4 of 8. {out}/checkpoint-4 is saved" in caplog.text
    assert signal.getsignal(number) == before
    tiny_run(out).train("auto")
    assert_same(out, whole)


@pytest.mark.parametrize(("event", "step"), [("evaluate", 0), ("evaluate", 6), ("save", 5), ("save", 8)])
def test_wherever_a_signal_comes_nothing_is_lost(event: str, step: int, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        tiny_run(out, callbacks=[raised(signal.SIGTERM, event, step)]).train()
    tiny_run(out).train("auto")
    assert_same(out, whole)


def test_a_signal_in_an_evaluation_ends_it_at_once(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, evaluate = tmp_path / "run", trainer_module.evaluate_model

    def signalled(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    run = tiny_run(out, callbacks=[lambda run, event, metrics: None])
    monkeypatch.setattr(trainer_module, "evaluate_model", signalled)
    with pytest.raises(Stopped):
        run.train()
    assert names(out) == []
    monkeypatch.setattr(trainer_module, "evaluate_model", evaluate)
    tiny_run(out).train("auto")
    assert_same(out, whole)


def test_handlers_of_others_and_ignored_signals_stay() -> None:
    """A job's own requeue handler, and ``nohup``, go on to work."""
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGHUP)}
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGHUP)
            signals.check()
        assert heard == [signal.SIGUSR1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_thread_trains_without_handlers(whole: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=lambda: tiny_run(tmp_path / "run").train())
    thread.start()
    thread.join(DEADLINE)
    assert_same(tmp_path / "run", whole)


SLEEPER = """
import time
from d2o_fast.training.ending import Signals
with Signals():
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_second_signal_kills_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() + process.stderr.readline() == b"\nSIGTERM: the step under way is finished first\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_command_ends_in_one_line(name: str, whole: Path, tmp_path: Path) -> None:
    command = save_tiny_run(tmp_path)
    out = tmp_path / "run"
    arguments = [sys.executable, "-m", "d2o_fast.cli", *command, "--max_steps", "100000"]
    with open(tmp_path / "stderr", "w") as file:
        process = subprocess.Popen(arguments, stderr=file)
    log, deadline = out / "metrics.jsonl", time.monotonic() + DEADLINE
    while not (log.exists() and log.read_bytes().count(b"\n") > 3):
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    code, said = process.wait(DEADLINE), (tmp_path / "stderr").read_text()
    assert code == 128 + getattr(signal, name), said
    assert f"{name}: stopped after step " in said
    assert "Traceback" not in said
    assert names(out)


# --- Errors ----------------------------------------------------------------------------------------------------------


class OutOfMemory(Exception):
    """Stands for any error of a step."""


@pytest.mark.parametrize("step", [1, 4, 7])
@pytest.mark.parametrize("place", ["forward", "callback", "update"])
def test_an_error_in_a_step_leaves_the_last_good_state(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, step: int
) -> None:
    out = tmp_path / "run"
    callbacks = [stop_at(step)] if place == "callback" else []
    run = tiny_run(out, callbacks=callbacks, gradient_accumulation_steps=1)
    name = {"forward": "batch_loss", "update": "adamw"}.get(place)
    original = getattr(trainer_module, name) if name else None

    def failing(*args: Any, **options: Any) -> Any:
        assert original is not None
        if place == "update":
            optimizer = original(*args)
            update = optimizer.step

            def broken() -> None:
                update()
                if run.state.global_step == step:
                    raise OutOfMemory

            optimizer.step = broken
            return optimizer
        if run.state.global_step == step and torch.is_grad_enabled():
            raise OutOfMemory
        return original(*args, **options)

    if name:
        monkeypatch.setattr(trainer_module, name, failing)
    with pytest.raises((Stop, OutOfMemory)):
        run.train()
    monkeypatch.undo()
    # A half update is not saved; the checkpoint of every fifth step remains.
    kept = {5 if step > 5 else 0} if place == "update" else {step, *({5} if step > 5 else ())}
    assert names(out) == [f"checkpoint-{number}" for number in sorted(kept) if number]
    tiny_run(out).train("auto")
    assert_same(out, whole)


def test_a_judge_that_fails_in_the_last_evaluation_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_judge.py").write_text("def judge(prompt, response):\n    raise RuntimeError('no more')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "run"
    with pytest.raises(Exception, match="no more"):
        tiny_run(out, judge="late_judge:judge", eval_steps=0).train()
    assert (out / "model.safetensors").exists()
    assert names(out)[-1] == "checkpoint-8"
    sys.modules.pop("late_judge")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), r"'/x/y': No space left on device\. Free space\. S"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), "mend its rights or choose another"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
        (FileExistsError(errno.EEXIST, "File exists", "run"), "a folder: choose another"),
        (MemoryError(), r"out of memory \(out of memory\)\. Lower per_device_train_batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "CUDA out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("shapes do not match"), None),
        (D2OError("clear already"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_machine_in_one_line(error: BaseException, words: str | None) -> None:
    told = explained(error, "after step 3 of 9", "S is saved.")
    assert (told is None) is (words is None)
    if told is not None and words is not None:
        assert str(told).startswith("after step 3 of 9: ")
        assert str(told).endswith("S is saved.")
        with pytest.raises(D2OError, match=words):
            raise told


def test_a_disk_that_cannot_hold_a_checkpoint_is_named_before_the_first_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(D2OError, match=r"a checkpoint takes 0\.\d+ GiB, and 0\.00 GiB are free"):
        tiny_run(tmp_path / "run").train()
    assert not (tmp_path / "run" / "anchors").exists()


# --- A longer run ----------------------------------------------------------------------------------------------------


def test_a_finished_run_can_grow(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a constant rate a run that grew has the bits of one that was long from the start."""
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 2}
    tiny_run(tmp_path / "long", max_steps=11, **constant).train()
    tiny_run(tmp_path / "grown", **constant).train()
    with pytest.raises(D2OError, match=r"had 8 steps and would now have 7; .* can only grow"):
        tiny_run(tmp_path / "grown", max_steps=7, **constant).train("latest")
    tiny_run(tmp_path / "grown", max_steps=11, **constant).train("latest")
    assert (tmp_path / "grown/model.safetensors").read_bytes() == (tmp_path / "long/model.safetensors").read_bytes()
    assert "goes on as in a run" not in caplog.text
    shutil.copytree(whole, tmp_path / "linear")
    tiny_run(tmp_path / "linear", max_steps=11).train("latest")
    assert "grows from 8 to 11 steps. The learning rate goes on as in a run of 11 steps" in caplog.text
    assert load_state(checkpoints(tmp_path / "linear")[-1]).config["max_steps"] == 11


def test_another_place_is_said_once(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-8")
    shutil.copytree(whole.parent / "anchors", tmp_path / "anchors")
    threads, products = torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.set_num_threads(threads + 1)
        tiny_run(out, tokens_per_micro_batch=50).train("latest")
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.fp32_precision = products
    (said,) = [record.getMessage() for record in caplog.records if "goes on elsewhere" in record.getMessage()]
    assert f"threads was {threads} and is {threads + 1}," in said
    assert f"fp32 products was '{products}' and is 'tf32'" in said
    assert "tokens_per_micro_batch was None and is 50" in said
    assert "agree with an unbroken run to rounding, not in bits" in said


# --- One trainer, several calls --------------------------------------------------------------------------------------


def test_a_second_call_starts_from_the_initial_state_or_not_at_all(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of the step that failed are gone; weights that a step changed are no start."""
    out, original, calls = tmp_path / "run", trainer_module.batch_loss, list[int]()

    def failing(*args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError
        return original(*args, **options)

    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    tiny_run(tmp_path / "expected", **settings).train()
    run = tiny_run(out, **settings)
    monkeypatch.setattr(trainer_module, "batch_loss", failing)
    with pytest.raises(D2OError, match="out of memory"):
        run.train()
    monkeypatch.undo()
    run.train()
    assert_same(out, tmp_path / "expected")
    run.args.output_dir = str(tmp_path / "third")
    with pytest.raises(D2OError, match=r"an earlier call has changed this trainer's model.*Make a new D2OTrainer"):
        run.train()


def test_a_second_call_takes_no_window_over(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"refresh_every": 3, "save_steps": 2, "eval_steps": 0}
    tiny_run(tmp_path / "expected", **settings).train()
    run = tiny_run(tmp_path / "run", callbacks=[stop_at(5)], **settings)
    with pytest.raises(Stop):
        run.train()
    for path in checkpoints(tmp_path / "run")[1:]:  # 2 is before the window of 5
        shutil.rmtree(path)
    run.callbacks.clear()
    run.train("latest")
    assert_same(tmp_path / "run", tmp_path / "expected")


def test_a_model_is_saved_before_it_is_trained_too(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    run.save_model(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert not (tmp_path / "model" / "README.md").exists()  # nothing to tell
    (tmp_path / "file").write_text("")
    with pytest.raises(D2OError, match="file cannot be written: File exists"):
        run.save_model(tmp_path / "file")


# --- Nobody reads ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_closed_terminal_costs_nothing(tmp_path: Path) -> None:
    """It sends SIGHUP, and every write to it fails: of the bar, of the log, of the signal's own line."""
    out, (reader, writer) = tmp_path / "run", os.pipe()
    command = [sys.executable, "-m", "d2o_fast.cli", *save_tiny_run(tmp_path), "--max_steps", "100000"]
    process = subprocess.Popen([*command, "--save_steps", "100000"], stdout=subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    log = out / "metrics.jsonl"
    for lines in (3, 30):
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > lines):
            time.sleep(0.05)
        if lines == 3:
            os.close(reader)
    process.send_signal(signal.SIGHUP)
    assert process.wait(DEADLINE) == 128 + signal.SIGHUP
    assert names(out)


def test_a_signal_whose_line_cannot_be_written_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(descriptor: int, text: bytes) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with Signals() as signals:
        monkeypatch.setattr(os, "write", gone)
        os.kill(os.getpid(), signal.SIGHUP)
        monkeypatch.undo()
        assert signals.number == signal.SIGHUP


def test_a_line_that_cannot_be_written_costs_no_step(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = tiny_run(out, save_steps=100)
    write = run._write

    def full(metrics: dict[str, float], step: int | None = None) -> None:
        if run.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
        write(metrics, step)

    run._write = full  # type: ignore[method-assign]
    with pytest.raises(D2OError, match=r"No space left on device\. Free space\. .*checkpoint-4 is saved"):
        run.train()
    tiny_run(out, save_steps=100).train("auto")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_save_callback_that_fails_at_the_end_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def upload(run: D2OTrainer, event: str, metrics: dict[str, float]) -> None:
        if event == "save":
            raise ValueError("no network")

    with pytest.raises(Stopped):
        tiny_run(tmp_path / "run", callbacks=[raised(signal.SIGTERM, "log", 2), upload]).train()
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert "a checkpoint was written, then a callback failed at the end: no network" in caplog.text

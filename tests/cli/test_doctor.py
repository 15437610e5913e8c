"""The doctor reports what is installed, which paths run, and why the others do not."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from d2o_fast import doctor
from d2o_fast.cli import main
from d2o_fast.errors import D2OError
from d2o_fast.loss.ops import choose_engine
from d2o_fast.training.given import refuse_many_processes


def test_json_holds_versions_devices_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["software"]["python"] == platform.python_version()
    assert report["software"]["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu"
    assert len(report["devices"]) == 1 + torch.cuda.device_count()
    assert set(report["paths"]) == {*("loss", "sampler", "attention", "prompts", "liger-kernel", "LoRA", "processes")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert report["paths"]["loss"]["runs"].startswith(choose_engine("auto", torch.empty(0, device=device)).name)


def test_the_table_gives_a_reason_for_each_path_that_will_not_run() -> None:
    """It runs in a separate process: the tests may run under Triton's interpreter, users do not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "d2o_fast.cli", "doctor"]
    table = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    report = doctor.examine()
    for name, found in report["software"].items():
        assert f"{name:<14}{found or 'not installed'}" in table
    if not torch.cuda.is_available():
        assert "not triton: backend='triton' needs a GPU" in table
        assert "not flash_attention_2: needs a CUDA device" in table
        assert "read once for all responses (shared_prefix), by torch's flash attention on the CPU" in table


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "peft" else real(name))
    report = doctor.examine()
    assert report["software"]["peft"] is None
    assert "pip install 'd2o-fast[lora]'" in report["paths"]["LoRA"]["not"]["use_peft"]


def test_more_processes_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert doctor.examine()["paths"]["processes"]["runs"].startswith("none")
    for wrong in ("abc", "2.0", "-1", "0", "9" * 5000):
        monkeypatch.setenv("WORLD_SIZE", wrong)
        assert "WORLD_SIZE is '" in doctor.examine()["paths"]["processes"]["not"]["any"]
        with pytest.raises(D2OError, match="WORLD_SIZE is '"):
            refuse_many_processes()


def test_without_a_loss_path_both_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without Triton the torch path runs only if the caller names it."""

    def none(backend: str, probe: torch.Tensor) -> None:
        raise ImportError("no Triton here")

    monkeypatch.setattr(doctor, "choose_engine", none)
    found = doctor.examine()["paths"]["loss"]
    assert found["runs"] == "none"
    assert found["not"] == {"triton": "no Triton here", "torch": "only where backend='torch' asks for it"}

"""The commands, as a user types them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from d2o_fast import D2OConfig, __version__, cli
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.arguments import parse
from d2o_fast.cli import main
from d2o_fast.config import FIELDS, allowed
from tiny import save_tiny, tiny_rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(12)))
    (folder / "cli_judge.py").write_text(
        "def judge(prompt, response):\n    return 'a' if 'a' in response else 'none'\n"
    )
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data.jsonl"),
        "eval_fraction": 0.3,
        "output_dir": str(folder / "run"),
        "num_generations": 2,
        "max_length": 64,
        "max_completion_length": 12,
        "max_steps": 8,
        "learning_rate": 3e-3,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[str, str]:
    assert main(arguments) == status
    return capsys.readouterr()


# --- The whole way ---------------------------------------------------------------------------------------------------


def test_sample_train_eval(inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(inputs))
    settings, out = str(inputs / "config.yaml"), inputs / "run"

    printed, _ = run(capsys, "sample", settings)
    stores = {name: AnchorStore.open(out / "anchors" / name) for name in ("train", "eval")}
    counts = {name: len(store.examples()) for name, store in stores.items()}
    assert sum(counts.values()) == 12
    for line, (name, count) in zip(printed.splitlines(), counts.items(), strict=True):
        assert line.startswith(f"{name}: {count} negatives of ")
        assert f"{2 * count} anchors" in line
        assert "scored on" in line

    shards = {path: path.stat().st_mtime_ns for path in (out / "anchors").rglob("shard-*")}
    printed, _ = run(capsys, "train", settings)
    assert "8 steps: loss 0." in printed
    assert {path: path.stat().st_mtime_ns for path in (out / "anchors").rglob("shard-*")} == shards
    AutoModelForCausalLM.from_pretrained(out)

    printed, _ = run(capsys, "eval", settings, "--judge", "cli_judge:judge", "--judge_num_generations=3")
    report = json.loads((out / "eval.json").read_text())
    assert report["initial"]["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert report["trained"]["eval_loss"] < 0.6
    assert report["trained"]["eval_rewards/margins"] > 0.2 > abs(report["initial"]["eval_rewards/margins"])
    assert f"{report['trained']['eval_loss']:.4f}" in printed
    for model in ("initial", "trained"):
        shares = [value for name, value in report[model].items() if name.startswith("eval_judge/")]
        assert sum(shares) == pytest.approx(1.0)
    assert len(report["samples"]) == 3 * counts["eval"]
    assert set(report["samples"][0]) == {"prompt", "before", "before_label", "after", "after_label"}
    for sample in report["samples"]:
        assert sample["after_label"] == ("a" if "a" in sample["after"] else "none")

    # The initial model as --eval_model: nothing has changed.
    run(capsys, "eval", settings, "--eval_model", str(inputs / "model"))
    report = json.loads((out / "eval.json").read_text())
    assert report["trained"] == report["initial"]


def test_train_samples_first_and_lora_is_evaluated(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--output_dir", str(inputs / "lora"), "--use_peft", "true", "--learning_rate", "2e-2")
    run(capsys, "train", str(inputs / "config.yaml"), *flags)
    assert (inputs / "lora" / "adapter_model.safetensors").is_file()
    run(capsys, "eval", str(inputs / "config.yaml"), *flags)
    report = json.loads((inputs / "lora" / "eval.json").read_text())
    assert report["trained"]["eval_loss"] < report["initial"]["eval_loss"] - 0.01


def test_a_dry_run_says_what_it_understood_and_does_nothing(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--output_dir", str(tmp_path / "run"), "--dry-run")
    printed, log = run(capsys, "sample", str(inputs / "config.yaml"), *flags)
    found = re.findall(r"^(train|eval): (\d+) negatives of (\d+) prompts; (\d+) anchors to draw", printed, re.MULTILINE)
    assert [name for name, *_ in found] == ["train", "eval"]
    assert sum(int(negatives) for _, negatives, _, _ in found) == 12
    assert all(int(to_draw) == 2 * int(negatives) for _, negatives, _, to_draw in found)
    assert "⟦ go away" in printed
    assert printed.endswith("nothing was sampled or written (--dry-run)\n")
    assert "12 rows, 12 negatives (prompt + rejected)" in log
    assert not (tmp_path / "run").exists()
    _, error = run(capsys, "train", str(inputs / "config.yaml"), "--dry-run", status=2)
    assert "unknown flag --dry-run" in error
    printed, _ = run(capsys, "sample", "--help")
    assert "[--dry-run]" in printed


def test_several_data_files(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a list in the file, as a list in a flag, as a pattern; a prompt that is on both sides is said to be."""
    rows = [json.dumps(row) + "\n" for row in tiny_rows(9)]
    for name, part in (("a", rows[:4]), ("b", rows[4:8]), ("c", rows[6:9])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    settings = yaml.safe_load((inputs / "config.yaml").read_text())
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({**settings, "dataset_name": [a, b]}))
    plain = str(inputs / "config.yaml")
    for arguments in (
        [str(tmp_path / "list.yaml")],
        [plain, f"--dataset_name=[{a}, {b}]"],
        [plain, f"--dataset_name={tmp_path}/[ab].jsonl"],
    ):
        printed, _ = run(capsys, "sample", *arguments, "--dry-run", "--eval_fraction=0")
        assert printed.startswith("train: 8 negatives of 8 prompts")
    flags = (f"--dataset_name=[{a}, {b}]", "--eval_dataset_name", c, "--eval_fraction=0")
    _, log = run(capsys, "sample", plain, *flags, "--dry-run")
    assert "2 prompts of eval_dataset_name are in dataset_name too, and trained on" in log


def test_anchors_are_inspected_and_exported(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "sample", str(inputs / "config.yaml"), "--output_dir", str(tmp_path))
    printed, _ = run(capsys, "anchors", "inspect", str(tmp_path / "anchors"))
    assert len(re.findall(r"^\d+ prompts, \d+ anchors", printed, re.MULTILINE)) == 2
    run(capsys, "anchors", "export", str(tmp_path / "anchors" / "train"), str(tmp_path / "out.jsonl"))
    line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert set(line) == {"prompt", "chosen", "rejected"}
    _, error = run(capsys, "anchors", "export", str(tmp_path), status=2)
    assert "usage: d2o anchors inspect FOLDER" in error


# --- Settings --------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file(inputs: Path) -> None:
    _, settings = parse("train", [str(inputs / "config.yaml"), "--learning_rate", "1e-5", "--report_to=[tensorboard]"])
    config = D2OConfig(**settings)
    assert (config.learning_rate, config.max_steps, config.report_to) == (1e-5, 8, ["tensorboard"])


def test_a_file_with_exponents_and_every_setting_is_read(tmp_path: Path) -> None:
    everything = dataclasses.asdict(D2OConfig(learning_rate=2e-5, use_peft=True, lora_target_modules=["q"]))
    text = yaml.safe_dump(everything).replace("2.0e-05", "2e-5")
    assert "learning_rate: 2e-5\n" in text
    (tmp_path / "config.yaml").write_text(text)
    _, settings = parse("train", [str(tmp_path / "config.yaml")])
    assert dataclasses.asdict(D2OConfig(**settings)) == everything


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--learnin_rate", "1"], "unknown flag --learnin_rate; did you mean '--learning_rate'?"),
        (["train", "--learning", "1"], "unknown flag --learning"),  # no abbreviations
        (["train", "FILE"], "unknown setting 'num_generation'; did you mean 'num_generations'?"),
        (["train", "--config", "FILE"], "unknown setting 'num_generation'; did you mean 'num_generations'?"),
        (["sample", "nowhere.yaml"], "'nowhere.yaml' cannot be read"),
        (["train", "--max_steps", "some"], "max_steps"),
        (["train", "--lr_scheduler_type", "step"], "lr_scheduler_type"),
        (["train", "--temperature", "0"], "temperature is 0; it must be a number > 0"),
        (["train"], "dataset_name is not set"),
        (["sample", "--dataset_name", "none.jsonl"], "none.jsonl: no such file"),
        (["eval", "--eval_modl", "x"], "did you mean '--eval_model'?"),
        (["train", "--eval_model", "x"], "unknown flag --eval_model"),
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["eval", "--dataset_name", "a.jsonl", "--eval_fraction=0.5"], "holds no trained model; run `d2o train` first"),
        (["eval", "--dataset_name", "a.jsonl"], "there is nothing to evaluate on: set eval_dataset_name or eval_frac"),
        (["eval", "--judge_max_prompts=3"], "judge_max_prompts is 3; it must be left out where judge is not set"),
        (["eval", "--eval_model", "~no_such_user"], "eval_model is '~no_such_user'; it must be a path"),
        (["anchors", "inspect", "a\0b"], "folder is 'a\\x00b'; it must be a path that can be read"),
        (["doctor", "--jso"], "unknown flag --jso; did you mean '--json'?"),
    ],
)
def test_errors_are_one_line_and_no_traceback(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("num_generation: 3\n")
    arguments = [str(tmp_path / "config.yaml") if argument == "FILE" else argument for argument in arguments]
    printed, error = run(capsys, *arguments, status=2)
    assert printed == ""
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n", "just words\n"])
def test_a_file_that_is_no_settings_file_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    _, error = run(capsys, "train", str(tmp_path / "config.yaml"), status=2)
    assert str(tmp_path / "config.yaml") in error


def test_eval_without_a_trained_model_says_so(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--output_dir", str(inputs / "untrained"))
    _, error = run(capsys, "eval", str(inputs / "config.yaml"), *flags, status=2)
    assert "holds no trained model" in error


# --- Help ------------------------------------------------------------------------------------------------------------


def test_every_setting_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    printed, _ = run(capsys, "train", "--help")
    flat = " ".join(printed.split())
    for name in FIELDS:
        assert f"--{name} VALUE " in flat
        text = f"{FIELDS[name].metadata['help']} ({allowed(name)}"
        assert " ".join(text.split()) in flat, name


def test_help_and_version_need_no_transformers() -> None:
    code = "import sys; from d2o_fast.cli import main; main(['--help']); main(['--version']); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "d2o doctor" in found
    assert f"d2o-fast {__version__}\n" in found
    assert "transformers" not in found.splitlines()[-1].split()


# --- Ends that are no result -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["doctor"]])
def test_a_reader_that_leaves_is_no_fault(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "d2o_fast.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_full_disk_is_one_line() -> None:
    command = [sys.executable, "-m", "d2o_fast.cli", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    found = "error: d2o --help stopped: No space left on device; free some space, or choose another folder\n"
    assert (done.returncode, done.stderr) == (1, found)


def test_output_that_the_terminal_cannot_show_is_written_as_codes(inputs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "d2o_fast.cli", "sample", str(inputs / "config.yaml"), "--dry-run"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\\u27e6 go away" in done.stdout


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
        ("raise ValueError('no')", 2, "anchor_score 'cli_score:score' raises ValueError: no ("),
        ("import sys; sys.exit()", 2, "anchor_score 'cli_score:score' raises SystemExit ("),
    ],
)
def test_a_command_that_is_stopped_says_so_in_a_line(
    body: str, status: int, message: str, inputs: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "cli_score.py").write_text(f"def score(prompt, response):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_score", raising=False)
    flags = ["--output_dir", str(tmp_path / "run"), "--anchor_score=cli_score:score", "--min_anchor_score=0"]
    _, error = run(capsys, "sample", str(inputs / "config.yaml"), *flags, status=status)
    assert message in error
    assert "Traceback" not in error


def test_the_systems_refusals_are_lines_and_bugs_are_not(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "anchors").write_text("a file where a folder has to be")
    _, error = run(capsys, "sample", str(inputs / "config.yaml"), "--output_dir", str(tmp_path / "run"), status=2)
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "run" / "anchors") in line

    def refused(command: str, arguments: list[str]) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere")

    monkeypatch.setattr(cli, "_run", refused)
    assert main(["doctor"]) == 1
    assert "d2o doctor stopped: somewhere: Permission denied; " in capsys.readouterr().err

    def broken(command: str, arguments: list[str]) -> int:
        raise OSError("no number: a bug")

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(OSError, match="a bug"):
        main(["doctor"])

"""A run that is killed, wherever, and continued ends with the bits of the run that was never killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from d2o_fast import D2OConfig, D2OTrainer
from d2o_fast.anchors.build import open_store
from d2o_fast.data.reading import rows_from
from d2o_fast.errors import D2OError, FingerprintError
from d2o_fast.training import checkpoint as ckpt
from d2o_fast.training.metrics import MetricLog, read_log
from stops import Stop, killed, sign, stop_at
from tiny import tiny_model, tiny_rows, tiny_tokenizer

# Three steps an epoch, the last of them partial; log lines that span checkpoints; dropout in the model.
SETTINGS: dict[str, Any] = {
    "num_generations": 2,
    "max_length": 64,
    "max_completion_length": 12,
    "learning_rate": 3e-3,
    "max_steps": 24,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 3,
    "eval_steps": 8,
    "save_steps": 2,
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine",
    "disable_dropout": False,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, data, held-out data, and settings that read them."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(attention_dropout=0.2).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, rows in (("train", tiny_rows(10)), ("eval", tiny_rows(14)[10:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        **SETTINGS,
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "train.jsonl"),
        "eval_dataset_name": str(folder / "eval.jsonl"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def trainer(inputs: Path, out: Path, **settings: Any) -> D2OTrainer:
    callbacks = settings.pop("callbacks", None)
    args = D2OConfig(**{**yaml.safe_load((inputs / "config.yaml").read_text()), "output_dir": str(out), **settings})
    rows, held_out = (rows_from(read_jsonl(inputs / f"{name}.jsonl"), name) for name in ("train", "eval"))
    return D2OTrainer(args.model_name_or_path, args, rows, held_out, callbacks=callbacks)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def never_killed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("never-killed")
    trainer(inputs, out).train()
    return out


def assert_same_run(found: Path, expected: Path) -> None:
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert [path.name for path in ckpt.checkpoints(found)] == [path.name for path in ckpt.checkpoints(expected)]
    logs = [read_log(folder / "metrics.jsonl") for folder in (found, expected)]
    for record in (*logs[0], *logs[1]):
        record.pop("tokens_per_second", None)
    assert logs[0] == logs[1]
    for mine, theirs in zip(ckpt.checkpoints(found), ckpt.checkpoints(expected), strict=True):
        assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        states = [ckpt.load_state(path) for path in (mine, theirs)]
        for state in states:
            state.metrics.pop("tokens_per_second")
            state.config.pop("output_dir")
            state.config.pop("resume_from_checkpoint")
            state.log.clear()  # digests of lines with tokens_per_second
        assert states[0] == states[1]
        tensors = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (mine, theirs)]
        assert tensors[0].keys() == tensors[1].keys()
        for key, values in tensors[0].items():
            assert all(torch.equal(value, tensors[1][key][name]) for name, value in values.items())


# --- Killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_twice_and_continued_gives_the_same_bits(inputs: Path, never_killed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train", str(inputs / "config.yaml"), "--output_dir", str(out)]

    # While a checkpoint is written: the model is there, the optimizer is not. The log is a line ahead, that of step 3.
    killed(command, "torch.save", out / ".tmp-checkpoint-4")
    assert (out / ".tmp-checkpoint-4" / "model.safetensors").exists()
    assert [path.name for path in ckpt.checkpoints(out)] == ["checkpoint-2"]
    assert [record["step"] for record in read_log(out / "metrics.jsonl")] == [0, 3]

    # Between two checkpoints, in the middle of an epoch: after step 11.
    killed([*command, "--resume_from_checkpoint", "latest"], "torch.optim.AdamW.step", out / "checkpoint-10", count=2)
    assert [path.name for path in ckpt.checkpoints(out)] == ["checkpoint-8", "checkpoint-10"]
    assert not (out / "model.safetensors").exists()

    trainer(inputs, out).train(resume_from_checkpoint=True)
    assert_same_run(out, never_killed)
    assert not list(out.glob(".tmp-*"))


def test_leaving_at_any_log_line_and_continuing(inputs: Path, never_killed: Path, tmp_path: Path) -> None:
    """Steps 3 to 21, so that the sums since the last line and every place in an epoch are carried over."""
    out = tmp_path / "run"
    shutil.copytree(never_killed / "anchors", out / "anchors")
    for step in (3, 9, 12, 21):
        resume = "latest" if step > 3 else None
        with pytest.raises(Stop):
            trainer(inputs, out, callbacks=[stop_at(step)]).train(resume)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 22, "lo')  # the line that a kill tore
    trainer(inputs, out, resume_from_checkpoint=str(ckpt.checkpoints(out)[-1])).train()
    assert_same_run(out, never_killed)


def test_another_way_to_read_prompts_is_no_continuation(inputs: Path, tmp_path: Path) -> None:
    """ "auto" may decide otherwise on another machine; the bits would then change in silence."""
    out = tmp_path / "run"
    with pytest.raises(Stop):
        trainer(inputs, out, callbacks=[stop_at(9)]).train()
    state = ckpt.checkpoints(out)[-1] / "trainer_state.json"
    found = json.loads(state.read_text())
    assert isinstance(found["shared"], bool)
    state.write_text(json.dumps({**found, "shared": not found["shared"]}))
    sign(state.parent)
    with pytest.raises(D2OError, match=r"checkpoint-\d+ read .* and here it would be: .*start anew with shared_prefix"):
        trainer(inputs, out).train("latest")


def test_resuming_a_finished_run_changes_nothing(inputs: Path, never_killed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(never_killed, out)
    trainer(inputs, out).train("latest")
    assert_same_run(out, never_killed)


@pytest.mark.slow
def test_shared_prompts_under_a_token_budget_resume_to_the_same_bits(inputs: Path, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")  # without dropout, which cannot be shared
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "anchors_dir": str(tmp_path / "anchors"),
        "shared_prefix": True,
        "tokens_per_micro_batch": 90,
    }
    trainer(inputs, tmp_path / "whole", **settings).train()
    for step in (3, 15):
        resume = "latest" if step > 3 else None
        with pytest.raises(Stop):
            trainer(inputs, tmp_path / "parts", **settings, callbacks=[stop_at(step)]).train(resume)
    trainer(inputs, tmp_path / "parts", **settings).train("latest")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_lora_resumes_to_the_same_bits(inputs: Path, tmp_path: Path) -> None:
    settings = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.1, "anchors_dir": str(tmp_path / "anchors")}
    trainer(inputs, tmp_path / "whole", **settings).train()
    with pytest.raises(Stop):
        trainer(inputs, tmp_path / "parts", **settings, callbacks=[stop_at(15)]).train()
    trainer(inputs, tmp_path / "parts", **settings).train("latest")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert first == second


# --- Files -----------------------------------------------------------------------------------------------------------


def test_save_total_limit_keeps_the_newest(never_killed: Path) -> None:
    assert [path.name for path in ckpt.checkpoints(never_killed)] == ["checkpoint-22", "checkpoint-24"]
    names = {path.name for path in (never_killed / "checkpoint-24").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "tokenizer.json"} <= names


def test_the_new_checkpoint_stands_before_the_old_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    seen = []
    remove = shutil.rmtree

    def watching(path: Path, **options: Any) -> None:
        seen.append((Path(path).name, [found.name for found in ckpt.checkpoints(tmp_path)]))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watching)
    for step in (2, 4):
        ckpt.save_checkpoint(tmp_path, ckpt.TrainerState(2, step), lambda folder: None, optimizer, {}, {}, limit=1)
    assert seen == [(".tmp-checkpoint-2", ["checkpoint-4"])]


def test_a_write_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    def save_model(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise OSError("disk full")

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(D2OError, match=r"checkpoint-2 cannot be written \(disk full; .* GiB are free"):
        ckpt.save_checkpoint(tmp_path, ckpt.TrainerState(2, 2), save_model, optimizer, {}, {}, limit=None)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_removed_and_the_users_files_are_not(tmp_path: Path) -> None:
    for name in (".tmp-checkpoint-4", ".tmp-final", ".tmp-mine", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    assert ckpt.find_checkpoint(tmp_path, None) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-mine", "checkpoint-best"]


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def used(inputs: Path, never_killed: Path, tmp_path: Path) -> Path:
    shutil.copytree(never_killed, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_used_folder_is_not_overwritten(inputs: Path, used: Path) -> None:
    before = contents(used)
    with pytest.raises(D2OError, match=r"already holds checkpoint-22, checkpoint-24.*resume_from_checkpoint 'latest'"):
        trainer(inputs, used).train()
    for path in ckpt.checkpoints(used):
        shutil.rmtree(path)
    with pytest.raises(D2OError, match="already holds a trained model"):
        trainer(inputs, used).train()
    assert contents(used).items() <= before.items()


def test_two_runs_in_one_folder(inputs: Path, used: Path) -> None:
    """The second is refused while the first is at work; at its end nothing is left that would refuse a third."""
    runs: list[str] = []

    def second(run: D2OTrainer, event: str, metrics: dict[str, float]) -> None:
        if event == "log" and not runs:
            with pytest.raises(D2OError, match="another process is training here; wait for it or stop it"):
                trainer(inputs, used).train("latest")
            runs.append(event)

    for path in ckpt.checkpoints(used)[-1:]:
        shutil.rmtree(path)
    trainer(inputs, used, callbacks=[second]).train("latest")
    assert runs == ["log"]
    assert not (used / ".lock").exists()
    (used / ".lock").touch()  # as a killed run leaves it
    trainer(inputs, used).train("latest")


def test_settings_that_must_not_change_are_named(inputs: Path, used: Path) -> None:
    changes = {"seed": 7, "gradient_accumulation_steps": 4, "learning_rate": 1e-4, "logging_steps": 1}
    with pytest.raises(D2OError) as error:
        trainer(inputs, used, **changes).train("latest")
    assert "seed: 42 in the checkpoint, now 7" in str(error.value)
    assert "gradient_accumulation_steps: 2 in the checkpoint, now 4" in str(error.value)
    assert "learning_rate" in str(error.value)
    assert "logging_steps" not in str(error.value)  # decides what is logged, not what is trained


@pytest.mark.parametrize("name", ["train", "eval"])
def test_references_are_never_rebuilt(inputs: Path, used: Path, name: str) -> None:
    shutil.rmtree(used / "anchors" / name)
    with pytest.raises(D2OError, match="no such folder"):
        trainer(inputs, used).train("latest")
    assert not (used / "anchors" / name).exists()


def test_an_incomplete_store_is_not_completed(inputs: Path, used: Path) -> None:
    (used / "anchors" / "train" / "shard-00000.parquet").unlink()
    with pytest.raises(D2OError, match="shards are missing"):
        trainer(inputs, used).train("latest")


def test_references_of_other_anchors_are_refused(inputs: Path, used: Path) -> None:
    other = {"sampling_seed": 3, "anchors_dir": str(used / "others")}
    run = trainer(inputs, used, **other)
    for name, rows in run.datasets.items():
        assert rows is not None
        open_store(run.model, run.tokenizer, rows, run.args, name)
    with pytest.raises(D2OError, match="was trained with other train anchors"):
        trainer(inputs, used, **other).train("latest")


def test_a_trained_model_in_place_of_the_initial_one_is_refused(inputs: Path, used: Path) -> None:
    with pytest.raises(FingerprintError, match="weights"):
        trainer(inputs, used, model_name_or_path=str(used)).train("latest")


def test_only_the_last_checkpoint_of_this_folder_continues(inputs: Path, used: Path, tmp_path: Path) -> None:
    with pytest.raises(D2OError, match="also holds checkpoint-24"):
        trainer(inputs, used).train(str(used / "checkpoint-22"))
    with pytest.raises(D2OError, match="is not a folder"):
        trainer(inputs, used).train(str(used / "checkpoint-23"))
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(D2OError, match="is not a checkpoint of output_dir"):
        trainer(inputs, used).train(str(tmp_path / "checkpoint-9"))
    with pytest.raises(D2OError, match="holds no checkpoint"):
        trainer(inputs, tmp_path / "empty").train("latest")


FILES = ("config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "tokenizer.json")
DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "one bit": lambda file: file.write_bytes(flipped(file.read_bytes())),
    "another's": lambda file: file.write_bytes(
        (file.parent.with_name("checkpoint-22") / file.name).read_bytes() + b" "
    ),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a link": lambda file: (file.rename(file.with_suffix(".old")), file.symlink_to(file.with_suffix(".old"))),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "SHA256SUMS"])
def test_a_damaged_file_is_named_with_the_newest_whole_checkpoint(used: Path, name: str, damage: str) -> None:
    if (name, damage) == ("SHA256SUMS", "another's"):
        shutil.copy(used / "checkpoint-22" / name, used / "checkpoint-24" / name)
    else:
        DAMAGES[damage](used / "checkpoint-24" / name)
    words = r"checkpoint-24 is damaged: .*\. The newest whole checkpoint is '.*checkpoint-22': move checkpoint-24 away"
    for resume in ("latest", "auto", str(used / "checkpoint-24")):
        with pytest.raises(D2OError, match=words) as error:
            ckpt.find_checkpoint(used, resume)
        assert name in str(error.value) or name == "SHA256SUMS"
    shutil.rmtree(used / "checkpoint-24")
    assert ckpt.find_checkpoint(used, "latest") == used / "checkpoint-22"


def test_no_checkpoint_is_whole(used: Path) -> None:
    for path in ckpt.checkpoints(used):
        (path / "optimizer.pt").unlink()
    with pytest.raises(D2OError, match=r"No checkpoint in .* is whole: move checkpoint-22, checkpoint-24 away"):
        ckpt.find_checkpoint(used, "latest")


def test_a_file_that_the_run_did_not_write_is_named(used: Path) -> None:
    (used / "checkpoint-24" / "adapter_config.json").write_text("{}")
    with pytest.raises(D2OError, match=r"adapter_config\.json is not in SHA256SUMS; move it out"):
        ckpt.find_checkpoint(used, "latest")


def test_sha256sum_verifies_a_checkpoint(never_killed: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=never_killed / "checkpoint-24", check=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"global_step": 23}, "it is of step 23, and the folder is of step 24"),
        ({"global_step": "24"}, "global_step is '24', which no run writes"),
        ({"epoch": None}, "epoch is None"),
        ({"num_tokens": -1}, "it is of step"),
        ({"digests": ["a"]}, "digests is"),
        ({"metrics": {"loss": "low"}}, "metrics is"),
        ({"shared": "yes"}, "shared is 'yes'"),
        ({"version": 3}, r"version 3 is newer than this d2o-fast reads \(2\)"),
        ({"config": {}}, "config or log is not complete"),
        ({"log": {"bytes": "x", "sha256": "y"}}, "config or log is not complete"),
        ({"colour": 1}, "unexpected keyword argument 'colour'"),
    ],
    ids=str,
)
def test_a_state_that_no_run_writes(used: Path, change: dict[str, Any], words: str) -> None:
    """Also where somebody made the digests fit."""
    file = used / "checkpoint-24" / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    sign(file.parent)
    with pytest.raises(D2OError, match=words):
        ckpt.load_state(ckpt.find_checkpoint(used, "latest") or used)


@pytest.mark.parametrize("text", ["{}}", "[]", "null", "[" * 100_000, '{"global_step": ' + "9" * 6000 + "}"], ids=len)
def test_a_state_that_is_no_state(used: Path, text: str) -> None:
    (used / "checkpoint-24" / "trainer_state.json").write_text(text)
    sign(used / "checkpoint-24")
    with pytest.raises(D2OError, match="checkpoint-24 is not a checkpoint of d2o-fast"):
        ckpt.load_state(used / "checkpoint-24")


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_tensors_of_something_else_are_named(inputs: Path, used: Path, name: str) -> None:
    file = used / "checkpoint-24" / name
    for content in (
        {"state": {0: {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}}},
        [1],
        {},
        {"state": {}, "param_groups": []},
    ):
        torch.save(content, file)
        sign(file.parent)
        with pytest.raises(D2OError, match=rf"{name} cannot be used: .*Resume from another checkpoint"):
            trainer(inputs, used).train("latest")


def test_auto_starts_and_continues(inputs: Path, never_killed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(never_killed / "anchors", out / "anchors")
    with pytest.raises(Stop):
        trainer(inputs, out, callbacks=[stop_at(9)]).train("auto")
    trainer(inputs, out, resume_from_checkpoint="auto").train()
    assert_same_run(out, never_killed)


@pytest.mark.parametrize("change", ["hole", "edited", "shorter"])
def test_holes_in_the_log_are_an_error(inputs: Path, used: Path, change: str) -> None:
    log = used / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    changed = {"hole": lines[:2] + lines[3:], "edited": [*lines[:2], lines[2].replace("1", "2"), *lines[3:]]}
    log.write_text("".join(changed.get(change, lines[:3])))
    before = log.read_bytes()
    with pytest.raises(D2OError, match=r"metrics\.jsonl does not hold the lines that were written before"):
        trainer(inputs, used).train("latest")
    assert log.read_bytes() == before


def test_a_log_that_was_moved_away_begins_again(inputs: Path, used: Path, caplog: pytest.LogCaptureFixture) -> None:
    (used / "metrics.jsonl").unlink()
    trainer(inputs, used).train("latest")
    assert "metrics.jsonl is gone: the log begins with the next step" in caplog.text


def test_a_log_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(D2OError, match=r"metrics\.jsonl is not a regular file; remove it"):
        MetricLog(D2OConfig(output_dir=str(tmp_path)), 0, 1)


def test_a_file_that_the_disk_does_not_give_is_damaged(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = ckpt._sha256

    def unreadable(file: Path) -> str:
        if file.parent.name == "checkpoint-24" and file.name == "optimizer.pt":
            raise OSError(errno.EIO, "Input/output error", str(file))
        return digest(file)

    monkeypatch.setattr(ckpt, "_sha256", unreadable)
    with pytest.raises(D2OError, match=r"optimizer\.pt cannot be read \(Input/output error\).*checkpoint-22"):
        ckpt.find_checkpoint(used, "latest")

"""Whatever can make saving fail is found before the first draw, and nothing of another origin is replaced."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from d2o_fast import D2OConfig, D2OTrainer
from d2o_fast.errors import D2OError
from d2o_fast.training.checkpoint import checkpoints, load_state
from d2o_fast.training.metrics import read_log
from d2o_fast.training.model_card import code, public_path, public_settings
from d2o_fast.training.output import refuse_non_finite
from tiny import tiny_model, tiny_rows, tiny_run, tiny_tokenizer


def nothing_was_done(out: Path) -> bool:
    return not (out / "anchors").exists() and not list(out.glob(".tmp*")) and not checkpoints(out)


# --- Saving is tried first -------------------------------------------------------------------------------------------


class Unwritable:
    """A value that JSON has no word for."""


@pytest.mark.parametrize("part", ["generation_config", "config", "tokenizer"])
def test_a_part_that_cannot_be_saved_is_refused_before_the_first_draw(part: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    if part == "generation_config":
        model.generation_config.temperature = 0.3  # without do_sample
    elif part == "config":
        model.config.note = Unwritable()
    else:
        tokenizer.init_kwargs["note"] = Unwritable()
    args = D2OConfig(output_dir=str(tmp_path / "run"), num_generations=2, max_steps=1)
    with pytest.raises(D2OError, match=r"the model could not be saved after training: .*nothing was drawn or trained"):
        D2OTrainer(model, args, tiny_rows(4), None, tokenizer).train()
    assert nothing_was_done(tmp_path / "run")


@pytest.mark.parametrize("name", ["README.md", "config.json", "d2o_config.yaml", "tokenizer.json"])
def test_files_of_another_origin_stay(name: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(D2OError, match=rf"holds a file '{name}' of another origin"):
        tiny_run(out, anchors_dir=None).train()
    assert (out / name).read_text() == "mine"
    assert nothing_was_done(out)


def test_files_with_other_names_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    tiny_run(tmp_path / "run", max_steps=1).train()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_log_of_another_origin_stays(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"accuracy": 1}\n')
    with pytest.raises(D2OError, match=r"metrics\.jsonl, line 1: not a record of metrics"):
        tiny_run(out).train()
    assert (out / "metrics.jsonl").read_text() == '{"accuracy": 1}\n'


def test_a_store_that_goes_during_the_run_does_not_cost_the_model(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def lost(run: D2OTrainer, event: str, metrics: dict[str, float]) -> None:
        if event == "log" and run.state.global_step == 8:
            (tmp_path / "anchors" / "train").rename(tmp_path / "gone")

    tiny_run(out, callbacks=[lost], eval_steps=0).train()
    assert "10 negatives, 20 anchors" in (out / "README.md").read_text()


def test_an_output_dir_that_is_a_file_or_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(D2OError, match="must be a folder, and this is a file"):
        tiny_run(tmp_path / "file").train()
    tiny_run(tmp_path / "run", output_dir=tmp_path / "run", max_steps=1).train()
    assert (tmp_path / "run" / "README.md").exists()


# --- Bad steps and weights -------------------------------------------------------------------------------------------


def test_an_update_that_ruins_the_weights_saves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        D2OError, match=r"after step 1: \d+ of 21 weights are not finite, the first is .*Lower learning"
    ):
        tiny_run(out, learning_rate=3e38, max_steps=1, warmup_steps=0).train()
    assert not (out / "model.safetensors").exists()
    assert checkpoints(out) == []


def test_the_last_good_checkpoint_is_named(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def ruin(run: D2OTrainer, event: str, metrics: dict[str, float]) -> None:
        if event == "log" and run.state.global_step == 8:
            with torch.no_grad():
                next(run.model.parameters())[0, 0] = math.inf

    with pytest.raises(
        D2OError, match=r"after step 8: 1 of 21 weights .*checkpoint-5 is saved; continue with --resume"
    ):
        tiny_run(out, callbacks=[ruin]).train()
    assert [path.name for path in checkpoints(out)] == ["checkpoint-5"]


def test_weights_of_every_dtype_are_checked() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = torch.nn.Linear(3, 2, dtype=dtype)
        refuse_non_finite(model, "now", "")
        with torch.no_grad():
            model.bias[1] = math.nan
        with pytest.raises(D2OError, match=r"now: 1 of 2 weights are not finite, the first is bias"):
            refuse_non_finite(model, "now", "")


def broken_run(out: Path, step: int, count: int = 1, **settings: Any) -> D2OTrainer:
    """A run in which ``count`` steps from ``step`` on have no finite loss."""
    run = tiny_run(out, eval_steps=0, **settings)
    run._prepare("train")
    examples = list(run.examples["train"])
    original = run._example
    run.examples["train"] = examples

    def example(i: int) -> Any:
        found = original(i)
        if step <= run.state.global_step < step + count:
            scores = [math.nan, *found.ref_logps[1:]]
            return type(found)(found.prompt_ids, found.rejected_ids, found.anchor_ids, scores)
        return found

    run._example = example  # type: ignore[method-assign]
    return run


def test_a_bad_step_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights and moments have the bits of a run whose optimizer was not called in that step."""
    run = broken_run(tmp_path / "skipped", 3, on_bad_step="skip")
    run.train()
    other = tiny_run(tmp_path / "expected", eval_steps=0)
    other._prepare("train")
    real, moved = other._step, []

    def step() -> Any:
        if other.state.global_step == 3:
            before = {name: p.detach().clone() for name, p in other.model.named_parameters()}
            moments = {k: {n: t.clone() for n, t in v.items()} for k, v in other.optimizer.state.items()}
            result = real()
            with torch.no_grad():
                for name, p in other.model.named_parameters():
                    p.copy_(before[name])
            for k, v in moments.items():
                for n, t in v.items():
                    other.optimizer.state[k][n].copy_(t)
            moved.append(3)
            return result
        return real()

    other._step = step  # type: ignore[method-assign]
    other.train()
    assert moved == [3]
    for (name, mine), (_, theirs) in zip(run.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert "step 4: the loss or its gradient is not finite" in caplog.text
    assert "It was left out (on_bad_step 'skip'; 1 so far)" in caplog.text
    records = [record for record in read_log(tmp_path / "skipped" / "metrics.jsonl") if "loss" in record]
    assert [record["bad_steps"] for record in records] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [record["step"] for record in records if record["loss"] is None] == [4]  # no step that counts
    assert all(map(math.isfinite, run.watch.smooth or ()))


def test_a_checkpoint_counts_steps_left_out_since_the_last_line(tmp_path: Path) -> None:
    broken_run(tmp_path / "run", 2, on_bad_step="skip", logging_steps=8, save_steps=4).train()
    assert [load_state(path).bad_steps for path in checkpoints(tmp_path / "run")] == [1, 1]


def test_too_many_bad_steps_stop_the_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(D2OError, match="3 steps were skipped, more than max_bad_steps"):
        broken_run(out, 2, count=9, on_bad_step="skip", max_bad_steps=2).train()
    assert [path.name for path in checkpoints(out)] == ["checkpoint-5"]  # good weights
    tiny_run(out, eval_steps=0, on_bad_step="skip", max_bad_steps=5).train("latest")


def test_a_bad_step_stops_the_run_by_default(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(D2OError, match=r"step 7: the loss .* No checkpoint was written since.*checkpoint-5 is saved"):
        broken_run(out, 6).train()
    assert [path.name for path in checkpoints(out)] == ["checkpoint-5"]
    tiny_run(out, eval_steps=0).train("latest")


# --- The card --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "`plain`"),
        ("<script>alert(1)</script>", "`<script>alert(1)</script>`"),  # a code span shows it and runs nothing
        ("a`b|c", "`a'b\\|c`"),
        ("two\nlines\x1b[31m\u202ered", "`two lines [31m red`"),
    ],
)
def test_texts_of_users_are_code_in_the_card(text: str, shown: str) -> None:
    assert code(text) == shown


def test_no_local_path_leaves_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert public_path("org/model") == "org/model"
    assert public_path("data/train.jsonl") == "data/train.jsonl"
    assert public_path(str(tmp_path / "data" / "train.jsonl")) == "data/train.jsonl"
    assert public_path("/somewhere/else/model/") == "model"
    assert public_path("~/models/mine") == "mine"
    assert public_path("../up/model") == "model"
    args = D2OConfig(dataset_name=["/a/b.jsonl", "~/c.jsonl"], anchors_dir="/x/y", sampling_instruction="/be kind")
    settings = public_settings(args)
    assert settings["dataset_name"] == ["b.jsonl", "c.jsonl"]
    assert settings["anchors_dir"] == "y"
    assert settings["sampling_instruction"] == "/be kind"
    assert D2OConfig(**yaml.safe_load(yaml.safe_dump(settings))) == D2OConfig(**settings)

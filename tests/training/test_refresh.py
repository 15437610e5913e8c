"""Online D2O: fresh anchors are the policy's own, scored under it, and survive a kill."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from d2o_fast import D2OConfig, D2OTrainer
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.cli import main
from d2o_fast.errors import D2OError
from d2o_fast.model.parts import base_of
from d2o_fast.sampling.generate import sample_responses
from d2o_fast.training.checkpoint import checkpoints
from d2o_fast.training.metrics import read_log
from stops import Stop, killed, stop_at
from tiny import tiny_model, tiny_rows, tiny_tokenizer

# Three steps an epoch, the last of them partial; windows begin at 4, 8, 12 ...
SETTINGS: dict[str, Any] = {
    "num_generations": 3,
    "max_length": 64,
    "max_completion_length": 12,
    "learning_rate": 3e-3,
    "max_steps": 14,
    "per_device_train_batch_size": 4,
    "sampling_batch_size": 3,
    "save_steps": 3,
    "refresh_every": 4,
}


def trainer(out: Path, model: Any = None, rows: Any = None, **settings: Any) -> D2OTrainer:
    callbacks = settings.pop("callbacks", None)
    args = D2OConfig(**{**SETTINGS, "output_dir": str(out), "anchors_dir": str(out.parent / "anchors"), **settings})
    data = tiny_rows(10) if rows is None else rows
    return D2OTrainer(model or tiny_model(), args, data, None, tiny_tokenizer(), callbacks=callbacks)


def logps_of(model: Any, prompt: list[int], response: list[int]) -> float:
    """log pi of a response from transformers' own logits, in nats."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum().item()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    trainer(out).train()
    return out


# --- What is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_fresh_anchors_are_the_policys_own_and_it_is_their_reference(tmp_path: Path, lora: bool) -> None:
    policies: dict[int, Any] = {}

    def snapshot(run: D2OTrainer, event: str, metrics: dict[str, float]) -> None:
        if event == "refresh":
            policies[run.state.global_step] = copy.deepcopy(run.model).eval()
            shutil.copytree(tmp_path / f"run/refreshed/step-{run.state.global_step}", tmp_path / f"{len(policies)}")

    settings = {"use_peft": True, "lora_r": 4, "learning_rate": 3e-2} if lora else {}
    run = trainer(tmp_path / "run", callbacks=[snapshot], **settings)
    run.train()
    assert list(policies) == [4, 8, 12]
    stored = run.stores["train"].examples()
    for number, (step, policy) in enumerate(policies.items(), start=1):
        rows = sorted({i for s in range(step, min(step + 4, 14)) for i in run.order.prompts_of(s)})
        examples = AnchorStore.open(tmp_path / f"{number}").examples()
        assert len(examples) == len(rows)
        for place, example in zip(rows, examples, strict=True):
            assert example.prompt_ids == stored[place].prompt_ids
            assert example.rejected_ids == stored[place].rejected_ids
            assert example.ref_logps[0] == stored[place].ref_logps[0]  # the negative's reference is the initial model
            for ids, logp in zip(example.anchor_ids, example.ref_logps[1:], strict=True):
                assert logp == pytest.approx(logps_of(policy, example.prompt_ids, ids), abs=1e-3)
        drawn = sample_responses(
            base_of(policy),
            [stored[i].prompt_ids for i in rows[:3]],
            3,
            max_new_tokens=12,
            eos_token_ids=run.stores["train"].fingerprint["stop_token_ids"],
            pad_token_id=run.pad,
            seed=_seed(f"0 refresh {step} 0"),
        )
        assert [example.anchor_ids for example in examples[:3]] == drawn
    initial = [logps_of(tiny_model(), e.prompt_ids, ids) for e in examples for ids in e.anchor_ids]
    now = [logp for e in examples for logp in e.ref_logps[1:]]
    assert (
        max(abs(a - b) for a, b in zip(initial, now, strict=True)) > 0.1
    )  # the policy has moved, and its adapter is on


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


@pytest.mark.parametrize("every", [1, 4])
def test_fresh_anchors_start_with_no_reward(tmp_path: Path, every: int) -> None:
    """Just drawn, an anchor has log pi = log ref-: drawn every step, anchors give no expected pull (paper.md)."""
    out = tmp_path / "run"
    trainer(out, refresh_every=every, lr_scheduler_type="constant", warmup_ratio=0.0).train()
    records = read_log(out / "metrics.jsonl")
    chosen = {record["step"]: record["rewards/chosen"] for record in records if "loss" in record}
    fresh = {step for step in chosen if (step - 1) % every == 0}
    assert all(abs(chosen[step]) < 1e-5 for step in fresh)
    assert all(abs(chosen[step]) > 1e-5 for step in chosen if step not in fresh)


def test_epochs_are_counted_where_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = trainer(out, refresh_every=2, refresh_strategy="epoch", max_steps=13)
    run.train()
    assert [run.order.window_of(step) for step in range(13)] == [0] * 6 + [6] * 6 + [12]
    records = read_log(out / "metrics.jsonl")
    anchors = {record["step"]: record["refresh/anchors"] for record in records if "refresh/anchors" in record}
    assert anchors == {7: 30, 13: 12}  # all ten prompts, then those of the last step alone


def test_rows_with_anchors_of_their_own_keep_them(tmp_path: Path) -> None:
    rows = [{**row, "anchors": [" of course", " sure"]} if i < 4 else row for i, row in enumerate(tiny_rows(8))]
    run = trainer(tmp_path / "run", rows=rows, max_steps=6)
    run.train()
    assert run.window is not None
    assert [i in run.window for i in range(8)] == [False] * 4 + [True] * 4
    assert run._example(0) == run.examples["train"][0]


def test_a_server_would_draw_from_stale_weights() -> None:
    with pytest.raises(D2OError, match=r"refresh_every is 4; it must be 0 while server_url is set: the server has the"):
        D2OConfig(refresh_every=4, server_url="http://localhost:8000")


# --- Killed and continued --------------------------------------------------------------------------------------------


def assert_same(found: Path, expected: Path) -> None:
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    logs = [read_log(folder / "metrics.jsonl") for folder in (found, expected)]
    for record in (*logs[0], *logs[1]):
        record.pop("tokens_per_second", None)
        record.pop("refresh/seconds", None)
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_left_anywhere_and_continued_it_gives_the_same_bits(whole: Path, tmp_path: Path) -> None:
    """Checkpoints at 3, 6, 9, 12: in the store's window, in the middle of one, and where one begins."""
    out = tmp_path / "run"
    for step in (5, 7, 10, 13):
        with pytest.raises(Stop):
            trainer(out, callbacks=[stop_at(step)]).train("latest" if step > 5 else None)
    trainer(out).train("latest")
    assert_same(out, whole)


@pytest.mark.slow
def test_killed_while_anchors_are_drawn(whole: Path, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(10)))
    out = tmp_path / "run"
    settings = {**SETTINGS, "model_name_or_path": str(tmp_path / "model"), "output_dir": str(out)}
    settings |= {"dataset_name": str(tmp_path / "train.jsonl"), "anchors_dir": str(tmp_path / "anchors")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command = ["train", str(tmp_path / "config.yaml")]
    unfinished = out / "refreshed" / ".tmp-step-8"
    killed(command, "os.replace", unfinished / "shard-00000.parquet")  # before the first file of the second shard
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3", "checkpoint-6"]
    assert unfinished.exists()
    assert main([*command, "--resume_from_checkpoint", "latest"]) == 0
    assert_same(out, whole)
    assert not list((out / "refreshed").glob(".tmp-*"))


def test_windows_that_no_checkpoint_needs_go(tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer(out, save_total_limit=2).train()
    assert [path.name for path in checkpoints(out)] == ["checkpoint-12", "checkpoint-14"]
    # 12 begins a window, which is drawn again from the checkpoint's own weights
    assert sorted(path.name for path in (out / "refreshed").iterdir()) == ["step-12"]


@pytest.mark.parametrize("gone", [[14], [12, 14], [9, 12, 14], [3, 12, 14]], ids=str)
def test_every_checkpoint_can_be_continued_after_a_resume(whole: Path, tmp_path: Path, gone: list[int]) -> None:
    """Again and again: a resume keeps the windows of all checkpoints, and not only of its own."""
    out = tmp_path / "run"
    with pytest.raises(Stop):
        trainer(out, callbacks=[stop_at(11)]).train()
    trainer(out).train("latest")
    for step in gone:
        shutil.rmtree(out / f"checkpoint-{step}")
    shutil.rmtree(out / "checkpoint-11")
    trainer(out).train("latest")
    assert_same(out, whole)


def test_lost_or_other_anchors_are_an_error_and_not_drawn_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stop):
        trainer(out, callbacks=[stop_at(7)]).train()
    window = out / "refreshed" / "step-4"
    shutil.move(window, tmp_path / "kept")
    with pytest.raises(D2OError, match=r"step-4: no such folder.* resume from a checkpoint up to step 4"):
        trainer(out).train("latest")
    assert not window.exists()
    with pytest.raises(Stop):
        trainer(tmp_path / "other", learning_rate=1e-2, callbacks=[stop_at(7)]).train()
    shutil.copytree(tmp_path / "other" / "refreshed" / "step-4", window)
    with pytest.raises(D2OError, match=r"checkpoint-7 was trained with other anchors than those in .*refreshed"):
        trainer(out).train("latest")
    with pytest.raises(D2OError, match="refresh_every: 4 in the checkpoint, now 5"):
        trainer(out, refresh_every=5).train("latest")


@pytest.mark.slow
def test_recomputing_activations_changes_nothing(whole: Path, tmp_path: Path) -> None:
    trainer(tmp_path / "run", gradient_checkpointing=True).train()
    assert_same(tmp_path / "run", whole)

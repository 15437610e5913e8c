"""The study runs every method and setting, chooses on the validation prompts, and continues where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import study

pytestmark = pytest.mark.slow


def test_every_method_runs_with_the_best_settings_of_its_grid(tmp_path: Path, capsys) -> None:
    assert study.main(["methods", "--dry-run", "--seeds", "5", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "study-methods-cpu-tiny.json").read_text())
    names = ["D2O, the paper's loss", "D2O, the demo's fixed setting", "GA", "NPO", "DPO", "SFT"]
    assert [run["name"] for run in report["runs"]] == names
    for run in report["runs"]:
        assert run["seed"] == 5
        assert run["curve"][0][0] == 0
        assert run["curve"][-1][0] == run["settings"]["max_steps"]
        assert all(sum(shares.values()) == pytest.approx(1.0) for _, shares in run["curve"])
        if "fixed" in run["name"]:
            assert run["grid"] == []
            continue
        score = {
            (one["learning_rate"], one["max_steps"]): one["validation"]["helpful"] - one["validation"]["harmful"]
            for one in run["grid"]
        }
        assert len(score) == 2
        assert score[run["settings"]["learning_rate"], run["settings"]["max_steps"]] == max(score.values())
    table = (tmp_path / "study-methods-cpu-tiny.md").read_text()
    assert table in capsys.readouterr().out
    for name in names:
        assert f"\n| {name} |" in table


def test_the_settings_run_and_continue(tmp_path: Path, capsys) -> None:
    grid = ["--refresh_every", "0", "4", "--anchor_weight", "0.05"]
    arguments = ["settings", "--dry-run", "--seeds", "5", "--out", str(tmp_path), *grid]
    assert study.main(arguments) == 0
    path = tmp_path / "study-settings-cpu-tiny.json"
    report = json.loads(path.read_text())
    assert {(run["settings"]["refresh_every"], run["seed"]) for run in report["runs"]} == {(0, 5), (4, 5)}
    for run in report["runs"]:
        assert [step for step, _ in run["curve"]] == [0, 10, 12]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = path.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    assert "\n| frozen, anchor_weight 0.05 |" in table
    first = report["runs"].pop(0)
    path.write_text(json.dumps(report))
    assert study.main(arguments) == 0  # runs the missing one again, with the same shares
    again = json.loads(path.read_text())["runs"]
    assert [run["name"] for run in again] == [first["name"], report["runs"][0]["name"]]
    assert again[0]["curve"] == first["curve"]


def test_the_default_grid_is_that_of_the_schedules() -> None:
    jobs = study.setting_jobs([1, 2], study.Sizes(), dict(study.GRID))
    assert len(jobs) == 24
    assert len({job.name for job in jobs}) == 12
    moved = study.setting_jobs([1], study.Sizes(), {**study.GRID, "refresh_every": (60,), "beta": (0.1, 0.3)})
    assert [job.name for job in moved][-1] == "every 60 steps, anchor_weight 0.05, beta 0.3"


def test_an_interval_is_student_s_t() -> None:
    assert study.interval([3.0, 4.0]) == ""
    assert study.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == " ± 2.0"  # 1.963

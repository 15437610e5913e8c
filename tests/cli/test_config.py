"""Every setting is described once, and checked the same from Python, flags and the settings file."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import os
import pickle
import re
import subprocess
import sys
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import yaml
from transformers import SchedulerType, TrainingArguments
from trl import DPOConfig, ModelConfig

from d2o_fast import D2OConfig, D2OTrainer
from d2o_fast.anchors.filters import settings_text
from d2o_fast.anchors.fingerprint import expected_fingerprint
from d2o_fast.arguments import parse
from d2o_fast.cli import main
from d2o_fast.config import DEFAULTS, FIELDS, KINDS, RENAMED, allowed, fixed, having, in_use, refuse_idle
from d2o_fast.data.reading import rows_from
from d2o_fast.errors import D2OError
from d2o_fast.training import checkpoint as ckpt
from d2o_fast.training.unchanged import check_unchanged
from tiny import tiny_model, tiny_rows, tiny_tokenizer

RULES = {"help", "min", "above", "max", "below", "needs", "path", "fixed", "fingerprint", "filter", "rounds"} | {
    "form",
    "wanted",
    "shows",
}
NUMBERS = {int, float}
#: other settings that a setting requires
BESIDE: dict[str, dict[str, Any]] = {
    "dataset_split": {"dataset_name": "some/hub"},
    "eval_dataset_name": {"eval_fraction": 0.0},
    "refresh_strategy": {"refresh_every": 1},
    "dataset_config": {"dataset_name": "some/data"},
    "server_model": {"server_url": "http://localhost:1/v1"},
    "server_api_key_env": {"server_url": "http://localhost:1/v1"},
    "server_concurrency": {"server_url": "http://localhost:1/v1"},
    "server_timeout": {"server_url": "http://localhost:1/v1"},
    "min_anchor_score": {"anchor_score": "m:f"},
    "anchor_score": {"min_anchor_score": 0.0},
    **{f"lora_{part}": {"use_peft": True} for part in ("r", "alpha", "dropout", "target_modules")},
    "max_length": {"max_completion_length": 1},
    "num_generations": {"num_draws": None},
    "num_draws": {"num_generations": 1},
    "num_train_epochs": {"max_steps": -1},
}


def kinds_of(name: str) -> tuple[Any, ...]:
    return get_args(KINDS[name]) if get_origin(KINDS[name]) not in (Literal, list, None) else (KINDS[name],)


def choices_of(name: str) -> list[str]:
    return [choice for kind in kinds_of(name) if get_origin(kind) is Literal for choice in get_args(kind)]


def wrong_values(name: str) -> list[Any]:
    """Values that no rule of the setting allows, each of a kind that users give."""
    kinds, rules = set(kinds_of(name)), FIELDS[name].metadata
    wrong: list[Any] = [math.nan, math.inf, -math.inf, 10**23, 10**400, 10**5000, {"a": 1}, [1], ["  "], [None]]
    wrong += [{"x"}, b"x", [["a"]], [[[["a"] * 9] * 9] * 9], 1e39, 1e-300]
    wrong += [] if str in kinds else ["", "1", "1e-5", "none", [], "true"]
    wrong += ["", "  "] if str in kinds and DEFAULTS[name] != "" else []
    wrong += [] if bool in kinds else [True, False]
    wrong += [] if NoneType in kinds or name == "report_to" else [None]
    wrong += [0, 3, 0.5, -1.0] if not NUMBERS & kinds else []
    wrong += [2.5, 2.0] if int in kinds else []
    if "min" in rules:
        wrong += [rules["min"] - 1]
    if "above" in rules:
        wrong += [rules["above"], -0.5]
    if "max" in rules:
        wrong += [rules["max"] + 0.01]
    if "below" in rules:
        wrong += [rules["below"]]
    for choice in choices_of(name):
        wrong += [choice.upper(), choice[:-1], f"{choice} ", f"{choice}s"]
    if str not in kinds and not any(get_origin(kind) is list for kind in kinds):
        wrong += [["a"], ("a",)]
    if name == "drop_anchors":
        wrong = [value for value in wrong if value != []] + [["duplicates"], ["duplicate", "long"]]
    if "path" in rules:
        wrong += ["a\0b", "a\udc80b", "~no_such_user/x", "missing/" + "x" * 300, "/".join(["x" * 99] * 60)]
    if rules.get("path") in ("folder", "file"):
        wrong += [f"{__file__}/x"]
    if rules.get("path") in ("folder", "model"):
        wrong += [__file__]
    if rules.get("path") == "file":
        wrong += [os.path.dirname(__file__)]
    if name == "server_url":
        wrong += [
            "http://[::1",
            "localhost:8000",
            "http://",
            "http://:80",
            "http://x:99999",
            "http://x:port",
            "ftp://x",
        ]
        wrong += ["http://x y", "http://\u00fc/v1\u00fc", f"http://{'x' * 70}.com", "http://x\n"]
    if name == "report_to":
        wrong += ["wandb", "all", ["wandb"], ["tensorboard", "mlflow"]]
    return wrong


def refused(name: str, error: BaseException) -> None:
    text = str(error)
    assert re.search(rf"(^|: |--){name} is ", text), text
    assert "; it must be " in text
    assert "\n" not in text
    for choice in choices_of(name):
        assert repr(choice) in text


@pytest.mark.parametrize("name", FIELDS)
def test_python_refuses_what_no_setting_means(name: str) -> None:
    for value in wrong_values(name):
        with pytest.raises(D2OError) as error:
            D2OConfig(**{**BESIDE.get(name, {}), name: value})
        refused(name, error.value)


def in_yaml(value: Any) -> str:
    if value == 10**5000:
        return f"1{'0' * 5000}"  # more digits than Python writes
    return yaml.safe_dump(value, default_flow_style=True).split("\n...")[0].strip()


@pytest.mark.parametrize("name", FIELDS)
def test_the_file_refuses_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for value in wrong_values(name):
        if isinstance(value, tuple | set | bytes):
            continue  # YAML has no such value
        if isinstance(value, str) and re.search("[\0\udc80]", value):
            continue
        text = json.dumps(value) if isinstance(value, str) else in_yaml(value)
        path.write_text(f"{name}: {text}")
        with pytest.raises(D2OError) as error:
            parse("train", [str(path)])
        refused(name, error.value)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("name", FIELDS)
def test_a_flag_refuses_the_same(name: str) -> None:
    kinds = set(kinds_of(name))
    for value in wrong_values(name):
        text = value if isinstance(value, str) else in_yaml(value)
        if isinstance(value, tuple | set | bytes) or (isinstance(value, str) and str not in kinds):
            continue  # a flag has no such value; 1 in quotes is the number
        if str in kinds and not isinstance(value, str) and not (list[str] in kinds and isinstance(value, list)):
            continue  # a text's flag is used unchanged
        with pytest.raises(D2OError) as error:
            D2OConfig(**{**BESIDE.get(name, {}), **parse("train", [f"--{name}={text}"])[1]})
        refused(name, error.value)


def right_values(name: str) -> list[Any]:
    kinds, rules = set(kinds_of(name)), FIELDS[name].metadata
    right: list[Any] = [DEFAULTS[name], *choices_of(name)]
    right += [True, False] if bool in kinds else []
    form = {"server_url": "http://[::1]:8000/v1", "server_api_key_env": "SOME_TEXT"}
    right += [form.get(name, "some/text")] if str in kinds and name != "report_to" else []
    right += [["a", "b"]] if list[str] in kinds and name != "report_to" else []
    if NUMBERS & kinds:
        low, high = rules.get("min", rules.get("above", 1)), rules.get("max", rules.get("below", 1000))
        right += [low] if "min" in rules and name not in ("max_steps", "min_anchor_score") else []
        right += [high] if "max" in rules else []
        right += [low + 1] if int in kinds and name != "max_steps" else []
        right += [min(low + 0.25, high)] if float in kinds else []
    if name == "drop_anchors":
        right += [["empty"], ["duplicate", "truncated", "empty"]]
    if name == "report_to":
        right += ["tensorboard", ["tensorboard"]]
    return right


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_allowed_is_the_same_everywhere(name: str, tmp_path: Path) -> None:
    for value in right_values(name):
        beside = BESIDE.get(name, {}) | ({"ref_model_neg": None} if name == "refresh_every" else {})
        if name in ("anchor_score", "min_anchor_score") and value is None:
            beside = {}
        expected = getattr(D2OConfig(**{**beside, name: value}), name)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({name: value}))
        from_file = parse("train", [str(tmp_path / "config.yaml")])[1]
        text = "null" if value is None else value if isinstance(value, str) else json.dumps(value)
        if value == "":
            continue  # not set
        from_flag = parse("train", [f"--{name}={text}"])[1]
        for found in (from_file, from_flag):
            again = getattr(D2OConfig(**{**beside, **found}), name)
            assert again == expected
            assert json.dumps(again) == json.dumps(float(expected) if type(again) is float else expected)


def test_numpys_numbers_tuples_and_paths_become_pythons() -> None:
    config = D2OConfig(
        learning_rate=np.float64(2e-5),
        beta=np.float32(0.5),
        max_steps=np.int64(3),
        use_peft=np.bool_(True),
        lora_target_modules=("q", "v"),
        output_dir=Path("a") / "b",  # type: ignore[arg-type]
    )
    found = [config.learning_rate, config.beta, config.max_steps, config.use_peft, config.output_dir]
    assert found == [2e-5, 0.5, 3, True, os.path.join("a", "b")]
    assert [type(value) for value in found] == [float, float, int, bool, str]
    assert config.lora_target_modules == ["q", "v"]
    yaml.safe_dump(dataclasses.asdict(config))
    with pytest.raises(D2OError, match=r"num_generations is np\.float64"):
        D2OConfig(num_generations=np.float64(2.0))  # type: ignore[arg-type]


def test_instances_of_subclasses_become_plain() -> None:
    class Place(StrEnum):
        RUN = "run"

    class Number(IntEnum):
        THREE = 3

    class Rate(float):
        pass

    config = D2OConfig(output_dir=Place.RUN, seed=Number.THREE, beta=Rate(0.5), lr_scheduler_type=SchedulerType.COSINE)
    found = [config.output_dir, config.seed, config.beta, config.lr_scheduler_type]
    assert found == ["run", 3, 0.5, "cosine"]
    assert [type(value) for value in found] == [str, int, float, str]


def test_a_setting_is_checked_whenever_it_is_set() -> None:
    config = D2OConfig()
    for name in FIELDS:
        with pytest.raises(D2OError) as error:
            setattr(config, name, {"a": 1})
        refused(name, error.value)
    assert config == D2OConfig()
    config.drop_anchors.append("long")  # type: ignore[arg-type]
    with pytest.raises(D2OError, match=r"drop_anchors is .'long'.; it must be"):
        config.check()
    config = D2OConfig(use_peft=True, lora_r=8)
    config.use_peft = False
    for check in (config.check, lambda: dataclasses.replace(config), lambda: D2OTrainer(tiny_model(), config, [])):
        with pytest.raises(D2OError, match="lora_r is 8; it must be left out, or use_peft set"):
            check()  # type: ignore[operator]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    config = D2OConfig()
    for wrong in (
        lambda: D2OConfig(learnin_rate=1.0),  # type: ignore[call-arg]
        lambda: dataclasses.replace(config, learnin_rate=1.0),  # type: ignore[call-arg]
        lambda: setattr(config, "learnin_rate", 1.0),
    ):
        with pytest.raises(D2OError, match="no setting 'learnin_rate'; did you mean 'learning_rate'") as error:
            wrong()
        assert isinstance(error.value, TypeError)
    with pytest.raises(D2OError, match=r"settings by name, e\.g\. D2OConfig\(output_dir='runs/x'\)"):
        D2OConfig("runs/x")  # type: ignore[misc]
    assert "learning_rate" in inspect.signature(D2OConfig).parameters


def test_copies_are_equal_and_apart() -> None:
    config = D2OConfig(drop_anchors=["empty"], learning_rate=1e-5)
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config
        again.learning_rate = 1.0
        assert config.learning_rate == 1e-5
        with pytest.raises(D2OError, match="learning_rate is 'x'"):
            again.learning_rate = "x"  # type: ignore[assignment]


@pytest.mark.parametrize("name", having("path"))
def test_home_is_found_for_every_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text(f"{name}: ~/a/b\n")
    wanted = str(tmp_path / "a" / "b")
    assert parse("train", [str(tmp_path / "config.yaml")])[1] == {name: wanted}
    assert parse("train", ["~/config.yaml"])[1] == {name: wanted}
    assert parse("train", [f"--{name}=~/a/b"])[1] == {name: wanted}
    beside = BESIDE.get(name, {})
    assert getattr(D2OConfig(**beside, **{name: "~/a/b"}), name) == wanted
    assert getattr(D2OConfig(**beside, **{name: Path("~/a/b")}), name) == wanted
    if list[str] in kinds_of(name):
        assert getattr(D2OConfig(**beside, **{name: ["~/a/b", "~root/x", "c~"]}), name)[::2] == [wanted, "c~"]


def test_every_setting_that_names_a_place_is_a_path() -> None:
    places = {name for name in FIELDS if name.endswith(("_dir", "_path", "_checkpoint"))}
    named = {name for name in FIELDS if re.search("folder|file", FIELDS[name].metadata["help"])}
    assert set(having("path")) >= places | (named - {"report_to"})


# --- Settings beside other arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"eval_steps": 5}, {}, "eval_steps is 5; it must be left out where there are no held-out data"),
        ({"judge": "a:b"}, {}, "judge is 'a:b'; it must be left out where there are no held-out data"),
        ({"eval_fraction": 0.5}, {}, "eval_fraction is 0.5; it must be left out or its rows given as eval_dataset"),
        ({"eval_dataset_name": "a"}, {}, "eval_dataset_name is 'a'; it must be left out or its rows"),
        ({"judge_max_prompts": 2}, {"held_out": True}, "judge_max_prompts is 2; it must be left out where judge is"),
        ({"judge_num_generations": 2}, {"held_out": True}, "judge_num_generations is 2; it must be left out where"),
        ({"use_peft": True, "lora_r": 8}, {"peft_config": True}, "lora_r is 8; it must be left out where peft_config"),
        ({"anchors_dir": "a"}, {"stores": ["b/a/train"]}, "anchors_dir is 'a'; it must be left out where all data"),
    ],
)
def test_a_setting_that_would_decide_nothing_is_refused(settings: Any, arguments: Any, message: str) -> None:
    config = D2OConfig(**settings)
    with pytest.raises(D2OError, match=message):
        refuse_idle(config, **{"held_out": False, **arguments})


def test_a_switched_off_part_of_a_file_takes_its_settings_along(caplog: pytest.LogCaptureFixture) -> None:
    file = {
        "use_peft": True,
        "lora_r": 4,
        "refresh_every": 3,
        "refresh_strategy": "epoch",
        "server_url": "http://localhost:8000/v1",
        "server_model": "m",
        "anchor_score": "a:b",
        "min_anchor_score": 1.0,
        "eval_dataset_name": "a.jsonl",
        "eval_steps": 5,
        "judge": "a:b",
        "judge_max_prompts": 3,
        "per_device_eval_batch_size": 8,
    }
    off = {"use_peft": False, "refresh_every": 0, "server_url": None, "anchor_score": None, "eval_dataset_name": None}
    with caplog.at_level("INFO", "d2o_fast"):
        found = in_use(file | off)
    assert found == off | {"per_device_eval_batch_size": 8}
    assert "lora_r is not used: use_peft is False" in caplog.text
    refuse_idle(D2OConfig(**found), held_out=False)
    kept = {
        "use_peft": True,
        "lora_r": 4,
        "judge": "a:b",
        "judge_max_prompts": 3,
        "eval_fraction": 0.5,
        "eval_steps": 5,
    }
    assert in_use(kept) == kept
    assert in_use(kept | {"eval_fraction": 0.0, "eval_dataset_name": "a"}).keys() > {"judge", "eval_steps"}
    assert "judge_max_prompts" not in in_use(kept | {"judge": None})
    assert in_use({"lora_r": 4, "eval_steps": 5}) == {"lora_r": 4, "eval_steps": 5}  # forgotten: D2OConfig says so


def test_a_store_may_come_from_the_folder_that_is_set() -> None:
    refuse_idle(D2OConfig(anchors_dir="a"), held_out=True, stores=["b/train", "a/train"])
    refuse_idle(D2OConfig(anchors_dir="a"), held_out=True, stores=["a"])


def test_a_template_beside_a_tokenizer_is_used_on_a_copy(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    template = tokenizer.chat_template
    (tmp_path / "own.jinja").write_text(f"{template}{{# own #}}")
    config = D2OConfig(chat_template_path=str(tmp_path / "own.jinja"), output_dir=str(tmp_path))
    trainer = D2OTrainer(tiny_model(), config, tiny_rows(2), processing_class=tokenizer)
    assert trainer.tokenizer.chat_template == f"{template}{{# own #}}"
    assert tokenizer.chat_template == template
    for content, message in ((b" \n", "is empty"), (b"\xff", "cannot be read as UTF-8")):
        (tmp_path / "own.jinja").write_bytes(content)
        with pytest.raises(D2OError, match=f"chat_template_path '.*own.jinja' {message}"):
            D2OTrainer(tiny_model(), config, tiny_rows(2), processing_class=tokenizer)


def test_attention_and_name_beside_a_model(tmp_path: Path) -> None:
    tokenizer, rows = tiny_tokenizer(), tiny_rows(2)
    config = D2OConfig(attn_implementation="eager", model_name_or_path="some/name", output_dir=str(tmp_path))
    model = tiny_model()
    assert model.config._attn_implementation != "eager"
    trainer = D2OTrainer(model, config, rows, processing_class=tokenizer)
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.args.model_name_or_path == "some/name"
    with pytest.raises(D2OError, match="attn_implementation 'quick' cannot be set"):
        D2OTrainer(model, D2OConfig(attn_implementation="quick"), rows, processing_class=tokenizer)
    with pytest.raises(D2OError, match="model_name_or_path is 'some/name'; it must be left out, or the model's name"):
        D2OTrainer("other/name", config, rows, processing_class=tokenizer)


# --- Several settings together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train_epochs": 0}, "num_train_epochs is 0; it must be a number > 0, unless max_steps is set"),
        ({"num_train_epochs": -1.0}, "num_train_epochs is -1.0"),
        ({"max_steps": 0}, "max_steps is 0; it must be an integer >= 1, or -1"),
        ({"warmup_steps": 2.5}, "warmup_steps is 2.5; it must be a whole number of steps"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_ratio is 0.1; it must be left out where warmup_steps"),
        ({"lora_r": 8}, "lora_r is 8; it must be left out, or use_peft set"),
        (
            {"lora_target_modules": ["q_proj"]},
            "lora_target_modules is .'q_proj'.; it must be left out, or use_peft set",
        ),
        ({"server_model": "m"}, "server_model is 'm'; it must be left out, or server_url set"),
        ({"min_anchor_score": 1.0}, "min_anchor_score is 1.0; it must be left out, or anchor_score set"),
        ({"anchor_score": "a:b"}, "anchor_score is 'a:b'; it must be beside min_anchor_score, or num_draws above"),
        ({"num_draws": 3}, "num_draws is 3; it must be at least num_generations"),
        ({"max_length": 256}, "max_completion_length is 256; it must be less than max_length"),
        ({"server_timeout": 1.0}, "server_timeout is 1.0; it must be left out, or server_url set"),
        ({"refresh_strategy": "epoch"}, "refresh_strategy is 'epoch'; it must be left out, or refresh_every set"),
        ({"dataset_split": "test"}, "dataset_split is 'test'; it must be left out, or dataset_name set"),
        (
            {"eval_dataset_name": "a", "eval_fraction": 0.1},
            "eval_fraction is 0.1; it must be 0 where eval_dataset_name",
        ),
        ({"alpha": 0, "beta": 0.0}, "alpha is 0; it must be above 0 where beta is 0"),
        ({"refresh_every": 1, "server_url": "http://x"}, "refresh_every is 1; it must be 0 while server_url"),
        ({"refresh_every": 1, "ref_model_neg": "a"}, "refresh_every is 1; it must be 0 while ref_model_neg"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(D2OError, match=message):
        D2OConfig(**settings)


def test_what_the_rules_for_two_leave_allowed() -> None:
    D2OConfig(num_train_epochs=-1, max_steps=5)
    D2OConfig(use_peft=True, lora_r=8)
    D2OConfig(warmup_steps=0.2, warmup_ratio=0.2)
    D2OConfig(dataset_split="test", dataset_name=["a.jsonl", "some/hub"])


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 3),
        ({"warmup_ratio": 0.1}, 3),
        ({"warmup_steps": 0.1}, 3),
        ({"warmup_steps": 0}, 0),
        ({"warmup_ratio": 0}, 0),
        ({"warmup_steps": 1}, 1),
        ({"warmup_ratio": 1.0}, 21),
        ({"warmup_steps": 7.0}, 7),
        ({"warmup_steps": 0.5}, 11),
    ],
)
def test_the_warm_up_is_a_share_or_a_number_of_steps(settings: dict[str, Any], steps: int, tmp_path: Path) -> None:
    assert D2OConfig(**settings).warmup(21) == steps
    if "warmup_steps" in settings:  # as transformers counts
        theirs = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)
        assert theirs.get_warmup_steps(21) == steps


@pytest.mark.parametrize(
    ("given", "kept"), [("none", []), (["none"], []), (None, []), ("tensorboard", ["tensorboard"])]
)
def test_report_to_is_read_as_transformers_reads_it(given: Any, kept: list[str]) -> None:
    assert D2OConfig(report_to=given).report_to == kept


# --- The file and the flags ------------------------------------------------------------------------------------------


def test_a_key_that_is_there_twice_is_an_error_with_its_lines(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("alpha: 0.1\nbeta: 0.2\n\nalpha: 0.3\n")
    assert main(["train", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: 'alpha' is set twice, in lines 1 and 4\n"


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-05", "0.00001", ".1e-4", "1e-05"])
def test_exponents_are_numbers(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"learning_rate: {text}\n")
    for arguments in ([str(tmp_path / "config.yaml")], [f"--learning_rate={text}"], ["--learning_rate", text]):
        assert parse("train", arguments)[1] == {"learning_rate": 1e-5}


def test_texts_that_look_like_numbers_stay_texts_in_a_flag() -> None:
    flags = [
        "--output_dir",
        "5",
        "--ref_model_neg=1e5",
        "--dataset_name",
        "[ab].jsonl",
        "--eval_dataset_name",
        "[a, b]",
    ]
    assert parse("train", flags)[1] == {
        "output_dir": "5",
        "ref_model_neg": "1e5",
        "dataset_name": "[ab].jsonl",
        "eval_dataset_name": ["a", "b"],
    }


@pytest.mark.parametrize("name", RENAMED)
def test_a_name_of_older_versions_is_answered_with_the_new_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"{name}: true\n")
    assert name not in FIELDS
    for arguments in ([str(tmp_path / "config.yaml")], [f"--{name}", "true"]):
        with pytest.raises(D2OError, match=f"{name}.*of older versions; {re.escape(RENAMED[name])}"):
            parse("train", arguments)


LINES = {
    "seed: 010": "seed is '010'",  # 8 in YAML 1.1
    "seed: 0x10": "seed is '0x10'",
    "seed: 1:30": "seed is '1:30'",  # 90 in YAML 1.1
    "seed: 2024-01-01": "seed is '2024-01-01'",
    "seed: yes": "seed is True",
    "seed: '5'": "seed is '5'",
    "seed:": "seed is None",
    "seed: !!int ''": "seed is int",
    "use_peft: !!bool maybe": "use_peft is bool maybe",
    "output_dir: !!timestamp x": "output_dir is timestamp x",
    "judge: !!python/name:os.system": "judge is python/name:os.system",
    "judge: !!python/object/apply:os.getcwd []": "judge is []",
    "drop_anchors: [null]": "drop_anchors is [None]",
    "drop_anchors: [[empty]]": "drop_anchors is [a mapping or a list]",
    "drop_anchors: [&a [x], *a, *a]": "drop_anchors is [a mapping or a list, a mapping or a list, a mapping or a list]",
    "drop_anchors: &a [*a]": "drop_anchors is [a mapping or a list]",
    "<<: {alpha: 0.5}": "unknown setting '<<'",
    "training:\n  alpha: 1": "unknown setting 'training'",
    "? [a]\n: 1": "line 1: the name of a setting must be a word",
    "5: 6": "unknown setting '5'",
    "alpha: 1\n---\nbeta: 2": "is not YAML: expected a single document",
    "seed: *a": "is not YAML: found undefined alias",
    "alpha:1": "must hold lines of the form 'name: value'",
    "seed: " + "[" * 100000: "nested too deep",
    "#" * (1 << 20) + "\nseed: 1": "more than 1 MiB are no settings file",
}


@pytest.mark.parametrize(("text", "message"), LINES.items(), ids=[text[:20] for text in LINES])
def test_a_file_with_what_no_setting_means_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text + "\n")
    with pytest.raises(D2OError) as error:
        parse("train", [str(path)])
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_aliases_cannot_multiply(tmp_path: Path) -> None:
    lists = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    merged = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 40)]
    for first, rest in (("a0: &a0 [x]", lists), ("a0: &a0 {x: 1}", merged)):
        (tmp_path / "config.yaml").write_text("\n".join([first, *rest]))
        with pytest.raises(D2OError, match="unknown setting 'a0'"):
            parse("train", [str(tmp_path / "config.yaml")])


def test_a_byte_order_mark_and_dates_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xef\xbb\xbfoutput_dir: 2024-01-01\r\nseed: 1_000\r\njudge: !!str 5\r\n")
    assert parse("train", [str(tmp_path / "config.yaml")])[1] == {
        "output_dir": "2024-01-01",
        "seed": 1000,
        "judge": "5",
    }
    (tmp_path / "config.yaml").write_bytes("seed: 1".encode("utf-16"))
    with pytest.raises(D2OError, match=r"is not UTF-8 .byte 0.; save it as UTF-8"):
        parse("train", [str(tmp_path / "config.yaml")])


@pytest.mark.parametrize("given", [["--seed", "1", "--seed=2"], ["a.yaml", "--config", "b.yaml"]])
def test_a_flag_that_is_given_twice_is_refused(given: list[str]) -> None:
    with pytest.raises(D2OError, match=r"the flag --(seed|config) is given twice"):
        parse("train", given)


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@[::1", "http://x:hunter2@host:port", "http://[x?key=hunter2", "ftp://h/?hunter2"]
)
def test_an_address_with_a_password_is_not_shown(url: str) -> None:
    with pytest.raises(D2OError, match="server_url") as error:
        D2OConfig(server_url=url)
    assert "hunter2" not in str(error.value)


# --- Described once --------------------------------------------------------------------------------------------------


def test_every_setting_has_help_and_known_rules() -> None:
    for name, field in FIELDS.items():
        assert field.metadata.get("help", "").strip(), f"{name} has no help"
        assert set(field.metadata) <= RULES, f"{name} has a rule that nothing reads"
        assert allowed(name)
        if NUMBERS & set(kinds_of(name)) and name not in ("num_train_epochs", "min_anchor_score"):
            assert {"min", "above"} & set(field.metadata), f"{name} has no lower bound"
    for name, needed in having("needs").items():
        assert needed in FIELDS, name


def test_the_lists_come_from_the_fields() -> None:
    settings = dataclasses.asdict(D2OConfig(use_peft=True, refresh_every=1))
    assert set(fixed(settings)) == set(having("fixed")) - {"warmup_ratio"}
    text = settings_text(D2OConfig(num_draws=20, drop_anchors=["empty", "duplicate"], max_anchor_overlap=0.5))
    assert text == "num_draws 20; drop_anchors empty, duplicate; max_anchor_overlap 0.5"
    assert settings_text(D2OConfig()) == ""
    everything = {"anchor_score": "a:b", "min_anchor_score": 0.0, "num_draws": 20, "max_anchor_overlap": 0.0}
    text = settings_text(D2OConfig(drop_anchors=["empty"], **everything))
    assert re.findall(r"(\w+) [^;]+(?:; |$)", text) == list(having("filter"))


def test_settings_need_nothing_slow() -> None:
    code = "import sys, d2o_fast.config; print({'transformers', 'jsonargparse'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "set()\n"


# --- Checkpoints of older versions -----------------------------------------------------------------------------------

OLD = {
    **{"alpha": 0.1, "beta": 0.1, "anchor_weight": 0.0, "dtype": "float32", "seed": 42, "learning_rate": 1e-06},
    **{"lr_scheduler_type": "linear", "warmup_ratio": 0.1, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999},
    **{"adam_epsilon": 1e-08, "max_grad_norm": 1.0, "num_train_epochs": 1.0, "max_steps": -1, "refresh_every": 0},
    **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "refresh_strategy": "steps"},
    **{"use_peft": False, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": None},
    **{"drop_duplicate_anchors": True, "drop_empty_anchors": False, "drop_truncated_anchors": False},
    **{"sampling_engine": "generate", "ref_model": None, "truncation_mode": "keep_end", "report_to": []},
}


@pytest.mark.parametrize(
    ("old", "now", "changed"),
    [
        ({}, {}, None),
        ({}, {"warmup_steps": 0.1}, None),
        ({}, {"warmup_ratio": 0.1}, None),
        ({"warmup_ratio": 0.0}, {"warmup_steps": 0}, None),
        ({"warmup_ratio": 0.0}, {}, "warmup_steps: 0.0 in the checkpoint, now 0.1"),
        ({"warmup_ratio": 1.0}, {"warmup_steps": 1}, "warmup_steps: 'all' in the checkpoint, now 1"),
        ({"max_steps": 0}, {}, None),
        ({"lora_r": 8}, {}, None),  # no adapter: it had no effect
        ({"use_peft": True, "lora_r": 8}, {"use_peft": True}, "lora_r: 8 in the checkpoint, now 16"),
        ({"use_peft": True}, {}, "use_peft: True in the checkpoint, now False"),
        ({}, {"seed": 1}, "seed: 42 in the checkpoint, now 1"),
    ],
    ids=str,
)
def test_a_checkpoint_of_an_older_version_is_continued(old: Any, now: Any, changed: str | None) -> None:
    state = ckpt.TrainerState(config={**OLD, **old})
    if changed is None:
        check_unchanged(Path("checkpoint-2"), state, D2OConfig(**now))
    else:
        with pytest.raises(D2OError, match=changed):
            check_unchanged(Path("checkpoint-2"), state, D2OConfig(**now))


def test_a_fingerprint_has_the_fields_that_older_stores_have() -> None:
    config = D2OConfig(drop_anchors=["truncated"], max_anchor_overlap=0.5, num_draws=20)
    found = expected_fingerprint(tiny_model(), tiny_tokenizer(), rows_from(tiny_rows(2)), config)
    contents = ("format", "rows", "tokenizer", "chat_template", "stop_token_ids")
    models = [name for name in found if name.startswith("ref_") or name in ("weights", "model_config", "adapter")]
    assert {name: value for name, value in found.items() if name not in (*contents, *models)} == {
        **{"sampler": "generate", "max_length": 1024, "max_completion_length": 256},
        **{
            "truncation_mode": "keep_start",
            "dtype": "float32",
            "num_generations": 11,
            "temperature": 1.0,
            "top_p": 1.0,
        },
        **{"sampling_seed": 0, "sampling_batch_size": 16, "sampling_instruction": None},
        **{"drop_duplicate_anchors": False, "drop_empty_anchors": False, "drop_truncated_anchors": True},
        **{"max_anchor_overlap": 0.5, "min_anchor_score": None, "num_draws": 20, "anchor_score": None},
    }


# --- TRL and transformers --------------------------------------------------------------------------------------------

#: (setting, "type" or "default"): why ours differs from theirs
DIFFERENCES = {
    ("model_name_or_path", "type"): "an empty text says that there is none",
    ("model_name_or_path", "default"): "an empty text says that there is none",
    ("max_length", "type"): "every store is made under a length",
    ("output_dir", "type"): "there is always one",
    ("output_dir", "default"): "d2o train works without naming one",
    ("warmup_steps", "default"): "a method that moves away from its start is warmed up",
    ("num_train_epochs", "default"): "one pass; the margin grows without bound in more",
    ("per_device_train_batch_size", "default"): "each prompt comes with its K + 1 responses",
    ("per_device_eval_batch_size", "default"): "each prompt comes with its K + 1 responses",
    ("gradient_checkpointing", "default"): "shared prompts leave room; off is faster",
    ("eval_steps", "type"): "0 in place of eval_strategy, and no share of the run",
    ("eval_steps", "default"): "0: at the end only, as there is no eval_strategy",
    ("logging_steps", "type"): "no share of the run",
    ("logging_steps", "default"): "a line for every step",
    ("save_steps", "type"): "no share of the run",
    ("report_to", "type"): "nothing at all is 'none'",
    ("lora_dropout", "default"): "the policy and its reference agree at the first step",
    ("lora_target_modules", "type"): "a text too, as peft takes it ('all-linear')",
    ("dtype", "type"): "there is always one",
}


def theirs() -> dict[str, tuple[Any, Any]]:
    """Type and default of each of their fields that is also a setting of ours; TRL's if both have it."""
    found: dict[str, tuple[Any, Any]] = {}
    for cls in (TrainingArguments, ModelConfig, DPOConfig):
        kinds = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name in FIELDS:
                default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
                found[field.name] = kinds[field.name], default
    return found


def plain(kind: Any) -> set[Any]:
    """The types that a value may have; a choice among texts (an Enum in their classes) is a text."""
    parts = get_args(kind) if get_origin(kind) not in (Literal, list, None) else (kind,)
    texts = {
        part for part in parts if get_origin(part) is Literal or (isinstance(part, type) and issubclass(part, Enum))
    }
    return {part for part in parts if part not in texts} | ({str} if texts else set())


def test_settings_follow_trl() -> None:
    found = set()
    shared = theirs()
    assert len(shared) > 25
    for name, (kind, default) in shared.items():
        if plain(KINDS[name]) != plain(kind):
            found.add((name, "type"))
        ours = getattr(D2OConfig(), name)
        if ours != default and not (name == "report_to" and default == "none" and ours == []):
            found.add((name, "default"))
    assert found - set(DIFFERENCES) == set(), "a difference without a reason"
    assert set(DIFFERENCES) - found == set(), "a difference that is no more"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["learning_rate", "min_anchor_score"])
def test_a_number_without_an_end_is_told_so(name: str, value: float) -> None:
    with pytest.raises(D2OError, match=rf"^{name} is -?(inf|nan); it must be .*finite"):
        D2OConfig(**{name: value})

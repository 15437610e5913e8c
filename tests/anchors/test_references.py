"""The reference models: the right one scores each response, and none is silently confused with another."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from d2o_fast import D2OConfig, D2OTrainer, ResponseLayout, d2o_loss
from d2o_fast.anchors import fingerprint as fingerprint_module
from d2o_fast.anchors import references as references_module
from d2o_fast.anchors.build import open_store
from d2o_fast.anchors.fingerprint import expected_fingerprint
from d2o_fast.anchors.inspection import inspect
from d2o_fast.anchors.references import References
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.cli import main
from d2o_fast.data.reading import rows_from
from d2o_fast.data.row import Example
from d2o_fast.errors import D2OError, FingerprintError
from d2o_fast.model.adapters import is_fresh
from d2o_fast.model.identity import identity_of
from d2o_fast.model.loading import load_model
from d2o_fast.training.metrics import read_log
from stops import Stop, stop_at
from stores import CHAT_ROW, CONFIG, build, contents
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer

ROWS = [*tiny_rows(5), {"prompt": "how", "rejected": " to", "anchors": [" open"]}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of the same tokenizer, and a trained adapter on the first, without a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("initial", "neg", "pos")):
        save_tiny(folder / name, seed=seed)
    save_adapter(folder / "adapter", folder / "initial")
    return folder


def save_adapter(folder: Path, base: Path, seed: int = 0) -> str:
    trained(adapted(AutoModelForCausalLM.from_pretrained(base)), seed).save_pretrained(folder)
    return str(folder)


def adapted(model: Any, config: Any = None, **settings: Any) -> Any:
    """The model with a new adapter (a LoRA by default), whose values are the same in every call."""
    config = config or LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, config)


def trained(model: Any, seed: int = 0) -> Any:
    """The model with other values in every trained parameter, as after some steps."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def fp64_logps(model: Any, example: Example) -> list[float]:
    """Responses' log-probabilities from transformers' own logits, one sequence at a time."""
    model = model.double().eval()
    sums = []
    for response in example.responses():
        with torch.no_grad():
            logps = model(torch.tensor([example.prompt_ids + response])).logits[0].log_softmax(-1)
        sums.append(sum(float(logps[len(example.prompt_ids) + t - 1, token]) for t, token in enumerate(response)))
    return sums


def config(folder: Path, **settings: Any) -> D2OConfig:
    return replace(CONFIG, output_dir=str(folder), learning_rate=1e-2, warmup_ratio=0.0, max_steps=3, **settings)


# --- The model of each score -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("settings", "neg", "pos"),
    [
        ({}, "initial", "initial"),
        ({"ref_model_neg": "neg", "ref_model_pos": "pos"}, "neg", "pos"),
        ({"ref_model_neg": "neg"}, "neg", "initial"),
        ({"ref_model_pos": "adapter"}, "initial", "adapter"),
        ({"ref_model_neg": "pos", "ref_model_pos": "pos"}, "pos", "pos"),
        ({"ref_model_neg": "initial", "ref_model_pos": "neg"}, "initial", "neg"),
    ],
    ids=str,
)
def test_scores_are_those_of_the_models_named(
    models: Path, tmp_path: Path, settings: dict[str, str], neg: str, pos: str, dtype: Any
) -> None:
    """Scores equal those of logits in fp64, and the initial model draws the anchors, whichever model scores."""
    names = {setting: str(models / name) for setting, name in settings.items()}
    store = build(tmp_path / "s", ROWS, config=replace(CONFIG, dtype=dtype, **names))
    plain = build(tmp_path / "plain", ROWS, config=replace(CONFIG, dtype=dtype))
    assert [e.anchor_ids for e in store.examples()] == [e.anchor_ids for e in plain.examples()]
    loaded = {name: load_model(D2OConfig(), str(models / name)) for name in (neg, pos)}
    off = []
    for example in store.examples():
        expected = [fp64_logps(loaded[pos], example)[0], *fp64_logps(loaded[neg], example)[1:]]
        assert example.ref_logps == pytest.approx(expected, rel=3e-3 if dtype == "bfloat16" else 1e-6, abs=1e-5)
        off += [abs(a - b) for a, b in zip(example.ref_logps, expected, strict=True)]
    if dtype == "bfloat16":
        assert max(off) > 1e-3, "this is what fp32 would give"


def test_each_response_is_scored_once_by_its_own_model(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, int]] = []
    original = references_module.reference_logps

    def watched(decoder: Any, model: Any, examples: Any, *args: Any) -> Any:
        calls.append((model.lm_head.weight[0, 0].item(), sum(len(e.responses()) for e in examples)))
        return original(decoder, model, examples, *args)

    monkeypatch.setattr(references_module, "reference_logps", watched)
    initial, neg, pos = (tiny_model(seed).lm_head.weight[0, 0].item() for seed in range(3))
    anchors = [4 * 3, 3 + 1]  # of the two shards: the last row has one given anchor
    for settings, expected in (
        ({}, [(initial, 4 + anchors[0]), (initial, 2 + anchors[1])]),
        ({"ref_model_neg": "neg", "ref_model_pos": "neg"}, [(neg, 4 + anchors[0]), (neg, 2 + anchors[1])]),
        (
            {"ref_model_neg": "initial", "ref_model_pos": "initial"},
            [(initial, 4 + anchors[0]), (initial, 2 + anchors[1])],
        ),
        (
            {"ref_model_neg": "neg", "ref_model_pos": "pos"},
            [(pos, 4), (neg, anchors[0]), (pos, 2), (neg, anchors[1])],
        ),
    ):
        calls.clear()
        names = {setting: str(models / name) for setting, name in settings.items()}
        build(tmp_path / str(settings), ROWS, config=replace(CONFIG, **names))
        assert calls == expected


def test_the_loss_at_the_first_step_is_the_specification(models: Path, tmp_path: Path) -> None:
    args = config(tmp_path, ref_model_neg=str(models / "neg"), ref_model_pos=str(models / "pos"))
    run = D2OTrainer(str(models / "initial"), replace(args, per_device_train_batch_size=10), tiny_rows(10))
    run.train()
    examples = run.examples["train"]
    policy, neg, pos = (tiny_model(seed) for seed in range(3))
    logps = torch.tensor([logp for example in examples for logp in fp64_logps(policy, example)])
    refs = [[fp64_logps(pos, example)[0], *fp64_logps(neg, example)[1:]] for example in examples]
    layout = ResponseLayout.from_lengths([[1] * 4] * 10)
    expected = d2o_loss(logps, torch.tensor(refs).flatten(), layout).loss.item()
    first = read_log(tmp_path / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected - math.log(2)) > 1e-3


# --- The initial model as its own reference --------------------------------------------------------------------------


IA3 = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda model: model,
    "fresh LoRA": adapted,
    "trained LoRA": lambda model: trained(adapted(model)),
    "DoRA": lambda model: adapted(model, use_dora=True),
    "PiSSA": lambda model: adapted(model, init_lora_weights="pissa"),
    "trained IA3": lambda model: trained(adapted(model, IA3Config(task_type="CAUSAL_LM", **IA3))),
    "trained modules_to_save": lambda model: trained(adapted(model, modules_to_save=["up_proj"])),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_policy_and_reference_begin_as_one_and_part(tmp_path: Path, kind: str) -> None:
    """The first loss is ln 2 with a gradient; later losses differ, and the scores stay."""
    run = D2OTrainer(ADAPTERS[kind](tiny_model()), config(tmp_path), tiny_rows(6), processing_class=tiny_tokenizer())
    initial = ADAPTERS[kind](tiny_model())
    run.train()
    first, *_, last = read_log(tmp_path / "metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert first["grad_norm"] > 1e-4
    assert abs(last["loss"] - math.log(2)) > 1e-4
    for example in run.examples["train"]:
        expected = torch.tensor(fp64_logps(initial, example))
        torch.testing.assert_close(torch.tensor(example.ref_logps), expected, rtol=1e-6, atol=2e-5)
    moved = [fp64_logps(run.model, example)[0] - example.ref_logps[0] for example in run.examples["train"]]
    assert max(map(abs, moved)) > 1e-3
    assert AnchorStore.open(tmp_path / "anchors" / "train").examples() == run.examples["train"]


def test_what_is_fresh() -> None:
    expected = {"none": True, "fresh LoRA": True}
    assert {kind: is_fresh(make(tiny_model())) for kind, make in ADAPTERS.items()} == {
        kind: expected.get(kind, False) for kind in ADAPTERS
    }
    model = adapted(tiny_model(), target_modules=["q_proj", "embed_tokens"], modules_to_save=["up_proj"])
    assert is_fresh(model)
    for part in ("lora_B", "lora_embedding_A", "modules_to_save"):  # of embeddings, B is drawn and A is zero
        parameter = next(parameter for name, parameter in model.named_parameters() if part in name)
        with torch.no_grad():
            kept = parameter.clone()
            parameter.view(-1)[3] += 1
            assert not is_fresh(model), part
            parameter.copy_(kept)
        assert is_fresh(model)


# --- Stores that must be refused -------------------------------------------------------------------------------------

State = dict[str, Any]  # model, tokenizer, rows, config


def with_config(**settings: Any) -> Callable[[State, Path], State]:
    return lambda state, folder: {**state, "config": replace(state["config"], **settings)}


def with_reference(setting: str, save: Callable[[Path], Any]) -> Callable[[State, Path], State]:
    def change(state: State, folder: Path) -> State:
        save(folder / "other")
        return {**state, "config": replace(state["config"], **{setting: str(folder / "other")})}

    return change


def save_with_theta(seed: int) -> Callable[[Path], Any]:
    rope = {"rope_type": "default", "rope_theta": 9e3}
    return lambda folder: tiny_model(seed, rope_parameters=rope).save_pretrained(folder)


def save_with_adapter(seed: int) -> Callable[[Path], Any]:
    def save(folder: Path) -> None:
        save_tiny(folder.with_name("base"), seed=seed)
        save_adapter(folder, folder.with_name("base"))

    return save


def ends_elsewhere(state: State, folder: Path) -> State:
    model = tiny_model()
    model.generation_config.eos_token_id = [2, 9]
    return {**state, "model": model}


def with_format(state: State, folder: Path) -> State:
    fingerprint_module.FORMAT += 1
    return state


def with_template(state: State, folder: Path) -> State:
    tokenizer = tiny_tokenizer(True)
    tokenizer.chat_template += "{# the same text #}"
    return {**state, "tokenizer": tokenizer}


def length_score(prompt: str, response: str) -> float:
    return len(response)


def even_score(prompt: str, response: str) -> float:
    return len(response) % 2


#: one change for each field of the fingerprint; the refusal must name that field and no other
CHANGES: dict[str, Callable[[State, Path], State]] = {
    "format": with_format,
    "weights": lambda state, folder: {**state, "model": tiny_model(seed=3)},
    "model_config": lambda state, folder: {
        **state,
        "model": tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 9e3}),
    },
    "adapter": lambda state, folder: {**state, "model": trained(adapted(tiny_model()))},
    "ref_neg_weights": with_reference("ref_model_neg", lambda folder: tiny_model(seed=3).save_pretrained(folder)),
    "ref_neg_config": with_reference("ref_model_neg", save_with_theta(1)),
    "ref_neg_adapter": with_reference("ref_model_neg", save_with_adapter(1)),
    "ref_pos_weights": with_reference("ref_model_pos", lambda folder: tiny_model(seed=3).save_pretrained(folder)),
    "ref_pos_config": with_reference("ref_model_pos", save_with_theta(2)),
    "ref_pos_adapter": with_reference("ref_model_pos", save_with_adapter(2)),
    "rows": lambda state, folder: {**state, "rows": state["rows"][::-1]},
    "tokenizer": lambda state, folder: {**state, "tokenizer": tiny_tokenizer(bos=True)},
    "chat_template": with_template,
    "stop_token_ids": ends_elsewhere,
    "sampler": with_config(server_url="http://localhost:1/v1"),
    "max_length": with_config(max_length=65),
    "max_completion_length": with_config(max_completion_length=13),
    "truncation_mode": with_config(truncation_mode="keep_end"),
    "dtype": with_config(dtype="bfloat16"),
    "num_generations": with_config(num_generations=4),
    "temperature": with_config(temperature=0.9),
    "top_p": with_config(top_p=0.9),
    "sampling_seed": with_config(sampling_seed=6),
    "sampling_batch_size": with_config(sampling_batch_size=5),
    "sampling_instruction": with_config(sampling_instruction="Kindly: {prompt}"),
    "drop_duplicate_anchors": with_config(drop_anchors=["duplicate"]),
    "drop_empty_anchors": with_config(drop_anchors=["empty"]),
    "drop_truncated_anchors": with_config(drop_anchors=["truncated"]),
    "max_anchor_overlap": with_config(max_anchor_overlap=0.5),
    "num_draws": with_config(num_draws=5),
    "anchor_score": with_config(anchor_score=f"{__name__}:even_score"),
    "min_anchor_score": with_config(min_anchor_score=0.5),
}


def state_of(models: Path, folder: Path, chat: bool) -> State:
    settings = {"ref_model_neg": str(models / "neg"), "ref_model_pos": str(models / "pos")}
    settings |= {"anchor_score": f"{__name__}:length_score", "min_anchor_score": 0.0}
    rows = [CHAT_ROW] if chat else tiny_rows(5)
    return {
        "model": tiny_model(chat=chat),
        "tokenizer": tiny_tokenizer(chat),
        "rows": rows_from(rows, "memory"),
        "config": replace(CONFIG, anchors_dir=str(folder), **({} if chat else settings)),
    }


def opened(state: State) -> AnchorStore:
    return open_store(state["model"], state["tokenizer"], state["rows"], state["config"], "train")


def test_every_field_has_a_case(models: Path, tmp_path: Path) -> None:
    assert set(expected_fingerprint(**state_of(models, tmp_path, chat=False))) == set(CHANGES)


@pytest.mark.slow
@pytest.mark.parametrize("field", CHANGES)
def test_a_change_is_refused_by_name(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.setattr(fingerprint_module, "FORMAT", fingerprint_module.FORMAT)
    state = state_of(models, tmp_path / "anchors", chat=field == "chat_template")
    opened(state)
    assert opened(state).complete
    before = contents(tmp_path / "anchors" / "train")
    changed = CHANGES[field](state, tmp_path)
    for may_build in (True, False):  # a resumed run may not
        with pytest.raises(FingerprintError, match=rf"\n  {field}: stored .*, now ") as caught:
            open_store(*(changed[part] for part in ("model", "tokenizer", "rows", "config")), "train", may_build)
        assert set(caught.value.differences) == {field}
    assert contents(tmp_path / "anchors" / "train") == before


def test_small_changes_count(models: Path, tmp_path: Path) -> None:
    state = state_of(models, tmp_path / "anchors", chat=False)
    opened(state)
    with torch.no_grad():
        state["model"].model.layers[1].mlp.up_proj.weight[0, 0].mul_(1 + 1e-6)
    with pytest.raises(FingerprintError, match="weights"):
        opened(state)
    rows = tiny_rows(5)
    for last in ({"rejected": "other"}, {"anchors": ["a"]}):
        changed = rows_from([*rows[:4], {**rows[4], **last}], "memory")
        with pytest.raises(FingerprintError, match="rows"):
            opened({**state_of(models, tmp_path / "anchors", chat=False), "rows": changed})


def test_the_same_weights_in_another_architecture_are_another_model() -> None:
    """Mistral's tensors have Llama's names and shapes; its attention has a window, by default."""
    llama = tiny_model()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    others = ("num_key_value_heads", "max_position_embeddings", "pad_token_id", "eos_token_id")
    settings = {name: getattr(llama.config, name) for name in (*sizes, *others)}
    mistral = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **settings))
    mistral.load_state_dict(llama.state_dict())
    differing = [a != b for a, b in zip(identity_of(llama), identity_of(mistral), strict=True)]
    assert differing == [False, True, False]


def test_what_does_not_count(models: Path, tmp_path: Path) -> None:
    state = state_of(models, tmp_path / "anchors", chat=False)
    opened(state)
    training = {"seed": 1, "learning_rate": 1.0, "output_dir": "elsewhere", "alpha": 1.0, "beta": 2.0}
    training |= {"per_device_train_batch_size": 1, "model_name_or_path": "x", "attn_implementation": "eager"}
    tokenizer = tiny_tokenizer()
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    tokenizer.chat_template = "unused by rows of plain text"
    for change in (
        {"config": replace(state["config"], **training, anchor_weight=1.0)},
        {"rows": rows_from(tiny_rows(5), "another file")},
        {"model": tiny_model(attention_dropout=0.1).train()},
        {"model": adapted(tiny_model())},
        {"tokenizer": tokenizer},
    ):
        assert opened({**state, **change}).complete
    shutil.copytree(models / "neg", tmp_path / "moved")
    moved = replace(state["config"], ref_model_neg=str(tmp_path / "moved"))
    assert opened({**state, "config": moved}).complete


def test_a_reference_overwritten_in_its_place_is_noticed(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "neg", tmp_path / "ref")
    state = state_of(models, tmp_path / "anchors", chat=False)
    state["config"] = replace(state["config"], ref_model_neg=str(tmp_path / "ref"))
    opened(state)
    shutil.copytree(models / "pos", tmp_path / "ref", dirs_exist_ok=True)
    with pytest.raises(FingerprintError, match="ref_neg_weights"):
        opened(state)


def test_a_reference_that_changes_while_at_work_is_an_error(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(CONFIG, ref_model_neg=str(models / "neg"))
    References(tiny_model(), tiny_tokenizer(), settings).fingerprint()
    monkeypatch.setattr(references_module, "load_model", lambda *args: tiny_model(seed=7))  # a hub name may do so
    with pytest.raises(D2OError, match=r"ref_model_neg '.*/neg' has changed since this process read it first"):
        build(tmp_path / "s", config=settings)


def test_by_default_both_references_are_the_initial_model(tmp_path: Path) -> None:
    fingerprint = build(tmp_path / "s").fingerprint
    for side in ("neg", "pos"):
        assert fingerprint[f"ref_{side}_weights"] == fingerprint["weights"]
        assert fingerprint[f"ref_{side}_config"] == fingerprint["model_config"]
        assert fingerprint[f"ref_{side}_adapter"] is fingerprint["adapter"] is None


# --- Adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_is_known_by_its_content(models: Path, tmp_path: Path) -> None:
    """Its weights and its scale count; its folder, its name in peft and the folder of its base do not."""
    base = AutoModelForCausalLM.from_pretrained
    loaded = load_model(D2OConfig(), str(models / "adapter"))
    assert identity_of(loaded) == identity_of(trained(adapted(tiny_model())))
    shutil.copytree(models, tmp_path / "moved")
    path = tmp_path / "moved" / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "moved" / "initial")}))
    named = PeftModel.from_pretrained(base(models / "initial"), path.parent, adapter_name="model")
    assert identity_of(load_model(D2OConfig(), str(path.parent))) == identity_of(named) == identity_of(loaded)
    path.write_text(json.dumps({**settings, "lora_alpha": 1}))
    for other in (load_model(D2OConfig(), str(path.parent)), trained(adapted(tiny_model()), seed=1)):
        differing = [a != b for a, b in zip(identity_of(other), identity_of(loaded), strict=True)]
        assert differing == [False, False, True]


def test_a_trained_adapter_draws_too(tmp_path: Path) -> None:
    makers = {"plain": tiny_model, "adapter": lambda: trained(adapted(tiny_model()))}
    makers["merged"] = lambda: makers["adapter"]().merge_and_unload()
    stores = {name: build(tmp_path / name, model=make()) for name, make in makers.items()}
    drawn = {name: [example.anchor_ids for example in store.examples()] for name, store in stores.items()}
    assert drawn["adapter"] == drawn["merged"] != drawn["plain"]


def test_resuming_starts_from_the_same_adapter(models: Path, tmp_path: Path) -> None:
    """The check reads the initial adapter; the checkpoint's weights are loaded after it."""

    def run(out: str, adapter: str, *callbacks: Any) -> D2OTrainer:
        args = config(tmp_path / out, save_steps=1, anchors_dir=str(tmp_path / "anchors"))
        return D2OTrainer(adapter, args, tiny_rows(6), callbacks=callbacks)

    adapter = str(models / "adapter")
    run("whole", adapter).train()
    with pytest.raises(Stop):
        run("parts", adapter, stop_at(2, "save")).train()
    shutil.copytree(models / "adapter", tmp_path / "moved")
    for other in (save_adapter(tmp_path / "other", models / "initial", seed=1), str(tmp_path / "parts/checkpoint-2")):
        with pytest.raises(FingerprintError, match=r"\n  adapter: stored"):
            run("parts", other).train("latest")
    run("parts", str(tmp_path / "moved")).train("latest")
    files = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("whole", "parts")]
    assert files[0] == files[1] != (models / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_commands_take_an_adapter(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(8)))
    settings = {
        "model_name_or_path": str(models / "adapter"),
        "dataset_name": str(tmp_path / "data.jsonl"),
        "eval_fraction": 0.3,
        "output_dir": str(tmp_path / "run"),
        "num_generations": 2,
        "max_length": 64,
        "max_completion_length": 12,
        "max_steps": 6,
        "learning_rate": 2e-2,
        "ref_model_pos": str(models / "pos"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    for command in ("sample", "train", "eval"):
        assert main([command, str(tmp_path / "config.yaml")]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert report["trained"]["eval_loss"] < report["initial"]["eval_loss"] - 0.01
    start, end = (load_model(D2OConfig(), str(place)) for place in (models / "adapter", tmp_path / "run"))
    before, after = identity_of(start), identity_of(end)
    assert before[:2] == after[:2]
    assert before.adapter != after.adapter
    examples = AnchorStore.open(tmp_path / "run/anchors/eval").examples()
    means = [sum(fp64_logps(model, e)[0] for e in examples) / len(examples) for model in (start, end)]
    for name, mean in zip(("initial", "trained"), means, strict=True):
        assert report[name]["eval_logps/rejected"] == pytest.approx(mean, rel=1e-5)

    text = "the initial model with the adapter it came with, for anchors; "
    assert f"{text}`pos` (weights " in (tmp_path / "run" / "README.md").read_text()
    assert f"{text}{models}/pos (weights " in inspect(tmp_path / "run/anchors/train")
    snippet = (tmp_path / "run" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(snippet.replace('folder = "."', f"folder = {str(tmp_path / 'run')!r}"), found)
    assert identity_of(found["model"]) == after
    capsys.readouterr()
    assert main(["train", str(tmp_path / "config.yaml"), "--use_peft", "true"]) == 2
    assert "the model has an adapter already; leave peft_config and use_peft out" in capsys.readouterr().err


# --- Redrawn anchors -------------------------------------------------------------------------------------------------


def test_fresh_anchors_have_the_policy_and_negatives_the_model_named(models: Path, tmp_path: Path) -> None:
    args = config(tmp_path, ref_model_pos=str(models / "pos"), refresh_every=2, save_steps=3)
    run = D2OTrainer(str(models / "initial"), args, tiny_rows(4))
    run.train()
    window = AnchorStore.open(tmp_path / "refreshed" / "step-2")
    pos = tiny_model(seed=2)
    for example in window.examples():
        assert example.ref_logps[0] == pytest.approx(fp64_logps(pos, example)[0], rel=1e-6)
    text = f"the policy after step 2, for anchors; {models}/pos (weights "
    assert text in inspect(tmp_path / "refreshed" / "step-2")
    assert "; anchors drawn anew: the policy that drew them |" in (tmp_path / "README.md").read_text()
    with pytest.raises(D2OError, match="refresh_every is 2; it must be 0 while ref_model_neg is set"):
        D2OConfig(ref_model_neg="a", refresh_every=2)


# --- In memory when there is something to score ----------------------------------------------------------------------


def test_references_are_loaded_once_and_gone_before_training(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    original = references_module.load_model

    def watched(*args: Any) -> Any:
        model = original(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(references_module, "load_model", watched)
    monkeypatch.setattr(references_module, "_known", {})
    alive: list[int] = []

    def count(run: Any, event: str, metrics: Any) -> None:
        alive.append(sum(reference() is not None for reference in loaded))

    args = config(tmp_path / "run", ref_model_neg=str(models / "neg"), ref_model_pos=str(models / "pos"))
    run = D2OTrainer(str(models / "initial"), args, tiny_rows(6), callbacks=[count])
    run.train()
    assert len(loaded) == 2
    assert alive == [0] * len(alive)
    assert len(alive) == 5
    store = tmp_path / "run/anchors/train"
    open_store(run.model, run.tokenizer, run.datasets["train"], args, "new")
    assert len(loaded) == 4
    D2OTrainer(str(models / "initial"), replace(args, anchors_dir=str(store.parent)), tiny_rows(6))._prepare("train")
    assert len(loaded) == 4, "a complete store needs no model that is known"
    (store / "shard-00000.parquet").unlink()
    before = (store / "shard-00001.parquet").read_bytes()
    D2OTrainer(str(models / "initial"), replace(args, anchors_dir=str(store.parent)), tiny_rows(6))._prepare("train")
    assert len(loaded) == 6
    assert (store / "shard-00001.parquet").read_bytes() == before


# --- Refusals --------------------------------------------------------------------------------------------------------


def save_small(folder: Path) -> None:
    tiny_model(vocab_size=100).save_pretrained(folder)


def save_other_tokenizer(folder: Path) -> None:
    tiny_model(seed=1).save_pretrained(folder)
    tokenizer = tiny_tokenizer(prefix_space=True)
    tokenizer.save_pretrained(folder)


def save_orphan(folder: Path) -> None:
    trained(adapted(tiny_model())).save_pretrained(folder)


def save_on_adapter(folder: Path) -> None:
    save_with_adapter(1)(folder.with_name("below"))
    save_orphan(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(folder.with_name("below"))
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def save_prompts(folder: Path) -> None:
    save_tiny(folder.with_name("base"), seed=1)
    base = AutoModelForCausalLM.from_pretrained(folder.with_name("base"))
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda folder: None, "' is not a folder"),
        (lambda folder: folder.mkdir(), "' has no config.json"),
        (save_small, "' has a vocabulary of 100 tokens, but the token id 1[0-9][0-9] is in use"),
        (save_other_tokenizer, "': its tokenizer differs from the trained model's in .* token ids, the first is"),
        (save_orphan, "adapter_config.json does not say which model the adapter belongs to"),
        (save_on_adapter, "': its base_model_name_or_path '.*/below' is an adapter too"),
        (save_prompts, "prompt learning adapter"),
    ],
    ids=["missing", "empty", "vocabulary", "tokenizer", "adapter without base", "adapter on adapter", "prompt tuning"],
)
@pytest.mark.parametrize("setting", ["ref_model_neg", "ref_model_pos"])
def test_a_reference_that_cannot_be_one(
    tmp_path: Path, setting: str, save: Callable[[Path], Any], message: str
) -> None:
    save(tmp_path / "ref")
    with pytest.raises(D2OError, match=message) as error:
        build(tmp_path / "s", config=replace(CONFIG, **{setting: str(tmp_path / "ref")}))
    assert f"{tmp_path}/ref" in str(error.value)
    assert not list(tmp_path.glob("s/shard-*"))
    if "adapter" not in message:
        assert f"{setting} '{tmp_path}/ref'" in str(error.value)


def test_an_adapter_inside_a_model_of_transformers_is_refused(models: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(models / "adapter")
    with pytest.raises(D2OError, match="LlamaForCausalLM holds an adapter but is no PeftModel"):
        D2OTrainer(model, config(tmp_path), tiny_rows(4), processing_class=tiny_tokenizer())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reference_whose_weights_are_not_finite(models: Path, tmp_path: Path, value: float) -> None:
    """Its scores are refused before they are kept."""
    model = tiny_model(seed=1)
    with torch.no_grad():
        model.lm_head.weight[7] = value
    model.save_pretrained(tmp_path / "bad")
    config = replace(CONFIG, ref_model_pos=str(tmp_path / "bad"))
    with pytest.raises(D2OError) as found:
        build(tmp_path / "store", ROWS, config=config)
    assert "bad" in str(found.value) or "its log-probability under its reference is nan" in str(found.value)
    assert not list((tmp_path / "store").glob("shard*"))


def test_a_reference_folder_with_a_link_to_nothing(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "pos", tmp_path / "pos"))
    (folder / "notes").symlink_to("none")
    build(tmp_path / "store", ROWS, config=replace(CONFIG, ref_model_pos=str(folder)))


def test_a_reference_that_names_itself_as_its_base(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "adapter", tmp_path / "adapter"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(folder)}))
    with pytest.raises(D2OError, match=r"ref_model_neg .*is an adapter too; merge that one into its model first"):
        build(tmp_path / "store", ROWS, config=replace(CONFIG, ref_model_neg=str(folder)))

"""The training loop on a real, tiny Llama: it learns, it averages over prompts exactly, and its errors are clear."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_scheduler

from d2o_fast import D2OConfig, D2OTrainer
from d2o_fast.anchors.build import build_store
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.data.reading import rows_from
from d2o_fast.errors import D2OError, FingerprintError
from d2o_fast.forward.batch import pack, response_hidden, row_tokens
from d2o_fast.loss.reference import naive_d2o_loss
from d2o_fast.model.parts import decoder_of, head_of
from d2o_fast.training import metrics as metrics_module
from d2o_fast.training import trainer as trainer_module
from d2o_fast.training.metrics import read_log
from d2o_fast.training.step import adamw, batch_loss, schedule
from tiny import save_tiny, tiny_model, tiny_rows, tiny_tokenizer

SETTINGS: dict[str, Any] = {
    "num_generations": 3,
    "max_length": 64,
    "max_completion_length": 12,
    "learning_rate": 3e-3,
    "max_steps": 4,
    "warmup_ratio": 0.0,
}
TRAIN = [
    *("loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "tokens_per_second"),
    *("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
]


def config(folder: Path, **settings: Any) -> D2OConfig:
    return D2OConfig(**{**SETTINGS, "output_dir": str(folder), **settings})


def trainer(folder: Path, data: Any = None, model: Any = None, **settings: Any) -> D2OTrainer:
    options = {name: settings.pop(name) for name in ("eval_dataset", "peft_config", "callbacks") if name in settings}
    data = tiny_rows(10) if data is None else data
    return D2OTrainer(
        model or tiny_model(), config(folder, **settings), data, processing_class=tiny_tokenizer(), **options
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AnchorStore:
    """Anchors of ten prompts, drawn and scored by ``tiny_model()``."""
    folder = tmp_path_factory.mktemp("anchors")
    return build_store(tiny_model(), tiny_tokenizer(), rows_from(tiny_rows(10)), config(folder), folder)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


# --- Learning --------------------------------------------------------------------------------------------------------


def test_loss_falls_and_margins_grow(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=tiny_rows(20)[12:], max_steps=20, eval_steps=10)
    result = run.train()
    log = read_log(tmp_path / "metrics.jsonl")
    steps = [record for record in log if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert all(set(record) == {"step", *TRAIN} for record in steps)
    # Before the first update the model is its own reference: z = 0 and L = ln 2 (paper.md).
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert steps[-1]["loss"] < 0.45
    assert steps[-1]["rewards/margins"] > 0.5
    assert steps[-1]["rewards/accuracies"] == 1.0
    for record in steps:
        assert record["rewards/margins"] == pytest.approx(
            record["rewards/chosen"] - record["rewards/rejected"], abs=1e-5
        )
    held_out = [record for record in log if "eval_loss" in record]
    assert [record["step"] for record in held_out] == [0, 10, 20]
    assert held_out[-1]["eval_rewards/margins"] > 0.2 > held_out[0]["eval_rewards/margins"]
    assert result.global_step == 20
    assert result.metrics["loss"] == steps[-1]["loss"]
    assert run.evaluate()["eval_loss"] == held_out[-1]["eval_loss"]


def test_one_step_is_adamw_on_the_specification(tmp_path: Path, store: AnchorStore) -> None:
    """The same update, from the naive loss, in plain torch."""
    run = trainer(tmp_path, store, max_steps=1, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    run.args.max_grad_norm = 0.5
    run.train()

    model = tiny_model().train()
    order = run.order.prompts_of(0)
    assert len(order) == 6
    batch = pack([store.examples()[i] for i in order], 0)
    hidden = response_hidden(decoder_of(model), batch)
    out = naive_d2o_loss(hidden, head_of(model).weight, batch.targets, batch.layout, batch.ref_logps)
    out.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0).step()
    record = read_log(tmp_path / "metrics.jsonl")[0]
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    responses = out.logps.view(6, 4)  # each prompt's negative and its three anchors
    assert record["logps/rejected"] == pytest.approx(responses[:, 0].mean().item(), rel=1e-5)
    assert record["logps/chosen"] == pytest.approx(responses[:, 1:].mean().item(), rel=1e-5)
    assert largest_difference(weights(run.model), weights(model)) < 2e-5


@pytest.mark.parametrize("prompts", [10, 7], ids=["whole batches and one partial", "another partial"])
def test_accumulation_averages_over_prompts(tmp_path: Path, prompts: int) -> None:
    """2 x 2 prompts and 4 x 1 are the same step, at the end of an epoch (2 or 3 prompts left) too."""
    results = []
    for size, accumulation in ((2, 2), (4, 1)):
        run = trainer(
            tmp_path / f"{size}",
            tiny_rows(prompts),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=-1,
            num_train_epochs=2,
            anchors_dir=str(tmp_path / "anchors"),
        )
        run.train()
        results.append((weights(run.model), read_log(tmp_path / f"{size}" / "metrics.jsonl")))
    (first, first_log), (second, second_log) = results
    assert len(first_log) == 2 * math.ceil(prompts / 4)
    assert first_log[-1]["epoch"] == 2.0
    assert largest_difference(first, second) < 1e-4
    for one, other in zip(first_log, second_log, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm", "num_tokens"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4)


def test_metrics_between_log_lines_are_means_over_prompts(tmp_path: Path, store: AnchorStore) -> None:
    every, third = (
        trainer(tmp_path / f"{n}", store, logging_steps=n, max_steps=3, per_device_train_batch_size=4) for n in (1, 3)
    )
    every.train()
    third.train()
    steps, (mean,) = (read_log(tmp_path / name / "metrics.jsonl") for name in ("1", "3"))
    sizes = (4, 4, 2)  # ten prompts
    for name in ("loss", "rewards/margins", "logps/rejected", "rewards/accuracies"):
        expected = sum(n * record[name] for n, record in zip(sizes, steps, strict=True)) / 10
        assert mean[name] == pytest.approx(expected, rel=1e-6)
    assert mean["grad_norm"] == steps[-1]["grad_norm"]
    assert mean["num_tokens"] == steps[-1]["num_tokens"] == sum(e.num_tokens() for e in store.examples())


def test_every_epoch_takes_every_prompt_once_in_an_order_of_its_own(tmp_path: Path, store: AnchorStore) -> None:
    def epochs(seed: int) -> list[list[int]]:
        run = trainer(tmp_path, store, per_device_train_batch_size=3, seed=seed)
        run._prepare("train")
        return [[i for step in range(4) for i in run.order.prompts_of(4 * epoch + step)] for epoch in range(2)]

    assert all(sorted(order) == list(range(10)) for order in epochs(1))
    assert epochs(1)[0] != epochs(1)[1]
    assert epochs(1) == epochs(1)
    assert epochs(1) != epochs(2)


def run_with(folder: Path, store: AnchorStore, model: Any = None, **settings: Any) -> tuple[D2OTrainer, list[dict]]:
    options = {"max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, **settings}
    run = trainer(folder, store, model, eval_dataset=store, **options)
    run.train()
    return run, read_log(folder / "metrics.jsonl")


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"use_peft": True, "lora_r": 4}], ids=str)
def test_sharing_prompts_changes_nothing_but_rounding(tmp_path: Path, store: AnchorStore, settings: Any) -> None:
    shared, apart = (
        run_with(tmp_path / str(setting), store, shared_prefix=setting, **settings) for setting in ("auto", False)
    )
    assert shared[0].sharing == (True, "one pass per prompt (torch's flash attention on the CPU)")
    assert apart[0].sharing == (False, "one row per response (sdpa), as shared_prefix is false")
    for (run, _), name in ((shared, "auto"), (apart, "False")):
        assert f"| Attention | {run.sharing.text} |" in (tmp_path / name / "README.md").read_text()
    for one, other in zip(shared[1], apart[1], strict=True):
        for name in set(one) - {"tokens_per_second"}:
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=2e-4), name
    assert largest_difference(weights(shared[0].model), weights(apart[0].model)) < 2e-4


@pytest.mark.parametrize("shared", [True, False])
def test_a_token_budget_changes_nothing_but_rounding(tmp_path: Path, store: AnchorStore, shared: bool) -> None:
    sizes: list[int] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        sizes.append(row_tokens(args[2], kwargs["shared"]))
        return batch_loss(*args, **kwargs)

    _, by_number = run_with(tmp_path / "number", store, shared_prefix=shared)
    budget = max(row_tokens([example], shared) for example in store.examples()) + 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "batch_loss", watched)
        run, by_tokens = run_with(tmp_path / "tokens", store, shared_prefix=shared, tokens_per_micro_batch=budget)
    assert max(sizes) <= budget
    assert run.order.prompts_per_step == 4
    assert len(sizes) > 5 * 2
    for one, other in zip(by_number, by_tokens, strict=True):
        for name in set(one) - {"tokens_per_second"}:
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=2e-4), name


def test_a_model_that_cannot_share_trains_unshared(tmp_path: Path) -> None:
    """And says why; where sharing was asked for by name, it does not train."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 160}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes, eos_token_id=2, bos_token_id=1))
    run = trainer(tmp_path / "auto", model=model, max_steps=2)
    run.train()
    assert not run.sharing.on
    card = (tmp_path / "auto" / "README.md").read_text()
    assert "prompts cannot be shared by FalconForCausalLM: 0 of its 2 layers" in card
    with pytest.raises(D2OError, match="shared_prefix is true, but prompts cannot be shared by FalconForCausalLM"):
        trainer(tmp_path / "true", model=model, shared_prefix=True).train()


def test_bf16_compute_keeps_fp32_masters(tmp_path: Path) -> None:
    run = trainer(tmp_path, dtype="bfloat16", max_steps=12, gradient_checkpointing=True)
    run.train()
    log = read_log(tmp_path / "metrics.jsonl")
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert log[-1]["loss"] < 0.6 < log[0]["loss"]


def test_bf16_is_what_the_decoder_computes_in(tmp_path: Path, store: AnchorStore) -> None:
    model = tiny_model()
    decoder, head = decoder_of(model), head_of(model)
    exact, rounded = (
        batch_loss(decoder, head, store.examples(), 0, config(tmp_path, dtype=dtype), 10)[0].logps
        for dtype in ("float32", "bfloat16")
    )
    assert 5e-4 < (exact - rounded).abs().max() < 0.1  # fp32 rounding would be 1e-5


def test_activation_checkpointing_changes_nothing_with_dropout(tmp_path: Path, store: AnchorStore) -> None:
    model = tiny_model(attention_dropout=0.2)
    store = build_store(model, tiny_tokenizer(), store.rows(), config(tmp_path), tmp_path / "anchors")
    results = []
    for name, checkpointing, off in (("off", False, False), ("on", True, False), ("without", False, True)):
        settings = {"gradient_checkpointing": checkpointing, "disable_dropout": off}
        run = trainer(tmp_path / name, store, tiny_model(attention_dropout=0.2), **settings)
        run.train()
        results.append(weights(run.model))
    assert largest_difference(*results[:2]) < 1e-6
    assert largest_difference(results[0], results[2]) > 1e-4  # dropout was there


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device(tmp_path: Path, store: AnchorStore) -> None:
    """Nothing of ours does; transformers 5 itself asks once per forward whether positions are packed."""
    seen: list[str] = []

    class Watched(D2OTrainer):
        def _step(self) -> tuple[torch.Tensor, float, int]:
            if self.state.global_step == 0:  # kernels are compiled and tuned
                return super()._step()
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = super()._step()
            torch.cuda.set_sync_debug_mode("default")
            seen.extend(f"{w.filename}:{w.lineno} {w.message}" for w in caught if "synchroniz" in str(w.message))
            return result

    settings = config(tmp_path, max_steps=3, logging_steps=3, gradient_accumulation_steps=2, dtype="bfloat16")
    Watched(tiny_model(), settings, tiny_rows(10), processing_class=tiny_tokenizer()).train()
    assert [place for place in seen if "masking_utils.py" not in place] == []


def test_tokens_per_second_leave_evaluations_out(
    tmp_path: Path, store: AnchorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of the test: a step takes 2 s, an evaluation 100 s."""
    now, step = [0.0], D2OTrainer._step
    monkeypatch.setattr(metrics_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def timed(run: D2OTrainer) -> Any:
        now[0] += 2.0
        return step(run)

    def slow(run: D2OTrainer, event: str, metrics: dict[str, float]) -> None:
        now[0] += 100.0 * (event == "evaluate")

    monkeypatch.setattr(D2OTrainer, "_step", timed)
    run = trainer(tmp_path, store, eval_dataset=store, eval_steps=1, logging_steps=3, max_steps=3, callbacks=[slow])
    run.train()
    record = next(r for r in read_log(tmp_path / "metrics.jsonl") if "loss" in r)
    assert record["num_tokens"] / record["tokens_per_second"] == pytest.approx(6.0)  # two evaluations fall into it


def test_the_global_generator_is_left_alone(tmp_path: Path, store: AnchorStore) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer(tmp_path, store, max_steps=1).train()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_schedule_is_transformers(kind: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=21)
    warmup = D2OConfig().warmup(21)
    for step in range(21):
        assert schedule(step, 21, kind, warmup) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_no_weight_decay_on_norms_and_biases(tmp_path: Path) -> None:
    model = tiny_model(attention_bias=True)
    optimizer = adamw(model, config(tmp_path, weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (not name.endswith("bias") and "norm" not in name), name


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_lora_trains_and_saves_the_adapter_alone(tmp_path: Path) -> None:
    from peft import PeftModel

    name = save_tiny(tmp_path / "model")
    args = config(tmp_path / "run", use_peft=True, lora_r=4, learning_rate=2e-2, max_steps=15, save_steps=10)
    run = D2OTrainer(name, args, tiny_rows(10), eval_dataset=tiny_rows(20)[12:])
    run.train()
    log = read_log(tmp_path / "run" / "metrics.jsonl")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[-2]["loss"] < 0.65
    base = tiny_model().state_dict()
    for key, value in run.model.get_base_model().state_dict().items():
        if "lora_" not in key:
            assert torch.equal(value, base[key.replace(".base_layer", "")]), key
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-10"):
        assert (folder / "adapter_model.safetensors").is_file()
        assert not (folder / "model.safetensors").exists()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), tmp_path / "run")
    tokens = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, run.model(tokens).logits)
        assert not torch.allclose(again(tokens).logits, tiny_model()(tokens).logits, atol=1e-3)


def test_a_peft_model_has_its_disabled_adapter_as_reference(tmp_path: Path, store: AnchorStore) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=2))
    run = trainer(tmp_path, store, model)  # the store was made by the model without an adapter
    assert run.train().global_step == 4


@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
def test_lora_on_the_head_is_refused(tmp_path: Path, where: str) -> None:
    from peft import LoraConfig

    modules = {"target_modules": ["q_proj"], where: ["lm_head"]}
    with pytest.raises(D2OError, match="lm_head"):
        trainer(tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM", **modules))


def test_two_adapters_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(D2OError, match="has an adapter already"):
        trainer(tmp_path, model=model, use_peft=True)


# --- What is written -------------------------------------------------------------------------------------------------


def test_the_final_model_loads_and_its_card_says_what_was_done(tmp_path: Path) -> None:
    name = save_tiny(tmp_path / "model")
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    args = config(tmp_path / "run", report_to=["tensorboard"])
    run = D2OTrainer(name, args, tiny_rows(10), tiny_rows(14)[10:])
    run.train()
    out = tmp_path / "run"
    assert largest_difference(weights(AutoModelForCausalLM.from_pretrained(out)), weights(run.model)) == 0.0
    assert AutoTokenizer.from_pretrained(out)("how to").input_ids == tiny_tokenizer()("how to").input_ids
    assert json.loads((out / "generation_config.json").read_text()) == generation
    settings = yaml.safe_load((out / "d2o_config.yaml").read_text())
    assert settings == {**dataclasses.asdict(run.args), "model_name_or_path": "model", "output_dir": "run"}
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in header  # a folder of this machine means nothing elsewhere
    assert str(tmp_path) not in card
    parts = ("10 negatives, 30 anchors", "4 negatives, 12 anchors", "alpha = 0.1", "4 steps", "| eval_loss |", "torch")
    for part in parts:
        assert part in card, part
    assert list((out / "tensorboard").iterdir())
    assert not list(out.glob(".*"))


def test_callbacks_hear_of_everything(tmp_path: Path, store: AnchorStore) -> None:
    heard: list[tuple[str, int]] = []
    callbacks = [lambda run, event, metrics: heard.append((event, run.state.global_step))]
    data = {"eval_dataset": store, "callbacks": callbacks}
    trainer(tmp_path, store, **data, max_steps=2, save_steps=2).train()
    assert heard == [("log", 1), ("log", 2), ("save", 2), ("evaluate", 2), ("train_end", 2)]


def test_the_judge_is_asked_about_held_out_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "length_judge.py").write_text("def judge(prompt, response):\n    return float(len(response))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = trainer(tmp_path / "run", eval_dataset=tiny_rows(14)[10:], judge="length_judge:judge", max_steps=1)
    assert run.train().metrics["eval_judge/score"] > 0
    sys.modules.pop("length_judge")


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_more_than_one_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(D2OError, match=r"one of 2 processes.*without torchrun"):
        trainer(tmp_path)


def test_liger_needs_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also on a machine that has one
    with pytest.raises(D2OError, match="use_liger_kernel needs a CUDA device"):
        trainer(tmp_path, use_liger_kernel=True)


def test_a_store_of_another_model_is_refused(tmp_path: Path, store: AnchorStore) -> None:
    with pytest.raises(FingerprintError, match="weights"):
        trainer(tmp_path, store, tiny_model(seed=1)).train()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, store: AnchorStore) -> None:
    run = trainer(tmp_path, store, logging_steps=7, save_steps=2, max_steps=9)
    run._prepare("train")
    broken = run.order.prompts_of(2)[1]  # in step 3, after the checkpoint of step 2 and before the one of step 4
    examples = list(run.examples["train"])
    scores = [math.nan, *examples[broken].ref_logps[1:]]
    examples[broken] = dataclasses.replace(examples[broken], ref_logps=scores)
    run.examples["train"] = examples
    with pytest.raises(D2OError, match=rf"step 3: .*train_dataset, row {broken + 1}\b"):
        run.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert [record["step"] for record in read_log(tmp_path / "metrics.jsonl")] == []
    assert not (tmp_path / "model.safetensors").exists()


def test_there_must_be_something_to_evaluate_on(tmp_path: Path, store: AnchorStore) -> None:
    with pytest.raises(D2OError, match="nothing to evaluate on"):
        trainer(tmp_path, store).evaluate()


@pytest.mark.parametrize("settings", [{"eval_steps": 2}, {"judge": "module:function"}], ids=str)
def test_evaluation_without_held_out_data_is_refused_before_anything_is_loaded(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    ((name, value),) = settings.items()
    message = f"{name} is {value!r}; it must be left out where there are no held-out data"
    with pytest.raises(D2OError, match=message):
        D2OTrainer("no/such/model", config(tmp_path / "run", **settings), tiny_rows(2))
    assert not (tmp_path / "run").exists()

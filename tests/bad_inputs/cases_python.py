"""Arguments from Python: objects of wrong kinds to the trainer and the stores, wrong tensors to the losses."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from case import Call, Case, Cases, fine

KIND = "Python arguments"


def cases(chance: random.Random, good: Path) -> Cases:
    """All cases of the kind."""
    for argument, values in TRAINER.items():
        for name, make in values.items():
            words = (("processing_class", "tokenizer"),) if argument == "processing_class" else (argument,)
            yield Case(KIND, f"D2OTrainer: {argument} is {name}", partial(_trainer, argument, make), words)
    for name, make in SAME.items():
        yield Case(
            KIND, f"D2OTrainer: {name}", partial(_trainer, *make), (make[0],), fine, either=name.startswith("rows")
        )
    for name, value in {"5": 5, "a list": [1], "an empty text": " ", "a folder": Path("model"), "bytes": b"x"}.items():
        yield Case(
            KIND, f"train: resume_from_checkpoint is {name}", partial(_resumed, value), ("resume_from_checkpoint",)
        )
    for name, value in {"None": None, "5": 5, "no folder": "gone", "a file": "rows.jsonl", "a model": "model"}.items():
        yield Case(KIND, f"AnchorStore.open: {name}", partial(_opened, value), ())
    for function, changes in LOSSES.items():
        for name, change in changes.items():
            prepare = partial(_loss, function, change)
            yield Case(KIND, f"{function}: {name}", prepare, (name.split()[0],), errors=("ValueError", "TypeError"))
    for name, value in LAYOUTS.items():
        prepare = partial(_layout, value)
        yield Case(KIND, f"ResponseLayout.from_lengths: {name}", prepare, (), errors=("ValueError", "TypeError"))


# --- The trainer -------------------------------------------------------------------------------------------------


def _module() -> Any:
    return torch.nn.Linear(2, 2)


def _hf(name: str, config: str, **fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**fields))

    return make


_GPT2 = {"vocab_size": 160, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
_BERT = {
    "vocab_size": 160,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def _training_arguments() -> Any:
    import transformers

    return transformers.TrainingArguments(output_dir="out")


def _lora(**fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        import peft

        return peft.LoraConfig(**fields)

    return make


def _prompt_tuning() -> Any:
    import peft

    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def _meta_model() -> Any:
    from tiny import tiny_model

    return tiny_model().to("meta")


def _nan_model() -> Any:
    from tiny import tiny_model

    model = tiny_model()
    model.lm_head.weight.data.fill_(float("nan"))
    return model


def _without_end() -> Any:
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def _larger_tokenizer() -> Any:
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([" go", " away"])
    return tokenizer


def _processor() -> Any:
    class Processor:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    return Processor()


def _train_callback() -> Any:
    import transformers

    return [transformers.TrainerCallback()]


TRAINER: dict[str, dict[str, Callable[[], Any]]] = {
    "model": {
        "None": lambda: None,
        "a number": lambda: 5,
        "a list": lambda: [],
        "a module": _module,
        "a class": lambda: torch.nn.Linear,
        "a state dict": lambda: {"a": torch.ones(1)},
        "a model without a head": _hf("GPT2Model", "GPT2Config", **_GPT2),
        "an encoder": _hf("BertForMaskedLM", "BertConfig", **_BERT),
        "a classifier": _hf("GPT2ForSequenceClassification", "GPT2Config", **_GPT2),
        "a model on meta": _meta_model,
        "a model of NaN": _nan_model,
        "a smaller vocabulary": _hf("GPT2LMHeadModel", "GPT2Config", **(_GPT2 | {"vocab_size": 60})),
        "an empty text": lambda: " ",
        "bytes": lambda: b"model",
    },
    "args": {
        "None": lambda: None,
        "a dict": lambda: {"max_steps": 1},
        "a text": lambda: "c.yaml",
        "transformers' arguments": _training_arguments,
        "the class": lambda: __import__("d2o_fast").D2OConfig,
    },
    "train_dataset": {
        "None": lambda: None,
        "a number": lambda: 5,
        "an empty list": lambda: [],
        "a list of numbers": lambda: [5],
        "a list of texts": lambda: ["a"],
        "a generator": lambda: (row for row in [{"prompt": "a", "rejected": "b"}]),
        "a dict": lambda: {"prompt": ["a"], "rejected": ["b"]},
        "a text": lambda: "rows.jsonl",
        "a set": lambda: {1},
        "a path": lambda: Path("rows.jsonl"),
        "bytes": lambda: b"abc",
        "a list of None": lambda: [None],
        "rows of numbers": lambda: [{"prompt": 1, "rejected": 2}],
        "a tensor": lambda: torch.ones(3),
        "True": lambda: True,
    },
    "eval_dataset": {
        "a number": lambda: 5,
        "an empty list": lambda: [],
        "a text": lambda: "held_out.jsonl",
        "a list of texts": lambda: ["a"],
        "False": lambda: False,
    },
    "processing_class": {
        "a number": lambda: 5,
        "a text": lambda: "model",
        "a function": lambda: len,
        "a processor": _processor,
        "without an end token": _without_end,
        "larger than the model": _larger_tokenizer,
        "a model": _module,
    },
    "peft_config": {
        "a dict": lambda: {"r": 2},
        "a number": lambda: 5,
        "a text": lambda: "lora",
        "of a module that is not there": _lora(target_modules=["zz"], task_type="CAUSAL_LM"),
        "of rank 0": lambda: _lora(r=0, target_modules=["q_proj"])(),
        "of learned prompts": _prompt_tuning,
        "a module": _module,
    },
    "callbacks": {
        "a function": lambda: len,
        "a text": lambda: "mine",
        "a list of texts": lambda: ["mine"],
        "transformers' callbacks": _train_callback,
        "a number": lambda: 5,
        "a list of None": lambda: [None],
    },
}


def _tiny() -> Any:
    from tiny import tiny_model

    return tiny_model()


#: objects that are odd and right
SAME: dict[str, tuple[str, Callable[[], Any]]] = {
    "a model that is compiled": ("model", lambda: torch.compile(_tiny())),
    "a model in DataParallel": ("model", lambda: torch.nn.DataParallel(_tiny())),
    "a model in half precision": ("model", lambda: _tiny().bfloat16()),
    "a model that is in training": ("model", lambda: _tiny().train()),
    "a path as the model": ("model", lambda: Path("model")),
    "no callbacks": ("callbacks", lambda: ()),
    "rows as tuples": ("train_dataset", lambda: tuple([{"prompt": "how?", "rejected": " go"}] * 2)),
}


def _trainer(argument: str, make: Callable[[], Any]) -> Call:
    from d2o_fast import D2OConfig, D2OTrainer
    from d2o_fast.data.reading import read_rows

    config = D2OConfig(**(yaml.safe_load(Path("c.yaml").read_text()) | {"anchors_dir": "new"}))
    given = {"model": "model", "args": config, "train_dataset": read_rows("rows.jsonl")}

    def call() -> None:
        D2OTrainer(**(given | {argument: value})).train()

    try:
        value = make()
    except Exception as error:  # the library refuses it itself
        value = error
    return call


def _resumed(value: Any) -> Call:
    from d2o_fast import D2OConfig, D2OTrainer
    from d2o_fast.data.reading import read_rows

    config = D2OConfig(**yaml.safe_load(Path("c.yaml").read_text()))
    return lambda: D2OTrainer("model", config, read_rows("rows.jsonl")).train(resume_from_checkpoint=value)


def _opened(value: Any) -> Call:
    from d2o_fast import AnchorStore

    return lambda: AnchorStore.open(value)


# --- The losses --------------------------------------------------------------------------------------------------

#: the arguments of the losses with faults; the first word of a name is the argument
_COMMON: dict[str, Callable[[dict[str, Any]], Any]] = {
    "hidden of a row less": lambda a: a.update(hidden=a["hidden"][:-1]),
    "hidden of another width": lambda a: a.update(hidden=a["hidden"][:, :-1]),
    "hidden of three axes": lambda a: a.update(hidden=a["hidden"][None]),
    "hidden of integers": lambda a: a.update(hidden=a["hidden"].long()),
    "hidden as a list": lambda a: a.update(hidden=a["hidden"].tolist()),
    "hidden on meta": lambda a: a.update(hidden=a["hidden"].to("meta")),
    "weight of another width": lambda a: a.update(weight=a["weight"][:, 1:]),
    "weight of one axis": lambda a: a.update(weight=a["weight"][0]),
    "weight as None": lambda a: a.update(weight=None),
    "weight without rows": lambda a: a.update(weight=a["weight"][:0]),
    "targets beyond the vocabulary": lambda a: a["targets"].__setitem__(0, 10**6),
    "targets below 0": lambda a: a["targets"].__setitem__(1, -5),
    "targets of floats": lambda a: a.update(targets=a["targets"].float()),
    "targets of a row more": lambda a: a.update(targets=torch.cat([a["targets"], a["targets"][:1]])),
    "targets as a list": lambda a: a.update(targets=a["targets"].tolist()),
    "bias of another length": lambda a: a.update(bias=torch.zeros(3)),
    "softcap below 0": lambda a: a.update(softcap=-3.0),
    "softcap of text": lambda a: a.update(softcap="x"),
    "logit_scale of NaN": lambda a: a.update(logit_scale=float("nan")),
}
_D2O: dict[str, Callable[[dict[str, Any]], Any]] = {
    "layout as None": lambda a: a.update(layout=None),
    "layout as lengths": lambda a: a.update(layout=[[2, 3]]),
    "ref_logps of a response less": lambda a: a.update(ref_logps=a["ref_logps"][:-1]),
    "ref_logps of integers": lambda a: a.update(ref_logps=a["ref_logps"].long()),
    "ref_logps as a number": lambda a: a.update(ref_logps=-3.0),
    "alpha of NaN": lambda a: a.update(alpha=float("nan")),
    "beta of text": lambda a: a.update(beta="0.1"),
    "beta of inf": lambda a: a.update(beta=float("inf")),
}
LOSSES = {"fused_d2o_loss": _COMMON | _D2O, "linear_logprob": _COMMON}
LAYOUTS: dict[str, Any] = {
    "a response of no tokens": [[2, 0]],
    "a length below 0": [[2, -3]],
    "no prompts": [],
    "no responses": [[]],
    "texts": [["a"]],
    "a flat list": [2, 3],
    "fractions": [[2.5, 1]],
    "a number": 5,
    "None": None,
    "2^40 tokens": [[2**40, 2]],
}


def _loss(function: str, change: Callable[[dict[str, Any]], Any]) -> Call:
    import d2o_fast

    layout = d2o_fast.ResponseLayout.from_lengths([[2, 3], [4, 1, 1]])
    torch.manual_seed(0)
    arguments = {"hidden": torch.randn(layout.num_tokens, 8), "weight": torch.randn(30, 8)}
    arguments["targets"] = torch.randint(30, (layout.num_tokens,))
    if function == "fused_d2o_loss":
        arguments |= {"layout": layout, "ref_logps": torch.full((layout.num_responses,), -9.0)}
        arguments |= {"alpha": 0.1, "beta": 0.1}
    change(arguments)
    return lambda: getattr(d2o_fast, function)(**arguments)


def _layout(value: Any) -> Call:
    from d2o_fast import ResponseLayout

    return lambda: ResponseLayout.from_lengths(value)

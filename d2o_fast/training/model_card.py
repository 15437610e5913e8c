"""The README.md of a trained model: its data, references, settings and metrics, and how to load it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import yaml

from d2o_fast.anchors.filters import settings_text
from d2o_fast.config import D2OConfig
from d2o_fast.software import versions
from d2o_fast.training.checkpoint import TrainerState

MARK = "aligned from negative samples only with D2O"  #: in every card
_PACKAGES = ("d2o-fast", "torch", "transformers", "peft", "tokenizers")


def model_card(
    config: D2OConfig,
    state: TrainerState,
    data: Mapping[str, str],
    is_adapter: bool,
    path: str,
    attention: str,
    references: str,
) -> str:
    """The card's text.

    Args:
        data: descriptions of the "train" and "eval" data; "eval" may be missing.
        path: the path that computed the loss.
        attention: the attention in training, in words.
        references: the models that scored, in words.
    """
    name = public_path(config.model_name_or_path) or "a model built in code"
    header: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers", "tags": ["d2o", "alignment"]}
    if config.model_name_or_path and name == config.model_name_or_path:
        header["base_model"] = name
    compute = "fp32" if config.dtype == "float32" else "bf16 compute over fp32 master weights"
    unit = "epochs" if config.refresh_strategy == "epoch" else "steps"
    trained = "an adapter (`adapter_config.json`)" if is_adapter else "all weights, stored in fp32"
    rows = {
        "Base model": code(name),
        "Trained": trained,
        "Training data": data["train"],
        "Held-out data": data.get("eval", "none"),
        "Anchors": f"sampled from the base model at temperature {config.temperature:g}, top_p {config.top_p:g}, seed "
        f"{config.sampling_seed}, where the data brought none of their own"
        + (f"; filtered: {filters}" if (filters := settings_text(config)) else "")
        + (f"; drawn under the instruction {code(config.sampling_instruction)}" if config.sampling_instruction else "")
        + (f"; drawn anew from the policy every {config.refresh_every} {unit}" if config.refresh_every else ""),
        "References": f"{references}; scored once, before training"
        + ("; anchors drawn anew: the policy that drew them" if config.refresh_every else ""),
        "Loss": f"D2O, alpha = {config.alpha:g}, beta = {config.beta:g}, anchor_weight = {config.anchor_weight:g}"
        + (" (an addition to the paper's loss)" if config.anchor_weight else ""),
        "Optimisation": f"AdamW, learning rate {config.learning_rate:g}, {config.lr_scheduler_type} schedule, "
        f"{state.global_step} steps ({state.epoch:.2f} epochs), {config.per_device_train_batch_size} x "
        f"{config.gradient_accumulation_steps} prompts a step, {state.num_tokens:,} tokens (prompts counted once per "
        f"response), {compute}",
        "Loss path": path,
        "Attention": attention,
        "Software": ", ".join(f"{package} {number}" for package, number in versions(*_PACKAGES).items()),
    }
    metrics = {key: value for key, value in state.metrics.items() if key not in ("tokens_per_second", "epoch")}
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {code(os.path.basename(os.path.abspath(config.output_dir)))}",
        f"{code(name)} {MARK} (*Distributional Dispreference Optimization*, "
        "arXiv 2403.03419): trained away from rejected responses, held in place by responses of its own.",
        "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        "## Metrics at the end\n\n| metric | value |\n|---|---|\n"
        + "\n".join(f"| {key} | {value:.6g} |" for key, value in metrics.items()),
        f"## Loading\n\n```python\n{_loading(is_adapter)}\n```",
        "All settings are in `d2o_config.yaml`. The metrics on the way are in `metrics.jsonl` where the model was "
        "trained. Whether it is harmless enough for a use was not judged here beyond what is stated above.",
    ]
    return "\n\n".join(parts) + "\n"


def code(text: str) -> str:
    """A user's text as a code span for any place of the card, without line breaks or markup."""
    plain = "".join(c if c.isprintable() else " " for c in text.replace("`", "'"))
    return f"`{' '.join(plain.split()).replace('|', chr(92) + '|')}`"


def public_path(path: str) -> str:
    """A hub name, or a path below the working folder, as it is; only the last part of another local path."""
    if not (os.path.isabs(os.path.expanduser(path)) or path.startswith("..")):
        return path
    inside = os.path.relpath(os.path.expanduser(path))
    return os.path.basename(os.path.normpath(path)) if inside.startswith("..") else inside


def public_settings(config: D2OConfig) -> dict[str, Any]:
    """All settings, with each path as ``public_path`` shows it: they go where the model goes."""
    settings = dataclasses.asdict(config)
    for name, value in settings.items():
        if isinstance(value, str) and name != "sampling_instruction":
            settings[name] = public_path(value)
        elif isinstance(value, list):
            settings[name] = [public_path(item) if isinstance(item, str) else item for item in value]
    return settings


def _loading(is_adapter: bool) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # where this file lies',
    ]
    if is_adapter:
        lines.insert(0, "from peft import PeftConfig, PeftModel")
        lines += [
            "base = PeftConfig.from_pretrained(folder).base_model_name_or_path",
            "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)",
        ]
    else:
        lines += ["model = AutoModelForCausalLM.from_pretrained(folder)"]
    return "\n".join([*lines, "tokenizer = AutoTokenizer.from_pretrained(folder)"])

"""All settings of a run. ``d2o sample``, ``d2o train`` and ``d2o eval`` read them from the same YAML file.

The metadata of a field holds its help and its rules. Checks, ``--help``, resumed runs and fingerprints use them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from d2o_fast.checks import (
    MISFIT,
    PLAIN,
    hidden,
    is_address,
    is_blank,
    is_confidential,
    is_variable,
    limits,
    local_path,
    read,
    setting,
    words,
)
from d2o_fast.errors import D2OError, UnknownSettingError, refusal, shown

logger = logging.getLogger("d2o_fast")

Class = TypeVar("Class", bound=type)


def _by_name(cls: Class) -> Class:
    """A class whose settings are given by name. An unknown one is answered with the nearest."""
    init = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **settings: Any) -> None:
        if args:
            example = f"D2OConfig(output_dir={args[0]!r})" if isinstance(args[0], str) else "D2OConfig(alpha=0.1)"
            raise UnknownSettingError(f"D2OConfig takes settings by name, e.g. {example}")
        for name in settings:
            if name not in self.__dataclass_fields__:
                raise UnknownSettingError(f"D2OConfig has no setting '{name}'{instead(name, list(FIELDS))}")
        init(self, **settings)

    cls.__init__ = checked_init  # type: ignore[misc]
    return cls


@_by_name
@dataclass(kw_only=True)
class D2OConfig:
    """Settings with the names of TRL and transformers. ``K`` is ``num_generations``.

    A step takes ``per_device_train_batch_size * gradient_accumulation_steps`` prompts. ``shared_prefix``,
    ``tokens_per_micro_batch`` and ``gradient_checkpointing`` change results only by rounding. A prompt that is longer
    than ``tokens_per_micro_batch`` with its responses is a micro-batch of its own.

    ``alpha``, ``beta`` and ``num_generations`` default to the paper's values. The paper does not state the learning
    rate, schedule, lengths and batch sizes; these defaults are our choices.

    A value is checked when it is set, now or later. Rules for two settings are checked here, and again by the trainer.
    ``~`` in a path is expanded.

    Raises:
        D2OError: a value has another type or is outside its range, a name is unknown, or two settings contradict each
            other.
    """

    # Model
    model_name_or_path: str = setting("", "local folder or hub name of a causal language model", path="model")
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "compute dtype; master weights are fp32 either way", fixed=True, fingerprint=True
    )
    attn_implementation: str | None = setting(
        None, 'passed to transformers, e.g. "sdpa" or "flash_attention_2"', rounds=True
    )
    shared_prefix: Literal["auto"] | bool = setting(
        "auto", "one pass per prompt for all its responses; auto: if it is exact", rounds=True
    )
    use_liger_kernel: bool = setting(False, "liger-kernel's RMSNorm, RoPE and SwiGLU (CUDA only)", rounds=True)
    chat_template_path: str | None = setting(None, "a Jinja file that replaces the tokenizer's template", path="file")

    # Data
    dataset_name: str | list[str] | None = setting(
        None, ".jsonl, .json or .parquet file, pattern, hub name, or a list of them", path="any"
    )
    dataset_config: str | None = setting(None, "configuration of a hub data set", needs="dataset_name")
    dataset_split: str = setting("train", "split of a hub data set", needs="dataset_name")
    eval_dataset_name: str | list[str] | None = setting(None, "held-out data in the same forms", path="any")
    eval_fraction: float = setting(
        0.0, "share of the prompts held out when there is no eval_dataset_name", min=0, below=1
    )
    max_length: int = setting(1024, "most tokens of prompt + response", min=2, fingerprint=True)
    max_completion_length: int = setting(
        256, "most tokens of a response; longer ones are cut at the end", min=1, fingerprint=True
    )
    truncation_mode: Literal["keep_start", "keep_end"] = setting(
        "keep_start",
        "the part to keep of a prompt and a response longer than max_length; keep_start: the response loses its end; "
        "keep_end: the prompt loses its start, beyond max_length - max_completion_length tokens",
        fingerprint=True,
    )

    # Anchors and references
    anchors_dir: str | None = setting(
        None, "folder of anchors and reference scores; <output_dir>/anchors if not given", path="folder"
    )
    num_generations: int = setting(11, "K, anchors per prompt", min=1, fingerprint=True)
    temperature: float = setting(
        1.0, "temperature of the draws; 1: the model's own distribution", above=0, fingerprint=True
    )
    top_p: float = setting(
        1.0, "draws come from the likeliest tokens of this total probability", above=0, max=1, fingerprint=True
    )
    sampling_seed: int = setting(
        0, "seed of the draws: anchors and judged responses", min=0, fingerprint=True, below=2**63
    )
    sampling_batch_size: int = setting(
        16, "prompts per shard; a shard is drawn and scored together", min=1, fingerprint=True
    )
    sampling_instruction: str | None = setting(
        None, "a system message, or a text with {prompt}, used only to draw anchors", fingerprint=True
    )
    server_url: str | None = setting(
        None,
        "server that draws the anchors (vLLM, SGLang)",
        form=is_address,
        wanted="an address like 'http://localhost:8000/v1', without user, password, query or fragment "
        "(server_api_key_env is for an API key)",
        shows=PLAIN,
    )
    server_model: str | None = setting(
        None, "the server's name for the model; model_name_or_path if not given", needs="server_url"
    )
    server_api_key_env: str | None = setting(
        None,
        "environment variable with the server's API key, which is sent to server_url alone and written nowhere",
        needs="server_url",
        form=is_variable,
        wanted="the name of an environment variable, not the key itself",
        shows="",
    )
    server_concurrency: int = setting(16, "prompts at the server at a time", min=1, needs="server_url")
    server_timeout: float = setting(600.0, "most seconds for one request", above=0, max=1e6, needs="server_url")
    ref_model_neg: str | None = setting(
        None,
        "folder or hub name of the reference that scores anchors (pi_r-); the initial model if not given",
        path="model",
    )
    ref_model_pos: str | None = setting(None, "the same for negatives (pi_r+)", path="model")

    # Filters of draws; all are off by default
    num_draws: int | None = setting(
        None,
        "responses drawn per prompt, of which at most K are kept; K if not given",
        min=1,
        fingerprint=True,
        filter=True,
    )
    drop_anchors: list[Literal["duplicate", "empty", "truncated"]] = setting(
        [],
        "kinds of anchors to drop; duplicate: repeats an earlier one, empty: only a stop token, truncated: without one",
        fingerprint=True,
        filter=True,
    )
    max_anchor_overlap: float | None = setting(
        None,
        "largest overlap with the negative: tokens in common over tokens in either",
        min=0,
        below=1,
        fingerprint=True,
        filter=True,
    )
    anchor_score: str | None = setting(
        None,
        '"package.module:function" or a sequence classifier; higher is better',
        fingerprint=True,
        filter=True,
        path="any",
    )
    min_anchor_score: float | None = setting(
        None, "anchors with a lower score are dropped", needs="anchor_score", fingerprint=True, filter=True
    )

    # Online
    refresh_every: int = setting(
        0, "period after which the policy draws new anchors and becomes their reference; 0: never", min=0, fixed=True
    )
    refresh_strategy: Literal["steps", "epoch"] = setting(
        "steps", "the unit of refresh_every", fixed=True, needs="refresh_every"
    )

    # Loss
    alpha: float = setting(0.1, "weight of the negative", min=0, fixed=True)
    beta: float = setting(0.1, "weight of the anchors", min=0, fixed=True)
    anchor_weight: float = setting(0.0, "lambda of the ungated anchor term; 0 is the paper's loss", min=0, fixed=True)

    # Training
    output_dir: str = setting("runs/d2o", "folder of the trained model, checkpoints and logs", path="folder")
    learning_rate: float = setting(1e-6, "learning rate of AdamW after the warm-up", min=0, fixed=True)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = setting(
        "linear", "schedule of the learning rate after the warm-up", fixed=True
    )
    warmup_steps: float = setting(
        0.1, "steps over which the learning rate rises from 0; below 1: a share of all steps", min=0, fixed=True
    )
    warmup_ratio: float | None = setting(None, "older name of warmup_steps as a share", min=0, max=1, fixed=True)
    weight_decay: float = setting(0.0, "weight decay of AdamW, only on matrices", min=0, fixed=True)
    adam_beta1: float = setting(0.9, "decay of AdamW's mean of gradients", min=0, below=1, fixed=True)
    adam_beta2: float = setting(0.999, "decay of AdamW's mean of their squares", min=0, below=1, fixed=True)
    adam_epsilon: float = setting(1e-8, "added to AdamW's denominator", above=0, fixed=True)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0: no clipping", min=0, fixed=True)
    num_train_epochs: float = setting(1.0, "passes over the prompts", fixed=True)
    max_steps: int = setting(
        -1, "number of steps, in place of num_train_epochs; -1: use num_train_epochs", min=-1, fixed=True
    )
    per_device_train_batch_size: int = setting(
        4, "prompts per micro-batch, each with its K + 1 responses", min=1, fixed=True
    )
    per_device_eval_batch_size: int = setting(4, "prompts per batch in evaluation", min=1)
    gradient_accumulation_steps: int = setting(1, "micro-batches per step", min=1, fixed=True)
    tokens_per_micro_batch: int | None = setting(
        None, "most tokens per micro-batch, in place of per_device_train_batch_size prompts", min=1, rounds=True
    )
    disable_dropout: bool = setting(
        True, "train without the model's own dropout, which its references do not have either", fixed=True
    )
    gradient_checkpointing: bool = setting(False, "compute activations twice to keep fewer in memory", rounds=True)
    on_bad_step: Literal["stop", "skip"] = setting(
        "stop", "a step whose loss or gradient is not finite; skip: it changes nothing"
    )
    max_bad_steps: int = setting(10, "most steps to skip before the run stops", min=1)
    seed: int = setting(42, "seed of the order of prompts and of dropout", min=0, fixed=True, below=2**63)

    # LoRA
    use_peft: bool = setting(False, "train a LoRA adapter instead of all weights", fixed=True)
    lora_r: int = setting(16, "rank of the adapter", min=1, needs="use_peft", fixed=True)
    lora_alpha: int = setting(32, "scale of the adapter, over its rank", min=1, needs="use_peft", fixed=True)
    lora_dropout: float = setting(0.0, "dropout before the adapter", min=0, below=1, needs="use_peft", fixed=True)
    lora_target_modules: str | list[str] | None = setting(
        None, "modules with an adapter; peft's default for the architecture if not given", needs="use_peft", fixed=True
    )

    # Evaluation, logging, checkpoints
    eval_steps: int = setting(0, "steps between evaluations; 0: only one at the end", min=0)
    judge: str | None = setting(
        None, '"package.module:function" with judge(prompt, response) -> label (str) or score (float)'
    )
    judge_num_generations: int = setting(1, "responses drawn per held-out prompt for the judge", min=1)
    judge_max_prompts: int = setting(256, "most held-out prompts for the judge", min=1)
    logging_steps: int = setting(1, "steps between two lines of metrics", min=1)
    save_steps: int = setting(500, "steps between checkpoints", min=1)
    save_total_limit: int | None = setting(None, "newest checkpoints to keep; all if not given", min=1)
    resume_from_checkpoint: str | None = setting(
        None,
        'a checkpoint folder, "latest", or "auto": the latest, or a fresh start where there is none',
        path="any",
    )
    report_to: str | list[str] = setting([], '"tensorboard" or "none"; metrics.jsonl is always written')

    @property
    def draws(self) -> int:
        """Responses drawn per prompt: ``num_draws``, or K."""
        return self.num_generations if self.num_draws is None else self.num_draws

    def warmup(self, num_steps: int) -> int:
        """Steps of the warm-up in a run of ``num_steps``."""
        if self.warmup_ratio is None and self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil((self.warmup_steps if self.warmup_ratio is None else self.warmup_ratio) * num_steps)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIELDS:
            value = checked(name, value)
        elif name not in self.__dataclass_fields__:  # a subclass may have more
            raise UnknownSettingError(f"D2OConfig has no setting '{name}'{instead(name, list(FIELDS))}")
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises a D2OError if a setting does not fit, alone or beside the others."""
        for name in FIELDS:
            setattr(self, name, getattr(self, name))
        for name, needed in having("needs").items():
            if getattr(self, name) != DEFAULTS[name] and not getattr(self, needed):
                raise _refusal(name, getattr(self, name), f"left out, or {needed} set: it would decide nothing")
        for fits, name, wanted in self._relations():
            if not fits:
                raise _refusal(name, getattr(self, name), wanted)

    def _relations(self) -> list[tuple[bool, str, str]]:
        """(whether the rule holds, the setting to name, its allowed values) of every rule for two settings."""
        epochs = self.max_steps == -1
        share = self.warmup_steps < 1 or float(self.warmup_steps).is_integer()
        one = self.warmup_ratio in (None, self.warmup_steps) or self.warmup_steps == DEFAULTS["warmup_steps"]
        decides = self.anchor_score is None or self.min_anchor_score is not None or self.draws > self.num_generations
        anchors_stay = not self.refresh_every
        return [
            (
                self.eval_dataset_name is None or self.eval_fraction == 0,
                "eval_fraction",
                "0 where eval_dataset_name is set: held-out data come from one of them",
            ),
            (self.alpha + self.beta > 0, "alpha", "above 0 where beta is 0"),
            (
                self.max_completion_length < self.max_length,
                "max_completion_length",
                f"less than max_length ({self.max_length}), which also holds the prompt",
            ),
            (
                self.draws >= self.num_generations,
                "num_draws",
                f"at least num_generations ({self.num_generations}), or nothing",
            ),
            (
                decides,
                "anchor_score",
                "beside min_anchor_score, or num_draws above num_generations: it would decide nothing",
            ),
            (
                anchors_stay or self.server_url is None,
                "refresh_every",
                "0 while server_url is set: the server has the initial weights and not those of the policy in training",
            ),
            (
                self.server_url is None or self.server_api_key_env is None or is_confidential(self.server_url),
                "server_url",
                "an https address, or one of this machine, while server_api_key_env is set: over plain http others can "
                "read the key",
            ),
            (
                anchors_stay or self.ref_model_neg is None,
                "refresh_every",
                "0 while ref_model_neg is set: the policy that draws new anchors is their reference",
            ),
            (self.max_steps != 0, "max_steps", "an integer >= 1, or -1 to count num_train_epochs"),
            (not epochs or self.num_train_epochs > 0, "num_train_epochs", "a number > 0, unless max_steps is set"),
            (share, "warmup_steps", "a whole number of steps, or their share in [0, 1)"),
            (one, "warmup_ratio", f"left out where warmup_steps ({self.warmup_steps}) is set: it is its older name"),
        ]


FIELDS = {found.name: found for found in dataclasses.fields(D2OConfig)}
KINDS = get_type_hints(D2OConfig)
DEFAULTS: dict[str, Any] = {
    name: found.default if found.default_factory is dataclasses.MISSING else found.default_factory()
    for name, found in FIELDS.items()
}
#: settings of older versions, each with its replacement
RENAMED = {
    "drop_duplicate_anchors": "write 'drop_anchors: [duplicate]'",
    "drop_empty_anchors": "write 'drop_anchors: [empty]'",
    "drop_truncated_anchors": "write 'drop_anchors: [truncated]'",
    "ref_model": "write 'ref_model_neg' and 'ref_model_pos'",
    "sampling_engine": "leave it out: transformers' generate draws, or the server at server_url",
}


def having(rule: str) -> dict[str, Any]:
    """The settings with ``rule`` in their metadata, and its value."""
    return {name: found.metadata[rule] for name, found in FIELDS.items() if rule in found.metadata}


def fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``settings`` that a resumed run keeps, in one form for all versions that wrote them."""
    needs = having("needs")
    decides = {name for name in settings if name not in needs or settings.get(needs[name])}
    found = {name: settings[name] for name in having("fixed") if name in decides}
    if found.get("max_steps") == 0:
        found["max_steps"] = -1
    ratio = found.pop("warmup_ratio", None)
    if ratio is not None:
        found["warmup_steps"] = ratio if ratio < 1 else "all"
    return found


def checked(name: str, value: object) -> Any:
    """``value`` as the setting ``name`` keeps it.

    Raises:
        D2OError: the value has another type, is outside the range, not finite, or an empty text.
    """
    if name == "report_to" and value is None:
        return []
    rules = FIELDS[name].metadata
    found = read(value, KINDS[name], rules)
    if found is MISFIT or (is_blank(found) and found != DEFAULTS[name]):
        raise _refusal(name, value, limits(value, allowed(name)))
    if "path" in rules and found:
        paths = [local_path(name, text, rules["path"]) for text in _listed(found)]
        return paths if isinstance(found, list) else paths[0]
    return _loggers(found) if name == "report_to" else found


def _refusal(name: str, found: object, wanted: str) -> D2OError:
    """``refusal``, which shows no value that may be a secret."""
    shows = FIELDS[name].metadata.get("shows")
    instead = None if shows is None else hidden(found, shows)
    return refusal(name, found, wanted) if instead is None else D2OError(f"{name} is {instead}; it must be {wanted}")


def allowed(name: str) -> str:
    """The values that a setting takes, in words."""
    return words(KINDS[name], FIELDS[name].metadata)


def instead(name: str, names: Sequence[str], prefix: str = "") -> str:
    """The end of a message: the replacement of an old ``name``, or the nearest of ``names``; may be empty."""
    if name in RENAMED:
        return f", a name of older versions; {RENAMED[name]}"
    near = difflib.get_close_matches(name[:100], names, n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{near[0]}'?" if near else ""


def in_use(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` without those that need another one that is switched off in them, as in ``use_peft: false``.

    A flag can so switch off a part of a file. The log names the settings that are left out.
    """
    judge, evaluation = ("judge_num_generations", "judge_max_prompts"), ("eval_dataset_name", "eval_fraction")
    needs = having("needs") | dict.fromkeys(judge, "judge")
    idle = {name: needs[name] for name in settings if not settings.get(needs.get(name, ""), True)}
    given = [name for name in evaluation if name in settings]
    if given and not any(settings[name] for name in given):
        idle |= {name: given[0] for name in ("eval_steps", "judge", *judge) if name in settings}
    for name, needed in idle.items():
        if settings[name] != DEFAULTS[name]:
            logger.info("%s is not used: %s is %s", name, needed, shown(settings[needed]))
    return {name: value for name, value in settings.items() if name not in idle}


def refuse_idle(
    config: D2OConfig, held_out: bool, peft_config: bool = False, stores: Sequence[str] | None = None
) -> None:
    """Refuses settings that would decide nothing beside the other arguments of a trainer.

    Args:
        held_out: whether there are held-out data.
        peft_config: whether the adapter's configuration is given as an object.
        stores: the folders of the data's stores of anchors; None if some data are no store.

    Raises:
        D2OError: a setting is given and decides nothing.
    """
    no_data = "where there are no held-out data: set eval_dataset_name or eval_fraction, or give eval_dataset"
    anchors = Path(config.anchors_dir or "").resolve()
    of_stores = [Path(folder).resolve() for folder in stores or ()]
    elsewhere = stores is not None and not any(folder.is_relative_to(anchors) for folder in of_stores)
    situations: list[tuple[bool, str, tuple[str, ...]]] = [
        (not held_out, "or its rows given as eval_dataset", ("eval_fraction", "eval_dataset_name")),
        (not held_out, no_data, ("eval_steps", "judge")),
        (config.judge is None, "where judge is not set", ("judge_num_generations", "judge_max_prompts")),
        (peft_config, "where peft_config is given", tuple(name for name in FIELDS if name.startswith("lora_"))),
        (elsewhere, "where all data are stores of anchors from elsewhere", ("anchors_dir",)),
    ]
    for holds, where, names in situations:
        for name in names:
            if holds and getattr(config, name) != DEFAULTS[name]:
                raise refusal(name, getattr(config, name), f"left out {where}")


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def _loggers(value: str | list[str]) -> list[str]:
    """``report_to`` as a list. "none" gives an empty list, as in transformers."""
    names = [value] if isinstance(value, str) else value
    if names == ["none"]:
        return []
    if any(name != "tensorboard" for name in names):
        raise refusal("report_to", value, "'tensorboard' or 'none' (metrics.jsonl is always written)")
    return names

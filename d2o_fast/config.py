"""Every setting of a run, in one place: the same YAML file serves ``d2o sample``, ``d2o train`` and ``d2o eval``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from d2o_fast.errors import D2OError

_POSITIVE = (
    "max_length",
    "max_completion_length",
    "num_generations",
    "sampling_batch_size",
    "server_concurrency",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "judge_num_generations",
    "judge_max_prompts",
    "logging_steps",
    "save_steps",
    "lora_r",
    "lora_alpha",
)


@dataclass
class D2OConfig:
    """Settings under the names that TRL and transformers use. ``K`` is ``num_generations``.

    A step takes ``per_device_train_batch_size * gradient_accumulation_steps`` prompts. How they go through the model
    (``shared_prefix``, ``tokens_per_micro_batch``, ``gradient_checkpointing``) changes results in their rounding alone.
    A prompt longer than ``tokens_per_micro_batch``, its responses included, goes alone.

    ``alpha``, ``beta`` and ``num_generations`` default to the paper's values; the learning rate, schedule, lengths and
    batch sizes were not stated there and are our choices.
    """

    # Model
    model_name_or_path: str = ""  #: local folder or hub name of a causal language model
    dtype: Literal["float32", "bfloat16"] = "float32"  #: compute dtype; master weights are fp32 either way
    attn_implementation: str | None = None  #: passed to transformers, e.g. "sdpa" or "flash_attention_2"
    shared_prefix: Literal["auto"] | bool = (
        "auto"  #: one pass per prompt for all its responses; auto: where it is exact
    )
    use_liger_kernel: bool = False  #: liger-kernel's RMSNorm, RoPE and SwiGLU (CUDA only)
    chat_template_path: str | None = None  #: a Jinja file that replaces the tokenizer's template

    # Data
    dataset_name: str | list[str] | None = None  #: .jsonl, .json or .parquet file, pattern, hub name, or a list of them
    dataset_split: str = "train"  #: split of a hub data set
    eval_dataset_name: str | list[str] | None = None  #: held-out data in the same forms
    eval_fraction: float = 0.0  #: share of the prompts held out when there is no eval_dataset_name
    max_length: int = 1024  #: tokens of prompt + response
    max_completion_length: int = 256  #: tokens of a response; longer ones lose their end
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"  #: which side of a long prompt stays

    # Anchors and references
    anchors_dir: str | None = None  #: where anchors and reference scores are kept; <output_dir>/anchors if not given
    num_generations: int = 11  #: K, anchors per prompt
    temperature: float = 1.0
    top_p: float = 1.0
    sampling_seed: int = 0  #: seeds the anchors and nothing else
    sampling_batch_size: int = 16  #: prompts per shard, each of which is drawn and scored together
    sampling_engine: Literal["generate", "continuous"] = "generate"  #: transformers' generate, or continuous batching
    sampling_instruction: str | None = None  #: a system message or a text with {prompt}, only while anchors are drawn
    server_url: str | None = None  #: anchors are drawn there over HTTP (vLLM, SGLang), e.g. http://localhost:8000/v1
    server_model: str | None = None  #: name under which the server serves it; model_name_or_path if not given
    server_concurrency: int = 16  #: prompts under way at a time
    server_timeout: float = 600.0  #: seconds for one request
    ref_model: str | None = None  #: folder or hub name of the reference that scores; the initial model if not given
    ref_model_neg: str | None = None  #: the same for anchors alone: pi_r-
    ref_model_pos: str | None = None  #: the same for negatives alone: pi_r+

    # Which draws become anchors (all of them, if nothing is set here)
    num_draws: int | None = None  #: responses drawn per prompt, of which K at most are kept; K if not given
    drop_duplicate_anchors: bool = False  #: of equal ones the first stays
    drop_empty_anchors: bool = False  #: those that are a stop token alone
    drop_truncated_anchors: bool = False  #: those that ended by their length
    max_anchor_overlap: float | None = None  #: most tokens in common with the negative, over the tokens in either
    anchor_score: str | None = None  #: "package.module:function" or a sequence classifier; higher is better
    min_anchor_score: float | None = None  #: anchors with a lower score are dropped

    # Online
    refresh_every: int = 0  #: anchors are drawn anew from the policy, their new reference, so often; 0: they stay
    refresh_strategy: Literal["steps", "epoch"] = "steps"  #: what refresh_every counts

    # Loss
    alpha: float = 0.1  #: weight of the negative
    beta: float = 0.1  #: weight of the anchors
    anchor_weight: float = 0.0  #: lambda of the ungated anchor term; 0 is the paper's loss

    # Training
    output_dir: str = "runs/d2o"
    learning_rate: float = 1e-6
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.1  #: share of all steps
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    num_train_epochs: float = 1.0
    max_steps: int = -1  #: overrides num_train_epochs when positive
    per_device_train_batch_size: int = 4  #: prompts per micro-batch, each with its K + 1 responses
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    tokens_per_micro_batch: int | None = None  #: most tokens at once, in place of per_device_train_batch_size prompts
    gradient_checkpointing: bool = False
    seed: int = 42  #: order of the prompts and dropout

    # LoRA
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None  #: peft's default for the architecture if not given

    # Evaluation, logging, checkpoints
    eval_steps: int = 0  #: 0 evaluates at the end only
    judge: str | None = None  #: "package.module:function" with judge(prompt, response) -> label (str) or score (float)
    judge_num_generations: int = 1  #: responses drawn per held-out prompt for the judge
    judge_max_prompts: int = 256
    logging_steps: int = 1
    save_steps: int = 500
    save_total_limit: int | None = None
    resume_from_checkpoint: str | None = None  #: a checkpoint folder, or "latest"
    report_to: list[str] = field(default_factory=list)  #: "tensorboard"; metrics.jsonl is always written

    @property
    def draws(self) -> int:
        """Responses drawn per prompt: ``num_draws``, or K."""
        return self.num_generations if self.num_draws is None else self.num_draws

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "anchor_weight", "learning_rate", "weight_decay", "max_grad_norm"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        for name in _POSITIVE:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        _require(self.alpha + self.beta > 0, "alpha and beta", (self.alpha, self.beta), "not both 0")
        _require(self.temperature > 0, "temperature", self.temperature, "a number > 0")
        _require(
            self.server_model is None or self.server_url is not None,
            "server_url",
            self.server_url,
            "where the server listens, since server_model is set",
        )
        _require(self.refresh_every >= 0, "refresh_every", self.refresh_every, "an integer >= 0")
        _require(
            not self.refresh_every or self.server_url is None,
            "refresh_every",
            self.refresh_every,
            "0 while server_url is set: the server has the initial weights and not those of the policy in training",
        )
        _require(self.server_timeout > 0, "server_timeout", self.server_timeout, "a number > 0")
        _require(self.sampling_instruction != "", "sampling_instruction", "", "a text, or nothing")
        _require(
            self.num_draws is None or self.num_draws >= self.num_generations,
            "num_draws",
            self.num_draws,
            f"at least num_generations ({self.num_generations}), or nothing",
        )
        _require(
            self.max_anchor_overlap is None or 0 <= self.max_anchor_overlap < 1,
            "max_anchor_overlap",
            self.max_anchor_overlap,
            "a share in [0, 1), or nothing",
        )
        _require(
            self.min_anchor_score is None or (self.anchor_score is not None and math.isfinite(self.min_anchor_score)),
            "min_anchor_score",
            self.min_anchor_score,
            "a finite number beside anchor_score, or nothing",
        )
        _require(
            self.anchor_score is None or self.min_anchor_score is not None or self.draws > self.num_generations,
            "anchor_score",
            self.anchor_score,
            "beside min_anchor_score, or num_draws above num_generations: it would decide nothing",
        )
        for name in ("ref_model", "ref_model_neg", "ref_model_pos"):
            _require(getattr(self, name) != "", name, "", "a folder, a hub name, or left out")
        _require(
            self.ref_model is None or (self.ref_model_neg is None and self.ref_model_pos is None),
            "ref_model",
            self.ref_model,
            "left out where ref_model_neg or ref_model_pos is set (it stands for both)",
        )
        _require(
            not self.refresh_every or (self.ref_model is None and self.ref_model_neg is None),
            "refresh_every",
            self.refresh_every,
            "0 while ref_model or ref_model_neg is set: the policy that draws anchors anew is their reference",
        )
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        _require(0 <= self.warmup_ratio <= 1, "warmup_ratio", self.warmup_ratio, "a share in [0, 1]")
        _require(0 <= self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "a share in [0, 1)")
        _require(
            self.max_completion_length < self.max_length,
            "max_completion_length",
            self.max_completion_length,
            f"less than max_length ({self.max_length}), which also holds the prompt",
        )
        _require(
            self.save_total_limit is None or self.save_total_limit >= 1,
            "save_total_limit",
            self.save_total_limit,
            "an integer >= 1, or nothing",
        )
        _require(
            self.tokens_per_micro_batch is None or self.tokens_per_micro_batch >= 1,
            "tokens_per_micro_batch",
            self.tokens_per_micro_batch,
            "an integer >= 1, or nothing",
        )
        unknown = set(self.report_to) - {"tensorboard"}
        _require(not unknown, "report_to", sorted(unknown), "'tensorboard' (metrics.jsonl is always written)")


def _require(condition: bool, name: str, found: object, wanted: str) -> None:
    if not condition:
        raise D2OError(f"{name} is {found!r}; it must be {wanted}")

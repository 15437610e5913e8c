"""The parts of a training step: the loss of a batch, the optimizer and its schedule.

Shapes: N response tokens, H hidden, S responses, G prompts, K anchors of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Example
from d2o_fast.forward.batch import pack, pack_shared, response_hidden
from d2o_fast.loss.engine import Head
from d2o_fast.loss.layout import ResponseLayout
from d2o_fast.loss.ops import fused_d2o_loss
from d2o_fast.loss.reference import D2OOutput
from d2o_fast.model.parts import autocast


def batch_loss(
    decoder: nn.Module,
    head: Head,
    examples: Sequence[Example],
    pad: int,
    config: D2OConfig,
    num_prompts: int,
    shared: bool = False,
) -> tuple[D2OOutput, ResponseLayout]:
    """D2O of ``examples`` (the sum of their losses divided by ``num_prompts``), and the layout of their S responses.

    Args:
        shared: read each prompt once for all its responses; ``forward/sharing.py`` decides for which models.
    """
    device = head.weight.device
    batch = (pack_shared(examples) if shared else pack(examples, pad)).to(device)
    with autocast(config, device):
        hidden = response_hidden(decoder, batch)
    out = fused_d2o_loss(
        hidden,
        head.weight,
        batch.targets,
        batch.layout,
        batch.ref_logps,
        alpha=config.alpha,
        beta=config.beta,
        anchor_weight=config.anchor_weight,
        num_prompts=num_prompts,
        **head.options(),
    )
    return out, batch.layout


def schedule(step: int, num_steps: int, kind: str, warmup: int) -> float:
    """Factor on the learning rate at ``step`` (from 0) with ``warmup`` steps, as in transformers' schedulers."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, num_steps - warmup)
    if kind == "linear":
        return max(0.0, 1.0 - progress)
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return 1.0


def adamw(model: nn.Module, config: D2OConfig) -> torch.optim.AdamW:
    """AdamW over all parameters that require a gradient. Weight decay applies to matrices, not to norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )

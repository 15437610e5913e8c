"""The conditions under which anchors and reference scores were made, as a dict of named fields.

The fields are: weights, configuration and adapter of the initial model and of both references, the rows, the tokenizer,
truncation, the compute dtype, and how anchors are drawn and filtered. They identify content, so a folder may be moved
or renamed. They leave out settings of training (seed, learning rate, output folder) and settings that change scores
only by rounding (attention implementation, batch sizes of training, fused kernels, device).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from d2o_fast.anchors.references import References
from d2o_fast.anchors.scorers import FunctionScorer, load_scorer
from d2o_fast.anchors.shards import FORMAT
from d2o_fast.config import D2OConfig, having
from d2o_fast.data.on_disk import rows_digest
from d2o_fast.data.row import Row
from d2o_fast.data.tokens import stop_token_ids
from d2o_fast.model.identity import config_digest, digest, tokenizer_digest, weights_digest
from d2o_fast.model.parts import base_of

#: kinds of `drop_anchors`; each has its own field, as in stores of older versions
_DROPPED = ("duplicate", "empty", "truncated")


def expected_fingerprint(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    config: D2OConfig,
    references: References | None = None,
) -> dict[str, Any]:
    """The fields under which anchors and scores of ``rows`` are valid.

    Args:
        model: the initial model, before its first step.
        references: the references of ``config``; made here if not given.

    Raises:
        D2OError: a reference or the scorer cannot be loaded, or a reference's tokenizer differs.
    """
    references = references or References(model, tokenizer, config)
    settings = {name: getattr(config, name) for name in having("fingerprint")}
    dropped = settings.pop("drop_anchors")
    chat = any(not isinstance(row.prompt, str) for row in rows)
    return {
        "format": FORMAT,
        **references.fingerprint(),
        "rows": rows_digest(rows),
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": digest(tokenizer.chat_template) if chat else None,
        "stop_token_ids": stop_token_ids(tokenizer, base_of(model), rows),
        # a server may return draws as text
        "sampler": "generate" if config.server_url is None else "server",
        **settings,
        **{f"drop_{kind}_anchors": kind in dropped for kind in _DROPPED},
        "num_draws": None if config.draws == config.num_generations else config.draws,
        "anchor_score": None if config.anchor_score is None else _scorer(config.anchor_score),
    }


def fingerprint_digest(fingerprint: dict[str, Any]) -> str:
    """The SHA-256 of all fields, as JSON."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def _scorer(name: str) -> dict[str, Any]:
    scorer = load_scorer(name, torch.device("cpu"))
    if isinstance(scorer, FunctionScorer):
        source = scorer.source()
        return {"function": name, "source": None if source is None else digest(source)}
    return {
        "classifier": type(scorer.model).__name__,
        "weights": weights_digest(scorer.model),
        "model_config": config_digest(scorer.model.config),
        "tokenizer": tokenizer_digest(scorer.tokenizer),
        "chat_template": digest(scorer.tokenizer.chat_template),
    }

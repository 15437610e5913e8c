"""d2o-fast: align a language model from negative samples only (D2O, arXiv 2403.03419)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from d2o_fast.loss.layout import ResponseLayout
from d2o_fast.loss.ops import fused_d2o_loss, fused_margin_loss, linear_logprob
from d2o_fast.loss.reference import D2OOutput, Margin, d2o_loss

if TYPE_CHECKING:
    from d2o_fast.anchors.build import build_store
    from d2o_fast.anchors.store import AnchorStore
    from d2o_fast.config import D2OConfig
    from d2o_fast.training.trainer import D2OTrainer

__version__ = "0.1.0"
__all__ = [
    "AnchorStore",
    "D2OConfig",
    "D2OOutput",
    "D2OTrainer",
    "Margin",
    "ResponseLayout",
    "build_store",
    "d2o_loss",
    "fused_d2o_loss",
    "fused_margin_loss",
    "linear_logprob",
]

_LAZY = {  # slow to import: they load transformers
    "AnchorStore": "d2o_fast.anchors.store",
    "D2OConfig": "d2o_fast.config",
    "D2OTrainer": "d2o_fast.training.trainer",
    "build_store": "d2o_fast.anchors.build",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'd2o_fast' has no attribute '{name}'")

"""Small anchor stores, and the log-probabilities that they must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from d2o_fast.anchors.build import build_store
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.config import D2OConfig
from d2o_fast.data.reading import rows_from
from tiny import tiny_model, tiny_rows, tiny_tokenizer

CONFIG = D2OConfig(
    max_length=64, max_completion_length=12, num_generations=3, sampling_batch_size=4, temperature=1.0, sampling_seed=5
)
CHAT_ROW = {
    "prompt": [{"role": "user", "content": "how?", "name": "né"}],
    "rejected": [{"role": "assistant", "content": "go away"}],
    "anchors": [[{"role": "assistant", "content": "it"}], [{"role": "assistant", "content": "the lock"}]],
}


def build(
    folder: Any, records: Any = None, model: Any = None, config: D2OConfig = CONFIG, **options: Any
) -> AnchorStore:
    chat = options.pop("chat", False)
    rows = rows_from(tiny_rows(10) if records is None else records, "memory")
    return build_store(model or tiny_model(chat=chat), tiny_tokenizer(chat), rows, config, folder, **options)


def contents(folder: Any) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def naive_logp(model: Any, prompt: list[int], response: list[int]) -> float:
    """The response's log-probability from the model's own full logits, one sequence at a time."""
    with torch.no_grad():
        logps = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return sum(float(logps[len(prompt) + t - 1, token]) for t, token in enumerate(response))

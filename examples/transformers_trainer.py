"""The fused D2O loss inside a ``transformers.Trainer``, for users with their own training set-up.

    python examples/transformers_trainer.py MODEL DATA.jsonl OUTPUT

DATA has the columns ``prompt`` and ``rejected``; anchors and reference scores are made first, under OUTPUT/anchors.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from d2o_fast import D2OConfig, fused_d2o_loss
from d2o_fast.anchors.build import build_store
from d2o_fast.data.reading import read_rows
from d2o_fast.data.row import Example
from d2o_fast.forward.batch import pack, response_hidden
from d2o_fast.model.loading import load_model, load_tokenizer
from d2o_fast.model.parts import decoder_of, head_of, pad_token_id


class D2OLossTrainer(Trainer):
    """A Trainer whose batches are ``{"examples": list[Example]}`` and whose loss is D2O's."""

    def __init__(self, *args: Any, alpha: float = 0.1, beta: float = 0.1, pad: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=lambda examples: {"examples": examples}, **kwargs)
        self.alpha, self.beta, self.pad = alpha, beta, pad
        self.head, self.decoder = head_of(self.model), decoder_of(self.model)
        self.model_accepts_loss_kwargs = True  # passes num_items_in_batch on; the loss is not divided again

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, int]:
        """The micro-batches of one update, and the number of their prompts."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        return batches, sum(len(batch["examples"]) for batch in batches)

    def compute_loss(
        self, model: Any, inputs: dict[str, list[Example]], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = pack(inputs["examples"], self.pad).to(self.args.device)
        out = fused_d2o_loss(
            response_hidden(self.decoder, batch),
            self.head.weight,
            batch.targets,
            batch.layout,
            batch.ref_logps,
            alpha=self.alpha,
            beta=self.beta,
            num_prompts=num_items_in_batch,
            **self.head.options(),
        )
        return (out.loss, out) if return_outputs else out.loss


def main(model_name: str, data: str, output_dir: str, **settings: Any) -> D2OLossTrainer:
    config = D2OConfig(model_name_or_path=model_name, num_generations=4, max_length=128, max_completion_length=32)
    model, tokenizer = load_model(config), load_tokenizer(config)
    store = build_store(model, tokenizer, read_rows(data), config, f"{output_dir}/anchors")
    arguments = TrainingArguments(output_dir, remove_unused_columns=False, report_to=[], **settings)
    trainer = D2OLossTrainer(model, arguments, train_dataset=store.examples(), pad=pad_token_id(tokenizer))
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])

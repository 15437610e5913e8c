"""Anchors for rows that have none: K responses that the model writes itself, in this process or on a server.

K anchors of one prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedTokenizerBase

from d2o_fast.batching import Example
from d2o_fast.config import D2OConfig
from d2o_fast.data import Row
from d2o_fast.models import autocast, base_of, pad_token_id
from d2o_fast.sampling import sample_responses
from d2o_fast.server import Sampling, ServerPrompt, ServerSampler
from d2o_fast.tokens import encode_rows, tokenize_drawn


class Drawer:
    """Draws the anchors of one shard at a time."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: D2OConfig, stops: Sequence[int]
    ) -> None:
        self.model, self.tokenizer, self.config, self.stops = model, tokenizer, config, list(stops)
        self.pad = pad_token_id(tokenizer)
        self.server: ServerSampler | None = None
        if config.server_url is not None:
            name = config.server_model or config.model_name_or_path
            self.server = ServerSampler(config.server_url, name, config.server_concurrency, config.server_timeout)

    def with_anchors(self, shard: int | str, rows: Sequence[Row], examples: Sequence[Example]) -> list[Example]:
        """The examples of one shard; those without anchors get K of them.

        Raises:
            D2OError: fewer responses than asked for, or a server that cannot be sampled from.
        """
        wanted = [i for i, example in enumerate(examples) if not example.anchor_ids]
        if self.server is None:
            drawn = self._drawn_here(shard, [examples[i] for i in wanted])
        else:
            assert isinstance(shard, int)
            drawn = self._drawn_there(self.server, shard, [rows[i] for i in wanted], [examples[i] for i in wanted])
        filled = list(examples)
        for i, anchors in zip(wanted, drawn, strict=True):
            filled[i] = replace(examples[i], anchor_ids=anchors)
        return filled

    def _drawn_here(self, shard: int | str, examples: Sequence[Example]) -> list[list[list[int]]]:
        config, base = self.config, base_of(self.model)
        with autocast(config, base.device):
            return sample_responses(
                base,
                [example.prompt_ids for example in examples],
                config.num_generations,
                max_new_tokens=config.max_completion_length,
                temperature=config.temperature,
                top_p=config.top_p,
                eos_token_ids=self.stops,
                pad_token_id=self.pad,
                seed=_shard_seed(config.sampling_seed, shard),
            )

    def _drawn_there(
        self, server: ServerSampler, shard: int, rows: Sequence[Row], examples: Sequence[Example]
    ) -> list[list[list[int]]]:
        config = self.config
        prompts = []
        for row, example, (whole, *_) in zip(rows, examples, encode_rows(rows, self.tokenizer), strict=True):
            cut = whole != example.prompt_ids
            place = f"{row.source}, row {row.index}" + (", cut to max_length and so sent as token ids" if cut else "")
            prompts.append(ServerPrompt(example.prompt_ids if cut else row.prompt, len(example.prompt_ids), place))
        how = Sampling(
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            eos_token_ids=tuple(self.stops),
            seed=(config.sampling_seed, shard),
        )
        draws = server.sample(prompts, config.num_generations, how)
        texts = [[(draw.text, draw.ended) for draw in of_prompt] for of_prompt in draws]
        return tokenize_drawn(rows, texts, self.tokenizer, config, self.stops)


def _shard_seed(sampling_seed: int, shard: int | str) -> int:
    # A hash, since neighbouring seeds of neighbouring runs must not share shards.
    return int.from_bytes(hashlib.sha256(f"{sampling_seed} {shard}".encode()).digest()[:7], "big")

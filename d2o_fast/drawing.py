"""Anchors for rows that have none: responses that the model writes itself, in this process or on a server.

How many of the draws are kept, and which: ``filters.py``.

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
from d2o_fast.filters import AnchorFilter
from d2o_fast.models import autocast, base_of, pad_token_id
from d2o_fast.sampling import sample_responses
from d2o_fast.server import Sampling, ServerPrompt, ServerSampler
from d2o_fast.tokens import encode_rows, tokenize_drawn

#: What decides draws together with ``sampling_seed``: ``(shard,)`` of a store, ``("refresh", step, batch)`` later on.
Seed = tuple[int | str, ...]


class Drawer:
    """Draws the anchors of one shard at a time, and filters them.

    Raises:
        D2OError: a server's settings that cannot be right; a scorer that cannot be loaded.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: D2OConfig, stops: Sequence[int]
    ) -> None:
        self.model, self.tokenizer, self.config, self.stops = model, tokenizer, config, list(stops)
        self.pad = pad_token_id(tokenizer)
        self.server: ServerSampler | None = None
        if config.server_url is not None:
            name = config.server_model or config.model_name_or_path
            self.server = ServerSampler(config.server_url, name, config.server_concurrency, config.server_timeout)
        self.filter = AnchorFilter(tokenizer, config, stops, base_of(model).device)

    def with_anchors(
        self, seed: Seed, rows: Sequence[Row], examples: Sequence[Example]
    ) -> tuple[list[Example], list[list[str]]]:
        """The examples, those without anchors with the ones that were drawn for them and kept: K, fewer, or none.

        Of each, too, why the others of its draws were dropped (``filters.REASONS``).

        Raises:
            D2OError: fewer responses than asked for, a server that cannot be sampled from, a score that is not finite.
        """
        wanted = [i for i, example in enumerate(examples) if not example.anchor_ids]
        wanted_rows, wanted_examples = [rows[i] for i in wanted], [examples[i] for i in wanted]
        if self.server is None:
            drawn = self._drawn_here(seed, wanted_examples)
        else:
            drawn = self._drawn_there(self.server, seed, wanted_rows, wanted_examples)
        filled, dropped = list(examples), [list[str]() for _ in examples]
        for i, filtered in zip(wanted, self.filter(wanted_rows, wanted_examples, drawn), strict=True):
            filled[i], dropped[i] = replace(examples[i], anchor_ids=filtered.anchors), filtered.dropped
        return filled, dropped

    def _drawn_here(self, seed: Seed, examples: Sequence[Example]) -> list[list[list[int]]]:
        config, base = self.config, base_of(self.model)
        with autocast(config, base.device):
            return sample_responses(
                base,
                [example.prompt_ids for example in examples],
                config.draws,
                max_new_tokens=config.max_completion_length,
                temperature=config.temperature,
                top_p=config.top_p,
                eos_token_ids=self.stops,
                pad_token_id=self.pad,
                seed=draw_seed(config.sampling_seed, *seed),
            )

    def _drawn_there(
        self, server: ServerSampler, seed: Seed, rows: Sequence[Row], examples: Sequence[Example]
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
            seed=(config.sampling_seed, *seed),
        )
        draws = server.sample(prompts, config.draws, how)
        texts = [[(draw.text, draw.ended) for draw in of_prompt] for of_prompt in draws]
        return tokenize_drawn(rows, texts, self.tokenizer, config, self.stops)


def draw_seed(*parts: int | str) -> int:
    """56 bits of a hash, since neighbouring seeds of neighbouring runs must not share shards."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:7], "big")

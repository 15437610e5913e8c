"""Draws anchors from the model, in this process or on a server, for rows that have none.

``anchors/filters.py`` decides which draws are kept. With ``sampling_instruction`` the model also reads an instruction
while it draws. The anchors then follow the bare prompt, as any response does.

K anchors of one prompt.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedTokenizerBase

from d2o_fast.anchors.filters import AnchorFilter
from d2o_fast.anchors.instruction import instructed
from d2o_fast.anchors.scoring import token_logps
from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Example, Row
from d2o_fast.data.tokens import encode_prompts, response_room
from d2o_fast.errors import D2OError
from d2o_fast.forward.batch import pack
from d2o_fast.model.parts import autocast, base_of, decoder_of, pad_token_id, vocabulary_size
from d2o_fast.sampling.generate import sample_responses
from d2o_fast.sampling.protocol import Sampling, ServerPrompt, tokenize_drawn
from d2o_fast.sampling.server import ServerSampler

logger = logging.getLogger("d2o_fast")

#: A server's log-probabilities may differ from the initial model's, on average over the tokens of four draws, by
#: OTHER_WEIGHTS times their standard deviation over tokens or by ROUNDING nats, whichever is larger. Rounding errors
#: are smaller (docs/anchors.md).
OTHER_WEIGHTS, ROUNDING = 0.1, 0.02

#: Seeds draws together with ``sampling_seed``: ``(shard,)`` for a store, ``("refresh", step, shard)`` for a window.
Seed = tuple[int | str, ...]


class Drawer:
    """Draws the anchors of one shard at a time, and filters them.

    Raises:
        D2OError: the server's settings are invalid; the scorer cannot be loaded.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: D2OConfig, stops: Sequence[int]
    ) -> None:
        self.model, self.tokenizer, self.config, self.stops = model, tokenizer, config, list(stops)
        self.pad = pad_token_id(tokenizer)
        self.server: ServerSampler | None = None
        self._weights_checked = False
        if config.server_url is not None:
            name = config.server_model or config.model_name_or_path
            self.server = ServerSampler(
                config.server_url,
                name,
                config.server_concurrency,
                config.server_timeout,
                key_variable=config.server_api_key_env,
                vocabulary=vocabulary_size(model),
            )
        self.filter = AnchorFilter(tokenizer, config, stops, base_of(model).device)

    def with_anchors(
        self, seed: Seed, rows: Sequence[Row], examples: Sequence[Example]
    ) -> tuple[list[Example], list[list[str]]]:
        """The examples; each without anchors gets the kept draws: K, fewer, or none.

        Also returns, per example, why each remaining draw was dropped (``filters.REASONS``).

        Raises:
            D2OError: there are fewer responses than asked for, the server cannot be sampled from or serves another
                model, a score is not finite.
        """
        wanted = [i for i, example in enumerate(examples) if not example.anchor_ids]
        wanted_rows, wanted_examples = [rows[i] for i in wanted], [examples[i] for i in wanted]
        if self.server is None:
            drawn = self._draw_in_process(seed, wanted_rows, wanted_examples)
        else:
            drawn = self._draw_on_server(self.server, seed, wanted_rows, wanted_examples)
        rooms = [response_room(example.prompt_ids, self.config) for example in wanted_examples]
        drawn = [[ids[:room] for ids in responses] for room, responses in zip(rooms, drawn, strict=True)]
        filled, dropped = list(examples), [list[str]() for _ in examples]
        for i, filtered in zip(wanted, self.filter(wanted_rows, wanted_examples, drawn), strict=True):
            filled[i], dropped[i] = replace(examples[i], anchor_ids=filtered.anchors), filtered.dropped
        return filled, dropped

    def _draw_in_process(self, seed: Seed, rows: Sequence[Row], examples: Sequence[Example]) -> list[list[list[int]]]:
        config, base = self.config, base_of(self.model)
        prompts = [example.prompt_ids for example in examples]
        if config.sampling_instruction is not None:
            prompts = [ids for _, ids in instructed(rows, self.tokenizer, config)]
        with autocast(config, base.device):
            return sample_responses(
                base,
                prompts,
                config.draws,
                max_new_tokens=config.max_completion_length,
                temperature=config.temperature,
                top_p=config.top_p,
                eos_token_ids=self.stops,
                pad_token_id=self.pad,
                seed=draw_seed(config.sampling_seed, *seed),
            )

    def _draw_on_server(
        self, server: ServerSampler, seed: Seed, rows: Sequence[Row], examples: Sequence[Example]
    ) -> list[list[list[int]]]:
        config = self.config
        if config.sampling_instruction is not None:
            read = instructed(rows, self.tokenizer, config)
            prompts = [ServerPrompt(row.prompt, ids, f"{row.source}, row {row.index}") for row, ids in read]
        else:
            prompts = list(self._server_prompts(rows, examples))
        how = Sampling(
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            eos_token_ids=tuple(self.stops),
            seed=(config.sampling_seed, *seed),
        )
        if prompts and not self._weights_checked:
            self._refuse_other_weights(server, prompts[0], how)
            self._weights_checked = True
        return tokenize_drawn(rows, server.sample(prompts, config.draws, how), self.tokenizer, config, self.stops)

    def _server_prompts(self, rows: Sequence[Row], examples: Sequence[Example]) -> Iterator[ServerPrompt]:
        for row, example, whole in zip(rows, examples, encode_prompts(rows, self.tokenizer), strict=True):
            cut = whole != example.prompt_ids
            place = f"{row.source}, row {row.index}" + (", cut to max_length and so sent as token ids" if cut else "")
            yield ServerPrompt(example.prompt_ids if cut else row.prompt, example.prompt_ids, place)

    def _refuse_other_weights(self, server: ServerSampler, prompt: ServerPrompt, how: Sampling) -> None:
        """Compares the server's log-probabilities of four draws with the initial model's, if it returns them.

        Raises:
            D2OError: the server has other weights.
        """
        draws = server.scored(prompt, how)
        if not draws:
            logger.info("%s tells no log-probabilities of tokens: its weights are not checked", server.url)
            return
        first, *others = [list(draw.token_ids or ()) for draw in draws]
        batch = pack([Example(prompt.token_ids, first, others, [])], self.pad).to(base_of(self.model).device)
        here = token_logps(decoder_of(self.model), self.model, batch, self.config).tolist()
        there = [logp for draw in draws for logp in draw.logps or ()]
        apart = statistics.fmean(abs(a - b) for a, b in zip(here, there, strict=True))
        limit = max(OTHER_WEIGHTS * statistics.pstdev(here), ROUNDING)
        found = f"{len(here)} tokens have log-probabilities {apart:.2g} nats from ours on average, and {limit:.2g}"
        logger.info("%s: %s would be too far", server.url, found)
        if not apart <= limit:
            other = f"{server.url} serves another model than the initial one as '{server.model}'"
            raise D2OError(f"{other}: {found} is the most. Serve model_name_or_path itself")


def draw_seed(*parts: int | str) -> int:
    """56 bits of a hash of ``parts``, so that runs with neighbouring seeds share no draws."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:7], "big")

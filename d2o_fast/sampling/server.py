"""Responses drawn by a server that speaks OpenAI's HTTP API (vLLM, SGLang, ``transformers serve``).

Plain prompts go to ``/v1/completions`` as text, and messages go to ``/v1/chat/completions``. A prompt that was cut goes
to ``/v1/completions`` as token ids, because the model must not see its whole text. Every sampling parameter is
explicit, because servers fill missing ones from the model's ``generation_config``.

If a server returns the drawn token ids, they are the anchor. If it returns only text, ``tokenize_drawn`` makes the ids.

A prompt's K draws are requested at once (``n``). Missing ones (``transformers serve`` ignores ``n``) are requested one
by one. Transient faults (a refused connection, a time-out, 429, 5xx, half an answer) are retried with the same seed.
Any other fault raises D2OError, and so does the last attempt's. So every prompt gets K responses.
``sampling/post.py`` sends a request, and ``sampling/protocol.py`` checks every value of an answer that is used.

The seed of a request comes from sampling_seed, shard, row and draw. The server decides whether the same seed gives the
same text. ``transformers serve`` seeds one generator for all its requests, so its texts repeat only if
``server_concurrency`` is 1. The batches of vLLM and SGLang change logits in their last bits.

K: responses of one prompt.
"""

from __future__ import annotations

import logging
import socket
import threading
import urllib.request
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from d2o_fast.config import D2OConfig
from d2o_fast.errors import D2OError, shortened
from d2o_fast.sampling.post import Fault, cut, post, read_key
from d2o_fast.sampling.protocol import (
    FORMS,
    Draw,
    RequestForm,
    Sampling,
    ServerPrompt,
    parse,
    request_seed,
)

logger = logging.getLogger("d2o_fast")

ATTEMPTS = 8  #: attempts of one request; with the delays below a server may be away for about a minute
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  #: seconds before the second attempt, then doubled up to the longest

OTHER_FORM = (400, 422)  #: HTTP statuses after which another form of request may succeed


class _Refused(D2OError):
    """An HTTP status that a retry would not change."""

    def __init__(self, fault: Fault, place: str) -> None:
        super().__init__(f"{place} ({fault.found}). {fault.advice}")
        self.status, self.found = fault.status, fault.found


class ServerSampler:
    """One server and one model on it.

    Args:
        url: the server's address, with or without the trailing ``/v1``.
        model: the name under which it serves the initial model.
        concurrency: number of prompts under way at a time.
        timeout: seconds for one request, from the connection to the last byte.
        key_variable: the environment variable that holds the API key; it is read at each request and never kept.
        vocabulary: number of token ids of the model.

    Raises:
        D2OError: the address or the key cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        concurrency: int,
        timeout: float,
        *,
        key_variable: str | None = None,
        vocabulary: int = 2**31,
    ) -> None:
        D2OConfig(server_url=url, server_api_key_env=key_variable)  # checks them
        read_key(key_variable)
        if not model:
            raise D2OError("server_model is not set: give the name under which the server serves the initial model")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.model, self.concurrency, self.timeout = model, concurrency, timeout
        self.key_variable, self.vocabulary = key_variable, vocabulary
        self._form: RequestForm | None = None  # the form of request that the server accepts, once it is known
        self._tells_ids = False
        self._stop = threading.Event()
        self._under_way: set[socket.socket] = set()

    def sample(self, prompts: Sequence[ServerPrompt], num: int, sampling: Sampling) -> list[list[Draw]]:
        """K = ``num`` draws for every prompt, in the order of ``prompts``.

        Raises:
            D2OError: the server cannot be reached, refuses, does not sample, reads a prompt as other tokens, cuts a
                response, or repeatedly answers with something other than responses.
        """
        if not prompts:
            return []
        form = self._known_form(prompts[0], sampling)
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="d2o-server")
        try:
            futures = [pool.submit(self._draws, p, num, row, sampling, form) for row, p in enumerate(prompts)]
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in futures if future.done() and future.exception()]
            draws = [future.result() for future in failed or futures]
        finally:  # after a fault of one prompt, or Ctrl-C, the others end
            self._stop.set()
            for connection in tuple(self._under_way):
                cut(connection)
            pool.shutdown(wait=True, cancel_futures=True)
        for prompt, of_prompt in zip(prompts, draws, strict=True):
            self._refuse_cut(prompt, of_prompt, sampling.max_new_tokens)
        return draws

    def _refuse_cut(self, prompt: ServerPrompt, draws: Sequence[Draw], length: int) -> None:
        """Raises D2OError if the context cut a response. vLLM ends a response early instead of refusing the request."""
        for draw in draws:
            if draw.token_ids is not None and not draw.ended and len(draw.token_ids) < length:
                raise D2OError(
                    f"{self.url} ends a response to {prompt.place} by its length after {len(draw.token_ids)} tokens, "
                    f"and {length} were asked for: its context is shorter than max_length. Serve the model with room "
                    "for prompt and response (vLLM: --max-model-len)"
                )

    def scored(self, prompt: ServerPrompt, sampling: Sampling) -> list[Draw] | None:
        """Four draws of up to 16 tokens at temperature 1, with the server's log-probabilities.

        Draws without tokens are left out. Returns None if the server returns no token ids or no log-probabilities.

        Raises:
            D2OError: as ``sample``.
        """
        form = self._known_form(prompt, sampling)
        if not self._tells_ids:
            return None
        plain = replace(sampling, max_new_tokens=16, temperature=1.0, top_p=1.0)
        try:
            # Ids go to the path on which every server puts the log-probabilities in the same place.
            ids = replace(prompt, content=prompt.token_ids)
            draws = self._draws(ids, 4, -2, plain, lambda how: {**form(how), "logprobs": 1})
        except _Refused as refusal:
            if refusal.status not in (*OTHER_FORM, 404):  # 404: it serves only chats
                raise
            return None
        draws = [draw for draw in draws if draw.token_ids]  # some servers leave out a stop token that came first
        return draws if all(d.logps is not None and len(d.logps) == len(d.token_ids or ()) for d in draws) else None

    def _known_form(self, prompt: ServerPrompt, sampling: Sampling) -> RequestForm:
        self._stop.clear()
        if self._form is None:
            self._form = self._probe(prompt, sampling)
        return self._form

    def _probe(self, prompt: ServerPrompt, sampling: Sampling) -> RequestForm:
        """Finds the form of request that the server accepts, and proves that the server samples.

        Four draws of up to 16 tokens at temperature 2 must differ. They do not if the server decodes greedily, or gives
        one seed to all n choices of a request.
        """
        hot = replace(sampling, max_new_tokens=16, temperature=2.0, top_p=1.0)
        refusals = []
        for form in FORMS:
            try:
                draws = self._draws(prompt, 4, -1, hot, form)
            except _Refused as refusal:
                if refusal.status not in OTHER_FORM:
                    raise
                refusals.append(refusal.found)
                continue
            if len({(draw.text, draw.token_ids) for draw in draws}) == 1:
                text = shortened(draws[0].text, 200, one_line=True)
                raise D2OError(
                    f"{self.url}: four draws at temperature 2 gave the same text ({text!r}), so model "
                    f"'{self.model}' is not sampled there, or all choices of a request share one seed. Anchors must be "
                    "draws from the model: serve it with sampling on"
                )
            self._tells_ids = draws[0].token_ids is not None
            told = "the tokens come back" if self._tells_ids else "text alone comes back, and is tokenised here"
            logger.info("%s: samples model '%s'; %s; %s", self.url, self.model, form.__doc__, told)
            return form
        raise D2OError(
            f"{self.url} refuses requests for {prompt.place} ({' | '.join(dict.fromkeys(refusals))}). Check server_url "
            "and server_model, and that the server takes top_k or generation_config"
        )

    # --- One request -------------------------------------------------------------------------------------------------

    def _draws(self, prompt: ServerPrompt, num: int, row: int, sampling: Sampling, form: RequestForm) -> list[Draw]:
        draws: list[Draw] = []
        while len(draws) < num:  # every turn adds at least one
            n, seed = 1 if draws else num, request_seed(*sampling.seed, row, len(draws))
            body = {"model": self.model, **prompt.field(), "stream": False, "seed": seed}
            body |= {"max_tokens": sampling.max_new_tokens, **form(sampling), **({"n": n} if n > 1 else {})}
            draws += self._request(prompt, n, body)
        return draws

    def _request(self, prompt: ServerPrompt, n: int, body: dict[str, Any]) -> list[Draw]:
        """Between 1 and ``n`` draws. Retries after a transient fault."""
        url = self.url + prompt.path
        for attempt in range(ATTEMPTS):
            result = self._attempt(url, prompt, n, body)
            if not isinstance(result, Fault):
                return result
            if result.advice and result.status != 200:
                raise _Refused(result, f"{url} refuses {prompt.place}")
            found = f"{url}, {prompt.place}: {result.found}"
            if result.advice:
                raise D2OError(f"{found}. {result.advice}")
            found += f" (attempt {attempt + 1} of {ATTEMPTS})"
            if not self._stop.is_set():
                logger.warning(found)
            delay = max(min(FIRST_DELAY * 2**attempt, LONGEST_DELAY), result.after)
            if attempt + 1 == ATTEMPTS or self._stop.wait(delay):
                raise D2OError(
                    f"{found}. Check that the server runs (server_url, server_timeout {self.timeout:g} s"
                    f"{_proxies()}) and look at its log; then start again: finished shards are kept"
                )
        raise AssertionError("unreachable")

    def _attempt(self, url: str, prompt: ServerPrompt, n: int, body: dict[str, Any]) -> list[Draw] | Fault:
        # A Fault is returned and not raised: no traceback reaches the frames that hold the key.
        key = read_key(self.key_variable)
        limit = (4 << 20) + n * (body["max_tokens"] * 1024 + len(prompt.token_ids) * 32)  # bytes, ample
        try:
            draws = parse(post(url, body, self.timeout, key, limit, self._under_way), prompt, n, self.vocabulary)
            if self._tells_ids and draws[0].token_ids is None:
                raise Fault("an answer without the tokens, which this server told before")
            return draws
        except Fault as fault:
            return fault.without(key)


def _proxies() -> str:
    return (
        "; proxies of the environment are not used" if {"http", "https", "all"} & {*urllib.request.getproxies()} else ""
    )

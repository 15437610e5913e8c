"""Responses drawn by a server that speaks OpenAI's HTTP API (vLLM, SGLang, ``transformers serve``).

Plain prompts go to ``/v1/completions`` as text, and messages go to ``/v1/chat/completions``. A prompt that was cut goes
to ``/v1/completions`` as token ids, because the model must not see its whole text. Every sampling parameter is
explicit, because servers fill missing ones from the model's ``generation_config``.

If a server returns the drawn token ids, they are the anchor. If it returns only text, ``tokenize_drawn`` makes the ids.

A prompt's K draws are requested at once (``n``). Missing ones (``transformers serve`` ignores ``n``) are requested one
by one. Transient failures (a refused connection, a time-out, 429, 5xx, half an answer) are retried with the same seed.
Any other failure raises D2OError, and so does the last attempt's. So every prompt gets K responses.

The seed of a request comes from sampling_seed, shard, row and draw. The server decides whether the same seed gives the
same text. ``transformers serve`` seeds one generator for all its requests, so its texts repeat only if
``server_concurrency`` is 1. The batches of vLLM and SGLang change logits in their last bits.

K: responses of one prompt.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from d2o_fast.errors import D2OError, shortened
from d2o_fast.sampling.protocol import (
    FORMS,
    Draw,
    RequestForm,
    Sampling,
    ServerPrompt,
    TransientError,
    parse,
    request_seed,
)

logger = logging.getLogger("d2o_fast")

ATTEMPTS = 8  #: attempts of one request; with the delays below a server may be away for about a minute
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  #: seconds before the second attempt, then doubled up to the longest
MAX_ANSWER = 64 << 20  #: bytes

RETRYABLE = (408, 429, 500, 502, 503, 504)  #: HTTP statuses after which a retry may succeed
OTHER_FORM = (400, 422)  #: HTTP statuses after which another form of request may succeed


class _Refused(D2OError):
    """An HTTP status that a retry would not change."""

    def __init__(self, status: int, found: str, place: str) -> None:
        super().__init__(f"{place} ({found}). Check server_url, server_model and the server's log")
        self.status, self.found = status, found


class ServerSampler:
    """One server and one model on it.

    Args:
        url: the server's address, with or without the trailing ``/v1``.
        model: the name under which it serves the initial model.
        concurrency: number of prompts under way at a time.
        timeout: seconds for one request, from the connection to the last byte.
    """

    def __init__(self, url: str, model: str, concurrency: int, timeout: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise D2OError(f"server_url is {url!r}; it must be like 'http://localhost:8000/v1'")
        if not model:
            raise D2OError("server_model is not set: give the name under which the server serves the initial model")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.model, self.concurrency, self.timeout = model, concurrency, timeout
        self._form: RequestForm | None = None  # the form of request that the server accepts, once it is known
        self._tells_ids = False
        self._stop = threading.Event()

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
            draws = [future.result() for future in futures]
        finally:  # after a fault of one prompt the others stop waiting
            self._stop.set()
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
        """Between 1 and ``n`` draws. Retries after a TransientError."""
        url = self.url + prompt.path
        for attempt in range(ATTEMPTS):
            try:
                draws = parse(self._post(url, body, prompt.place), prompt, n, self.url)
                if self._tells_ids and draws[0].token_ids is None:
                    raise TransientError("an answer without the tokens, which this server told before")
                return draws
            except TransientError as fault:
                delay = max(min(FIRST_DELAY * 2**attempt, LONGEST_DELAY), fault.after)
                found = f"{url}, {prompt.place}: {fault} (attempt {attempt + 1} of {ATTEMPTS})"
                logger.warning(found)
                if attempt + 1 == ATTEMPTS or self._stop.wait(delay):
                    raise D2OError(
                        f"{found}. Check that the server runs (server_url, server_timeout {self.timeout:g} s) and look "
                        "at its log; then start again: finished shards are kept"
                    ) from fault
        raise AssertionError("unreachable")

    def _post(self, url: str, body: dict[str, Any], place: str) -> Any:
        """Sends ``body`` and returns the parsed JSON answer."""
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        deadline = time.monotonic() + self.timeout
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                data = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                found = f"HTTP {error.code} {error.reason}: {shortened(_error_text(error), 200, one_line=True)}"
            if error.code in RETRYABLE:
                raise TransientError(found, _retry_after(error)) from error
            raise _Refused(error.code, found, f"{url} refuses {place}") from error
        except TimeoutError as error:
            raise TransientError(f"no answer within {self.timeout:g} s") from error
        except urllib.error.URLError as error:
            timed_out = isinstance(error.reason, TimeoutError)
            raise TransientError(f"no answer within {self.timeout:g} s" if timed_out else f"{error.reason}") from error
        except http.client.IncompleteRead as error:
            raise TransientError(f"half an answer ({len(error.partial)} bytes, then the end)") from error
        except (http.client.HTTPException, OSError) as error:
            raise TransientError(f"{type(error).__name__}: {error}") from error
        try:
            return json.loads(data)
        except ValueError as error:
            found = shortened(data[-60:].decode("utf-8", "replace"), 200, one_line=True)
            raise TransientError(f"an answer of {len(data)} bytes that is not JSON, ending in {found!r}") from error


def _read(response: Any, deadline: float) -> bytes:
    # The socket's time-out applies to each read, so a server that sends a byte now and then would never reach it.
    data = bytearray()
    while part := response.read1(1 << 16):
        data += part
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(data) > MAX_ANSWER:
            raise TransientError(f"an answer of more than {MAX_ANSWER >> 20} MiB")
    if response.length:  # bytes that Content-Length promised and that did not come
        raise http.client.IncompleteRead(bytes(data), response.length)
    return bytes(data)


def _error_text(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(1000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as broken:
        return f"(its text cannot be read: {broken})"


def _retry_after(error: urllib.error.HTTPError) -> float:
    seconds = error.headers.get("Retry-After") or ""
    return min(float(seconds), 2 * LONGEST_DELAY) if seconds.isdecimal() else 0.0

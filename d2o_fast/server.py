"""Responses drawn by a server that speaks OpenAI's HTTP API (vLLM, SGLang, ``transformers serve``).

Plain prompts go to ``/v1/completions`` as text, messages to ``/v1/chat/completions``, and a prompt that was cut goes to
``/v1/completions`` as token ids, since its text is not what the model is to see. Every sampling parameter is given
explicitly: servers fill in what is left out from the model's ``generation_config``.

A prompt's K draws are asked for at once (``n``); whatever a server leaves out (``transformers serve`` ignores ``n``) is
asked for one by one. What can pass (a refused connection, a time-out, 429, 5xx, half an answer) is tried again with the
same seed; what remains is an error. There are K responses to every prompt in the end, or there is a D2OError.

The seed of a request is made of sampling_seed, shard, row and draw. Whether the same seed gives the same text is up to
the server: ``transformers serve`` seeds one generator for all its requests, so there it does so with
``server_concurrency`` 1 alone; the batches of vLLM and SGLang change logits in their last bits.

K: responses of one prompt.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from d2o_fast.errors import D2OError

logger = logging.getLogger("d2o_fast")

ATTEMPTS = 8  #: times that one request is made; with the delays below a server may be away for about a minute
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  #: seconds before the second attempt, doubled up to the longest
MAX_ANSWER = 64 << 20  #: bytes

PASSING = (408, 429, 500, 502, 503, 504)  #: HTTP states in which trying again may help


@dataclass(frozen=True)
class ServerPrompt:
    """A prompt as the server gets it, the number of tokens that it must become there, and its place in the data."""

    content: str | list[dict[str, Any]] | list[int]
    num_tokens: int
    place: str


@dataclass(frozen=True)
class Draw:
    """One response: its text without special tokens, and whether a stop token ended it (and not its length)."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Sampling:
    """How to draw; as ``sample_responses`` takes it. ``seed`` is ``sampling_seed`` and what follows it (the shard)."""

    max_new_tokens: int
    temperature: float
    top_p: float
    eos_token_ids: tuple[int, ...]
    seed: tuple[int | str, ...]


class _Passing(Exception):
    """A fault that may be over at the next attempt; ``after``: seconds that the server asks to wait."""

    def __init__(self, found: str, after: float = 0.0) -> None:
        super().__init__(found)
        self.after = after


class _Refused(Exception):
    """An HTTP state that will be the same at the next attempt."""

    def __init__(self, status: int, found: str) -> None:
        super().__init__(found)
        self.status = status


class ServerSampler:
    """One server and one model on it.

    Args:
        url: where the server listens, with or without the trailing ``/v1``.
        model: the name under which it serves the initial model.
        concurrency: prompts that are under way at a time.
        timeout: seconds for one request, from the connection to the last byte.
    """

    def __init__(self, url: str, model: str, concurrency: int, timeout: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise D2OError(f"server_url is {url!r}; it must be like 'http://localhost:8000/v1'")
        if not model:
            raise D2OError("server_model is not set: give the name under which the server serves the initial model")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.model, self.concurrency, self.timeout = model, concurrency, timeout
        self._form: Any = None  # how the server takes sampling parameters, once it is known
        self._stop = threading.Event()

    def sample(self, prompts: Sequence[ServerPrompt], num: int, sampling: Sampling) -> list[list[Draw]]:
        """K = ``num`` draws for every prompt, in the order of ``prompts``.

        Raises:
            D2OError: a server that cannot be reached, refuses, does not sample, reads a prompt as another number of
                tokens, or keeps answering with something else than responses.
        """
        if not prompts:
            return []
        if self._form is None:
            self._form = self._probe(prompts[0], sampling)
        self._stop.clear()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="d2o-server")
        try:
            futures = [pool.submit(self._draws, p, num, row, sampling, self._form) for row, p in enumerate(prompts)]
            return [future.result() for future in futures]
        finally:  # after a fault of one prompt the others need not wait for theirs
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _draws(self, prompt: ServerPrompt, num: int, row: int, sampling: Sampling, form: Any) -> list[Draw]:
        draws: list[Draw] = []
        while len(draws) < num:  # every turn adds at least one
            draws += self._request(prompt, 1 if draws else num, (row, len(draws)), sampling, form)
        return draws

    def _probe(self, prompt: ServerPrompt, sampling: Sampling) -> Any:
        """The form in which the server takes sampling parameters; and the proof that it samples.

        Four draws of up to 16 tokens at temperature 2 must differ. They do not where a server decodes greedily, or
        gives one seed to all n choices of a request.
        """
        hot = Sampling(16, 2.0, 1.0, sampling.eos_token_ids, sampling.seed)
        refusals = []
        for form in (_as_fields, _as_generation_config):
            try:
                draws = self._draws(prompt, 4, -1, hot, form)
            except _Refused as refusal:
                refusals.append(str(refusal))
                continue
            if len({draw.text for draw in draws}) == 1:
                raise D2OError(
                    f"{self.url}: four draws at temperature 2 gave the same text ({_short(draws[0].text)!r}), so model "
                    f"'{self.model}' is not sampled there, or all choices of a request share one seed. Anchors must be "
                    "draws from the model: serve it with sampling on"
                )
            logger.info("%s: samples model '%s'; %s", self.url, self.model, form.__doc__)
            return form
        raise D2OError(
            f"{self.url} refuses requests for {prompt.place} ({' | '.join(refusals)}). Check server_url and "
            "server_model, and that the server takes top_k or generation_config"
        )

    # --- One request -------------------------------------------------------------------------------------------------

    def _request(
        self, prompt: ServerPrompt, n: int, place: tuple[int, int], sampling: Sampling, form: Any
    ) -> list[Draw]:
        """Between 1 and ``n`` draws.

        Raises:
            _Refused: while probing, where another form may do.
        """
        chat = isinstance(prompt.content, list) and isinstance(prompt.content[0], dict)
        path = "/chat/completions" if chat else "/completions"
        seed = request_seed(*sampling.seed, *place)
        body = {"model": self.model, "messages" if chat else "prompt": prompt.content, "stream": False, "seed": seed}
        body |= {"max_tokens": sampling.max_new_tokens, **form(sampling), **({"n": n} if n > 1 else {})}
        for attempt in range(ATTEMPTS):
            try:
                return self._parse(self._post(path, body), prompt, n)
            except _Refused as refusal:
                if self._form is None and refusal.status in (400, 422):
                    raise
                raise D2OError(
                    f"{self.url}{path} refuses {prompt.place} ({refusal}). Check server_url, "
                    "server_model and the server's log"
                ) from refusal
            except _Passing as fault:
                delay = max(min(FIRST_DELAY * 2**attempt, LONGEST_DELAY), fault.after)
                found = f"{self.url}{path}, {prompt.place}: {fault} (attempt {attempt + 1} of {ATTEMPTS})"
                logger.warning(found)
                if attempt + 1 == ATTEMPTS or self._stop.wait(delay):
                    raise D2OError(
                        f"{found}. Check that the server runs (server_url, server_timeout {self.timeout:g} s) and look "
                        "at its log; then start again: finished shards are kept"
                    ) from fault
        raise AssertionError("unreachable")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON object that comes back."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        deadline = time.monotonic() + self.timeout
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                data = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                found = f"HTTP {error.code} {error.reason}: {_short(_error_text(error))}"
            if error.code in PASSING:
                raise _Passing(found, _retry_after(error)) from error
            raise _Refused(error.code, found) from error
        except TimeoutError as error:
            raise _Passing(f"no answer within {self.timeout:g} s") from error
        except urllib.error.URLError as error:
            timed_out = isinstance(error.reason, TimeoutError)
            raise _Passing(f"no answer within {self.timeout:g} s" if timed_out else f"{error.reason}") from error
        except http.client.IncompleteRead as error:
            raise _Passing(f"half an answer ({len(error.partial)} bytes, then the end)") from error
        except (http.client.HTTPException, OSError) as error:
            raise _Passing(f"{type(error).__name__}: {error}") from error
        try:
            return json.loads(data)
        except ValueError as error:
            found = _short(data[-60:].decode("utf-8", "replace"))
            raise _Passing(f"an answer of {len(data)} bytes that is not JSON, ending in {found!r}") from error

    def _parse(self, answer: Any, prompt: ServerPrompt, n: int) -> list[Draw]:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not choices:
            raise _Passing(f"an answer without choices: {_short(json.dumps(answer))}")
        if len(choices) > n:
            raise D2OError(f"{self.url}: {len(choices)} choices to {prompt.place}, where {n} were asked for")
        usage = answer.get("usage")
        read = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if read is not None and read != prompt.num_tokens:
            raise D2OError(
                f"{self.url} reads {prompt.place} as {read} tokens, and here it has {prompt.num_tokens}: the server "
                "has another tokenizer, chat template or habit of adding BOS. Serve model_name_or_path itself"
            )
        return [_draw(choice) for choice in choices]


def request_seed(*parts: int | str) -> int:
    """53 bits, which every JSON reader keeps: of ``sampling_seed``, shard, row within it (-1 for the probe), draw."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 11


def _as_fields(sampling: Sampling) -> dict[str, Any]:
    """sampling parameters go as fields of the request (vLLM, SGLang)"""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,  # the whole vocabulary
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(sampling.eos_token_ids),
    }


def _as_generation_config(sampling: Sampling) -> dict[str, Any]:
    """sampling parameters go as generation_config (transformers serve)"""
    # Fields that are left out would be filled in from the served model's own generation_config.
    settings = {
        "do_sample": True,
        "num_beams": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "min_length": 0,
        "eos_token_id": list(sampling.eos_token_ids),
    }
    return {"generation_config": json.dumps(settings)}


def _draw(choice: Any) -> Draw:
    choice = choice if isinstance(choice, dict) else {}
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    reason = choice.get("finish_reason")
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise _Passing(f"a choice that is no response (finish_reason {reason!r}): {_short(json.dumps(choice))}")
    return Draw(text, reason == "stop")


def _read(response: Any, deadline: float) -> bytes:
    # The socket's time-out is for each read; a server that sends a byte now and then would never run into it.
    data = bytearray()
    while part := response.read1(1 << 16):
        data += part
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(data) > MAX_ANSWER:
            raise _Passing(f"an answer of more than {MAX_ANSWER >> 20} MiB")
    if response.length:  # what Content-Length promised and did not come
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


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."

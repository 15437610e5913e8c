"""Every answer that a server can give is a response or one clear error."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from bad_answers import LASTING, SLOW, TRANSIENT
from d2o_fast.errors import D2OError
from d2o_fast.sampling import server as server_module
from d2o_fast.sampling.protocol import Sampling, ServerPrompt
from d2o_fast.sampling.server import ServerSampler
from raw_server import Answer, RawServer, http, right_answer
from tiny import VOCAB_SIZE, tiny_tokenizer

PROMPT = ServerPrompt("how to open?", tiny_tokenizer()("how to open?")["input_ids"], "here, row 1")
HOW = Sampling(max_new_tokens=6, temperature=1.0, top_p=1.0, eos_token_ids=(2,), seed=(0, 0))


def error_of(answer: Answer, timeout: float = 60.0) -> tuple[str, int]:
    """(the error's text, the number of requests) of sampling from a server that always gives ``answer``."""
    with RawServer(answer) as server:
        one = ServerSampler(server.url, "m", 1, timeout, vocabulary=VOCAB_SIZE)
        with pytest.raises(D2OError) as error:
            one.sample([PROMPT], 3, HOW)
        text = str(error.value)
        assert server.url.removesuffix("/v1") in text
    assert error.value.__cause__ is None
    assert error.value.__context__ is None, "a traceback would show the frames that hold an API key"
    assert "here, row 1" in text
    assert text.isprintable(), "one line, without escape sequences"
    assert len(text) < 900
    return text, len(server.requests)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ATTEMPTS", 2)
    monkeypatch.setattr(server_module, "FIRST_DELAY", 0.001)


@pytest.mark.parametrize("name", LASTING)
def test_a_wrong_answer_is_one_clear_error(name: str) -> None:
    answer, found = LASTING[name]
    text, requests = error_of(answer)
    assert re.search(found, text), text
    assert re.search(r"\. (Check|The server|It has another|It would|Set|Turn|A proxy|server_api)", text), text
    assert requests == (3 if name == "HTTP 400" else 1), "400 asks for another form of request"


@pytest.mark.parametrize("name", TRANSIENT)
def test_what_another_attempt_may_mend_is_tried_again(name: str, caplog: pytest.LogCaptureFixture) -> None:
    answer, found = TRANSIENT[name]
    with caplog.at_level(logging.WARNING, logger="d2o_fast"):
        text, requests = error_of(answer)
    assert re.search(rf"({found}).* .attempt 2 of 2.\. Check that the server runs", text), text
    assert requests == 2
    assert [record.getMessage().isprintable() for record in caplog.records] == [True, True]


@pytest.mark.parametrize("name", SLOW)
def test_time_is_bounded_however_bytes_are_spread(name: str) -> None:
    answer, found = SLOW[name]
    started = time.monotonic()
    text, requests = error_of(answer, timeout=0.15)
    assert re.search(rf"{found} 0.15 s .attempt 2 of 2", text), text
    assert requests == 2
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_error_and_ctrl_c_wait_for_no_other_prompt(interrupted: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The server has three prompts in its hands and answers none of them."""
    held = threading.Barrier(4)

    def answer(head: str, body: dict[str, Any], connection: socket.socket) -> None:
        if body["max_tokens"] == 16:
            connection.sendall(http(json.dumps(right_answer(body))))
            return
        held.wait(60)
        if body["prompt"] != "the last":
            connection.recv(1)  # until the client goes
        elif interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            connection.recv(1)
        else:
            connection.sendall(http("5"))

    prompts = [replace(PROMPT, content=f"{i}") for i in range(3)] + [replace(PROMPT, content="the last", place="row 4")]
    with RawServer(answer) as server, caplog.at_level(logging.WARNING, logger="d2o_fast"):
        one = ServerSampler(server.url, "m", 4, 3600.0)
        one.sample([PROMPT], 0, HOW)
        expected, text = (KeyboardInterrupt, None) if interrupted else (D2OError, "row 4: .* is 5; it must be")
        with pytest.raises(expected, match=text):
            one.sample(prompts, 1, HOW)
        assert one._under_way == set()
    assert caplog.records == [], "they say nothing of their own end"


def test_there_are_enough_of_them() -> None:
    assert len(LASTING) + len(TRANSIENT) + len(SLOW) >= 60

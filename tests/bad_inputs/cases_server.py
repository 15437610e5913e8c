"""Answers of a sampling server: wrong types and values in every field, broken HTTP, redirects, addresses.

A small HTTP server in the case's own process answers well up to one request, and badly from then on.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from case import Call, Case, Cases, Check, fine, put, some, train
from d2o_fast.config import FIELDS

WORDS = " go", " away", " it", " the", " lock", " paint", " yourself", " tree"
NAMES = (("127.0.0.1", "server_url"),)
SECRET = "s3cr3t-of-the-user"


def answer(body: dict[str, Any], tells_ids: bool) -> dict[str, Any]:
    """A good answer to a request."""
    chance, choices = random.Random(body["seed"]), []
    for index in range(body.get("n", 1)):
        text = "".join(chance.choices(WORDS, k=3))
        ids = {"token_ids": [chance.randrange(10, 150) for _ in range(min(4, body["max_tokens"] - 1))] + [2]}
        found = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        choices.append({"index": index, "finish_reason": "stop", **found, **(ids if tells_ids else {})})
    return {"id": "x", "object": "text_completion", "choices": choices}


Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], Any]  #: writes a bad answer, given the good one


def send(handler: BaseHTTPRequestHandler, data: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(data))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def serve(reply: Reply | None, first: int = 0, last: int = 10**9, tells_ids: bool = False) -> str:
    """The address of a server whose requests ``first`` to ``last`` get ``reply``."""
    count, lock = iter(range(10**9)), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            os.write(2, b"CONTACTED\n")
            send(self, b"{}")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = next(count)
            good = answer(body, tells_ids)
            self.close_connection = True
            with contextlib.suppress(OSError):
                if reply is None or not first <= number <= last:
                    send(self, json.dumps(good).encode())
                else:
                    reply(self, good)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1"


def sampled(url: str, **settings: Any) -> Call:
    """``d2o sample`` from the server at ``url``, with hardly any time between attempts."""
    from d2o_fast.sampling import server

    for name in ("FIRST_DELAY", "LONGEST_DELAY"):
        if hasattr(server, name):
            setattr(server, name, 0.01)
    train(server_url=url, anchors_dir="new", server_timeout=2, **settings)
    return ["sample", "c.yaml"]


def _case(
    name: str,
    reply: Reply,
    first: int = 0,
    last: int = 10**9,
    right: Check | None = None,
    ids: bool = False,
    either: bool = True,
    hidden: tuple[str, ...] = (),
) -> Case:
    def prepare() -> Call:
        return sampled(serve(reply, first, last, ids))

    return Case("server", name, prepare, NAMES, right, either, hidden=hidden)


def cases(chance: random.Random, good: Path) -> Cases:
    """All cases of the kind."""
    yield from _field_cases(chance)
    yield from _http_cases(chance)
    yield from _address_cases()


# --- Fields ------------------------------------------------------------------------------------------------------

#: place in the answer -> bad values; True beside a value: it may be ignored
BAD: dict[tuple[Any, ...], list[Any]] = {
    ("choices",): [None, {}, "x", [], [None], [5], 5, ["x"], {"0": {}}, True],
    ("choices", 0, "text"): [None, 5, [], {}, True, ["a"]],
    ("choices", 0, "finish_reason"): [None, 5, "tool_calls", [], {}, "", "abort", ["stop"]],
    ("choices", 0, "token_ids"): [
        *("abc", 5, ["a"], [1.5], [None], [-1], [99999], [2**40], [10**30], [[1]], {"a": 1}, True, [True], 0.5),
    ],
    ("prompt_token_ids",): ["x", 5, [1], {"a": 1}, True, [None], ["a"] * 9],
    ("choices", 0, "prompt_token_ids"): ["x", 5, [1], {"a": 1}, True],
}
#: the same, where ignoring the value is right too
IGNORED: dict[tuple[Any, ...], list[Any]] = {
    ("usage",): [5, "x", [], {"prompt_tokens": None}],
    ("choices", 0, "logprobs"): [
        5,
        "x",
        [],
        {"token_logprobs": 5},
        {"token_logprobs": ["a"]},
        {"token_logprobs": [None]},
        True,
    ],
    ("choices", 0, "index"): ["x", -1, 10**30],
    ("choices", 0, "token_ids"): [[], None],
    ("id",): [5, None],
    ("choices", 0, "text"): ["", "\x00", "a" * 100_000, "</s>", "\x1b[31mred"],
}
WRONG_COUNTS: list[Any] = [
    {"prompt_tokens": "x"},
    {"prompt_tokens": -1},
    {"prompt_tokens": 10**9},
    {"prompt_tokens": [1]},
]


def _changed(place: tuple[Any, ...], value: Any) -> Reply:
    def reply(handler: BaseHTTPRequestHandler, good: dict[str, Any]) -> None:
        put(*place, value=value)(good)
        send(handler, json.dumps(good).encode())

    return reply


def _field_cases(chance: random.Random) -> Cases:
    for right, fields in ((None, BAD), (fine, IGNORED), (None, {("usage",): WRONG_COUNTS})):
        for place, values in fields.items():
            for value in some(chance, values, 7):
                first = chance.choice([0, 3])
                ids = place[-1] in ("token_ids", "logprobs")
                name = f"{'.'.join(map(str, place))}: {json.dumps(value)[:40]} from request {first}"
                hidden = ("\x1b[31m",)
                yield _case(name, _changed(place, value), first, right=right, ids=ids, hidden=hidden)
    for name, data in {
        "more choices than were asked for": lambda good: good["choices"].extend(good["choices"] * 3),
        "the same text four times": lambda good: [choice.update(text="same") for choice in good["choices"]],
        "half a character": lambda good: [choice.update(text="cut \ud83d") for choice in good["choices"]],
        "tokens of one choice alone": lambda good: good["choices"][0].update(token_ids=[11, 2]),
    }.items():

        def reply(handler: BaseHTTPRequestHandler, good: dict[str, Any], change: Any = data) -> None:
            change(good)
            send(handler, json.dumps(good).encode())

        right = fine if name.startswith("half") else None
        yield _case(name, reply, right=right)


# --- HTTP --------------------------------------------------------------------------------------------------------

_DEEP = b"[" * 100_000


def _body(data: bytes, status: int = 200, **headers: str) -> Reply:
    return lambda handler, good: send(handler, data, status, **headers)


def _cut(handler: BaseHTTPRequestHandler, good: dict[str, Any]) -> None:
    send(handler, json.dumps(good).encode()[:40], Content_Length="4000")


def _raw(data: bytes) -> Reply:
    return lambda handler, good: handler.wfile.write(data)


def _slow(handler: BaseHTTPRequestHandler, good: dict[str, Any]) -> None:
    time.sleep(30)


def _drip(handler: BaseHTTPRequestHandler, good: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(600):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def _endless(handler: BaseHTTPRequestHandler, good: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * (1 << 20))


def _reset(handler: BaseHTTPRequestHandler, good: dict[str, Any]) -> None:
    import socket

    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def _redirect(status: int, place: str | None = None) -> Reply:
    def reply(handler: BaseHTTPRequestHandler, good: dict[str, Any]) -> None:
        target = serve(None) + "/completions" if place is None else place
        send(handler, b"", status, Location=target)

    return reply


REPLIES: dict[str, Reply] = {
    "no JSON": _body(b"<html>502</html>"),
    "nothing": _body(b""),
    "null": _body(b"null"),
    "a list": _body(b"[1]"),
    "a text": _body(b'"x"'),
    "a number": _body(b"5"),
    "lists 100000 deep": _body(_DEEP + b"]" * 100_000),
    "open lists 100000 deep": _body(b'{"choices": ' + _DEEP),
    "choices 100000 deep": _body(b'{"choices": ' + _DEEP + b"]" * 100_000 + b"}"),
    "a number of 6000 digits": _body(b'{"choices": ' + b"9" * 6000 + b"}"),
    "NaN": _body(b'{"choices": NaN}'),
    "no UTF-8": _body(b'{"choices": "\xff\xfe"}'),
    "UTF-16": _body('{"choices": []}'.encode("utf-16")),
    "gzip": _body(gzip.compress(b'{"choices": []}'), Content_Encoding="gzip"),
    "half an answer": _cut,
    "no HTTP": _raw(b"hello\r\n\r\n"),
    "a status that is no number": _raw(b"HTTP/1.1 abc OK\r\n\r\n"),
    "a status of 999": _body(b"x", 999),
    "a status of 204": _body(b"", 204),
    "a header of 100 kB": _raw(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n{}"),
    "1000 headers": _raw(b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 1000 + b"\r\n{}"),
    "a length below 0": _body(b"{}", Content_Length="-5"),
    "a length that is no number": _body(b"{}", Content_Length="many"),
    "broken chunks": _raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n"),
    "no answer": _slow,
    "a byte now and then": _drip,
    "an answer without an end": _endless,
    "a reset connection": _reset,
    "a closed connection": lambda handler, good: None,
    "an escape sequence in an error": _body(b'{"error": "\x1b[31mred\x1b]0;title\x07"}', 400),
    "an escape sequence in a busy answer": _body(b"\x1b[31mred", 503),
    "an escape sequence that is no JSON": _body(b"\x1b[31mred"),
    "an error of 10 MB": _body(b"x" * 10_000_000, 400),
    "an error with many lines": _body(b"line\n" * 1000, 400),
    "a wait of text": _body(b"x", 429, Retry_After="soon"),
    "a wait below 0": _body(b"x", 429, Retry_After="-5"),
    "a wait in other digits": _body(b"x", 429, Retry_After="\u0665".encode().decode("latin-1")),
    "a redirect to another host": _redirect(302),
    "a redirect that keeps the method": _redirect(307),
    "a lasting redirect": _redirect(308),
    "a redirect to see another": _redirect(303),
    "a redirect to a file": _redirect(302, "file:///etc/passwd"),
    "a redirect to nowhere": _redirect(301, ""),
}


def _http_cases(chance: random.Random) -> Cases:
    hidden = ("CONTACTED", "\x1b[31m")
    for name, reply in REPLIES.items():
        first = 0 if name in ("no answer", "a byte now and then") else chance.choice([0, 3])
        yield _case(f"{name} from request {first}", reply, first, hidden=hidden)
    for status in (400, 401, 403, 404, 405, 413, 422, 429, 500, 501, 503, 504):
        body = json.dumps({"error": {"message": "injected"}}).encode()
        yield _case(f"status {status}", _body(body, status))
    for name in some(chance, ["no JSON", "half an answer", "a reset connection", "nothing", "a closed connection"], 3):
        yield _case(f"{name}, once", REPLIES[name], 3, 3, right=fine, either=False)
    yield _case("status 503, twice", _body(b"", 503), 0, 1, right=fine, either=False)
    for ids in (False, True):
        good = Case("server", f"nothing is wrong{', with ids' * ids}", partial(_good, ids), right=fine)
        yield good


def _good(ids: bool) -> Call:
    return sampled(serve(None, tells_ids=ids))


# --- Addresses ---------------------------------------------------------------------------------------------------

ADDRESSES: dict[str, str] = {
    "an open bracket": "http://[::1",
    "a bad address in brackets": "http://[zz::1]:80/v1",
    "no host": "http://",
    "no host but a port": "http://:80/v1",
    "a port of text": "http://127.0.0.1:http/v1",
    "a port of 99999": "http://127.0.0.1:99999/v1",
    "a port below 0": "http://127.0.0.1:-1/v1",
    "no scheme": "127.0.0.1:8000/v1",
    "another scheme": "ftp://127.0.0.1/v1",
    "a file": "file:///etc/passwd",
    "a space": "http://127.0.0.1:9/v 1",
    "a new line": "http://127.0.0.1:9/v1\nHost: x",
    "a null": "http://127.0.0.1:9/v1\0",
    "an escape sequence": "http://127.0.0.1:9/\x1b[31mv1",
    "letters beyond ASCII": "http://127.0.0.1:9/vé1",
    "a host beyond ASCII": "http://ex\u2100mple\uff0fx:9/v1",
    "a user": f"http://me:{SECRET}@127.0.0.1:9/v1",
    "a user alone": f"http://{SECRET}@127.0.0.1:9/v1",
    "a key": f"http://127.0.0.1:9/v1?api_key={SECRET}",
    "a fragment": f"http://127.0.0.1:9/v1#{SECRET}",
    "a host of 300 letters": f"http://{'a' * 300}:9/v1",
    "nobody there": "http://127.0.0.1:9/v1",
    "an unknown host": "http://no-such-host.invalid:9/v1",
    "a TLS server that is none": "https://127.0.0.1:9/v1",
}


def _address_cases() -> Cases:
    words = (("server_url", "127.0.0.1:9", "no-such-host.invalid"),)
    for name, url in ADDRESSES.items():
        yield Case("server", f"address with {name}", partial(sampled, url), words, hidden=(SECRET, "\x1b[31m"))
    if "server_api_key_env" not in FIELDS:
        return
    keys: dict[str, tuple[str, str | None, dict[str, Any]]] = {
        "a variable that is not set": ("http://127.0.0.1:9/v1", None, {}),
        "an empty key": ("http://127.0.0.1:9/v1", "", {}),
        "a key of two lines": ("http://127.0.0.1:9/v1", f"{SECRET}\nX: y", {}),
        "a key beyond latin-1": ("http://127.0.0.1:9/v1", f"{SECRET}\u20ac", {}),
        "a key over plain http to another host": ("http://no-such-host.invalid/v1", SECRET, {}),
        "a key that no server takes": ("http://127.0.0.1:9/v1", SECRET, {}),
        "a key itself in place of its variable": ("http://127.0.0.1:9/v1", SECRET, {"server_api_key_env": SECRET}),
    }
    for name, (url, key, more) in keys.items():
        words = (("server_api_key_env", "MINE_API_KEY", "127.0.0.1:9", "server_url"),)
        yield Case("server", name, partial(_keyed, url, key, more), words, hidden=(SECRET,))
    yield Case("server", "a key without a server", partial(train, server_api_key_env="MINE"), ("server_api_key_env",))


def _keyed(url: str, key: str | None, more: dict[str, Any]) -> Call:
    if key is not None:
        os.environ["MINE_API_KEY"] = key
    return sampled(url, **({"server_api_key_env": "MINE_API_KEY"} | more))

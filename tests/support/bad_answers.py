"""Answers of a server that are wrong, each with a pattern of what the error must say of it."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from raw_server import Answer, http, right_answer

DEEP = b"[" * 100_000


def _bytes(data: bytes) -> Answer:
    """Sends ``data`` and ends the connection."""
    return lambda head, body, connection: connection.sendall(data)


def _changed(change: Callable[[dict[str, Any]], Any], text: Callable[[str], str] = lambda text: text) -> Answer:
    """Sends the right answer after ``change``, which returns another one in its place or None."""

    def answer(head: str, body: dict[str, Any], connection: socket.socket) -> None:
        right = right_answer(body)
        other = change(right)
        connection.sendall(http(text(json.dumps(right if other is None else other))))

    return answer


def _field(value: Any, *path: str | int) -> Answer:
    """Sends the right answer with ``value`` at ``path``."""

    def change(answer: Any) -> None:
        for name in path[:-1]:
            answer = answer[name]
        answer[path[-1]] = value

    return _changed(change)


def _choice(value: Any, *path: str | int) -> Answer:
    return _field(value, "choices", 0, *path)


def _instead(old: str, new: str) -> Answer:
    """Sends the text of the right answer with ``new`` in place of ``old``."""
    return _changed(lambda answer: None, lambda text: text.replace(old, new, 1))


def _forever(start: bytes, part: bytes, pause: float = 0.0) -> Answer:
    """Sends ``part`` again and again until the client goes."""

    def answer(head: str, body: dict[str, Any], connection: socket.socket) -> None:
        connection.sendall(start)
        with contextlib.suppress(OSError):
            for _ in itertools.count():
                connection.sendall(part)
                time.sleep(pause)

    return answer


def _reset(head: str, body: dict[str, Any], connection: socket.socket) -> None:
    connection.sendall(http("{", length=100))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.detach())


def _silent(head: str, body: dict[str, Any], connection: socket.socket) -> None:
    connection.recv(1)  # until the client goes


def _redirect(status: str, location: str) -> Answer:
    return _bytes(http("moved", status, f"Location: {location}"))


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ANSI = "\x1b[2J\x1b]0;owned\x07\x9b31m"

#: name: (the answer, a pattern of the error's text); every one is an error at the first attempt
LASTING: dict[str, tuple[Answer, str]] = {
    # The kinds of values
    "a list": (_changed(lambda a: [a]), r"the answer is \[\{"),
    "a text": (_changed(lambda a: "hello"), r"the answer is 'hello'; it must be an object"),
    "a number": (_changed(lambda a: 5), "the answer is 5; it must be an object"),
    "null": (_bytes(http("null")), "the answer is None; it must be an object"),
    "choices: a text": (_field("abc", "choices"), "choices is 'abc'; it must be a list"),
    "choices: an object": (_field({"0": {}}, "choices"), "choices is .*; it must be a list"),
    "choices: texts": (_field(["a"], "choices"), r"choices\[0\] is 'a'; it must be an object"),
    "choices: null inside": (_changed(lambda a: a["choices"].append(None)), r"choices\[4\] is None; it must be an obj"),
    "text: a number": (_choice(5, "text"), r"choices\[0\].text is 5; it must be a text"),
    "text: a list": (_choice(["a"], "text"), r"choices\[0\].text is \['a'\]; it must be a text"),
    "text: half a character": (_choice("a\ud800", "text"), r"choices\[0\].text is 'a\\ud800'; .* Unicode"),
    "message: a text": (_choice("hi", "message"), r"choices\[0\].message is 'hi'; it must be an object"),
    "message: content of parts": (_choice({"content": [{"text": "a"}]}, "message"), r"message.content is \[\{'text'"),
    "finish_reason: a list": (_choice(["stop"], "finish_reason"), r"finish_reason is \['stop'\]; it must be a text"),
    "finish_reason: true": (_choice(True, "finish_reason"), "finish_reason is True; it must be a text"),
    "token_ids: a number": (_choice(5, "token_ids"), r"choices\[0\].token_ids is 5; it must be a list"),
    "token_ids: a text": (_choice("5 6", "token_ids"), r"choices\[0\].token_ids is '5 6'; it must be a list"),
    "token_ids: an object": (_choice({"0": 5}, "token_ids"), r"choices\[0\].token_ids is .*; it must be a list"),
    "token_ids: texts": (_choice(["5", "6"], "token_ids"), r"token_ids\[0\] is '5'; it must be a token id below 160"),
    "token_ids: floats": (_choice([5, 6.0], "token_ids"), r"token_ids\[1\] is 6.0; it must be a token id"),
    "token_ids: bools": (_choice([True, False], "token_ids"), r"token_ids\[0\] is True; it must be a token id"),
    "token_ids: null inside": (_choice([5, None], "token_ids"), r"token_ids\[1\] is None; it must be a token id"),
    "token_ids: lists": (_choice([[5]], "token_ids"), r"token_ids\[0\] is \[5\]; it must be a token id"),
    "token_ids: negative": (_choice([5, -1], "token_ids"), r"token_ids\[1\] is -1; it must be a token id"),
    "token_ids: beyond": (_choice([5, 160], "token_ids"), r"token_ids\[1\] is 160; it must be a token id below 160"),
    "token_ids: 2**64": (_choice([2**64], "token_ids"), r"token_ids\[0\] is 1844674407.*; it must be a token id"),
    "token_ids: 3000 digits": (_choice([10**3000], "token_ids"), r"token_ids\[0\] is 10000.*\.\.\..*; it must be"),
    "token_ids: infinite": (_choice([float("inf")], "token_ids"), r"token_ids\[0\] is inf; it must be a token id"),
    "logprobs: a number": (_choice(5, "logprobs"), r"choices\[0\].logprobs is 5; it must be an object"),
    "logprobs: a list": (_choice([-1.0], "logprobs"), r"choices\[0\].logprobs is \[-1.0\]; it must be an object"),
    "token_logprobs: a text": (_choice("x", "logprobs", "token_logprobs"), "token_logprobs is 'x'; it must be a list"),
    **{
        f"token_logprobs: {name}": (
            _choice([-5.0, value, -5.0, -5.0], "logprobs", "token_logprobs"),
            rf"token_logprobs\[1\] is {found}; it must be a log-probability",
        )
        for name, value, found in (
            ("NaN", float("nan"), "nan"),
            ("-Infinity", float("-inf"), "-inf"),
            ("positive", 0.5, "0.5"),
            ("a text", "-5", "'-5'"),
            ("a bool", False, "False"),
            ("a list", [-5.0], r"\[-5.0\]"),
            ("1000 digits", -(10**1000), "-100000.*"),
        )
    },
    "token_logprobs: 1e999": (_instead("-5.0", "-1e999"), r"token_logprobs\[0\] is -inf; it must be"),
    "token_logprobs: fewer": (_choice([-5.0], "logprobs", "token_logprobs"), "1 log-probabilities of the 4 tokens"),
    "token_logprobs: more": (_choice([-5.0] * 9, "logprobs", "token_logprobs"), "9 log-probabilities of the 4 tokens"),
    "usage: a list": (_field([1], "usage"), r"usage is \[1\]; it must be an object"),
    "prompt_tokens: a text": (_field("5", "usage", "prompt_tokens"), "usage.prompt_tokens is '5'; it must be a number"),
    "prompt_tokens: negative": (_field(-5, "usage", "prompt_tokens"), "usage.prompt_tokens is -5; it must be a number"),
    "prompt_token_ids: a number": (_field(5, "prompt_token_ids"), "prompt_token_ids is 5; it must be a list"),
    "prompt_token_ids: texts": (
        _choice(["a"], "prompt_token_ids"),
        r"prompt_token_ids\[0\] is 'a'; it must be a token",
    ),
    "prompt_token_ids: other": (_choice([5], "prompt_token_ids"), r"reads the prompt as 1 tokens, and here it has \d+"),
    "more choices": (_changed(lambda a: a["choices"].append(a["choices"][0])), "5 choices, where 4 were asked for"),
    # JSON that Python cannot hold
    "nested 100 000 lists": (_bytes(http(DEEP)), "100000 bytes of JSON that is too deep"),
    "nested 100 000 objects": (_bytes(http(b'{"a":' * 100_000)), "500000 bytes of JSON that is too deep"),
    "nested inside a choice": (
        _instead('"go"', DEEP.decode() + "]" * 100_000),
        r"\d+ bytes of JSON that is too deep",
    ),
    "nested 900 lists": (
        _instead('"go"', "[" * 900 + "]" * 900),
        r"choices\[0\].text is \[\[\[\[*\.\.\..*; it must be",
    ),
    "6000 digits": (_instead("-5.0", "9" * 6000), "has a number of too many digits"),
    # Too much
    "an endless body": (_forever(OK + b"\r\n", b" " * 65536), "an answer of more than 4 MiB"),
    "endless chunks": (_forever(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"), "an answer of more than 4 MiB"),
    "5 MiB": (_bytes(http(b"[" + b"0," * (5 << 19) + b"0]")), "an answer of more than 4 MiB"),
    "a gzip bomb": (
        _bytes(http(gzip.compress(b" " * (1 << 26)), "200 OK", "Content-Encoding: gzip")),
        "compressed as 'gzip', which was not asked for",
    ),
    # Statuses
    **{
        f"HTTP {status}": (_bytes(http('{"error": "no"}', f"{status} Reason")), rf"HTTP {status} Reason: .*no")
        for status in (201, 202, 206, 226, 402, 404, 405, 406, 410, 411, 413, 418, 431, 451, 501, 505, 511)
    },
    "HTTP 204": (_bytes(http("", "204 No Content")), "HTTP 204 No Content"),
    "HTTP 400": (_bytes(http("no", "400 Bad Request")), "HTTP 400 Bad Request: no"),
    "HTTP 401": (_bytes(http("no", "401 Unauthorized")), "HTTP 401 .*server_api_key_env names the environment"),
    "HTTP 403": (_bytes(http("no", "403 Forbidden")), "HTTP 403 .*server_api_key_env names the environment"),
    "HTTP 407": (_bytes(http("no", "407 Proxy")), "HTTP 407 .*A proxy answers"),
    "HTTP 999": (_bytes(http("no", "999 ")), "HTTP 999"),
    "HTTP 404, endless": (_forever(b"HTTP/1.1 404 No\r\n\r\n", b"x" * 65536), "HTTP 404 No: xxx"),
    "HTTP 404, escapes": (_bytes(http(ANSI, f"404 No{ANSI}")), r"HTTP 404 No\\x1b\[2J.*\\x1b\[2J\\x1b\]0;owned\\x07"),
    **{
        f"HTTP {status} to {location}": (
            _redirect(f"{status} Moved", location),
            rf"HTTP {status} Moved: it sends on to '.*', and redirects are not followed",
        )
        for status, location in (
            (300, "/"),
            (301, "http://example.com/v1"),
            (302, "/v1/completions"),
            (303, "https://user:pw@example.com"),
            (304, "//example.com"),
            (305, ""),
            (307, "file:///etc/passwd"),
            (308, f"http://{ANSI}"),
        )
    },
    "HTTP 302 without a Location": (_bytes(http("x", "302 Found")), "it sends on to None"),
}

#: the same, but another attempt might help: the error comes after the last one
TRANSIENT: dict[str, tuple[Answer, str]] = {
    "an object without choices": (_bytes(http("{}")), r"an answer without choices: \{\}"),
    "choices: none": (_field([], "choices"), "an answer without choices"),
    "choices: null": (_field(None, "choices"), "an answer without choices"),
    "an error with status 200": (_bytes(http('{"error": {"message": "busy"}}')), "without choices: .*busy"),
    "an empty choice": (_field([{}], "choices"), r"no response \(finish_reason None\)"),
    "finish_reason: abort": (_choice("abort", "finish_reason"), r"no response \(finish_reason 'abort'\)"),
    "finish_reason: escapes": (_choice(ANSI, "finish_reason"), r"finish_reason '\\x1b\[2J"),
    "no text, no tokens": (
        _changed(lambda a: [c.update(text=None, token_ids=None) for c in a["choices"]] and None),
        "a choice that is no response",
    ),
    "tokens of some choices": (_choice(None, "token_ids"), "the tokens of 3 of its 4 choices"),
    "an empty body": (_bytes(http("")), "an answer of 0 bytes that is not JSON"),
    "no body at all": (_bytes(OK + b"\r\n"), "an answer of 0 bytes that is not JSON"),
    "HTML": (_bytes(http("<html>busy</html>", "200 OK", "Content-Type: text/html")), "not JSON, ending in '<html>busy"),
    "escapes": (_bytes(http(ANSI)), r"not JSON, ending in .*x1b\[2J"),
    "half of the JSON": (_changed(lambda a: None, lambda text: text[: len(text) // 2]), r"\d+ bytes that is not JSON"),
    "JSON twice": (_changed(lambda a: None, lambda text: text * 2), "that is not JSON"),
    "a stream of events": (_bytes(http('data: {"choices": []}\n\n')), "that is not JSON"),
    "Latin-1": (_bytes(http('{"choices": "é"}'.encode("latin-1"))), "that is not JSON"),
    "bytes of no charset": (_bytes(http(bytes(range(128, 256)))), "that is not JSON"),
    "zeros": (_bytes(http(b"\0" * 99)), "that is not JSON"),
    "too long a Content-Length": (_bytes(http("{}", length=9)), r"half an answer \(2 bytes, then the end"),
    "an enormous Content-Length": (_bytes(http("{}", length=10**30)), r"half an answer \(2 bytes, then the end"),
    "too short a Content-Length": (_bytes(http("{}", length=1)), "1 bytes that is not JSON"),
    "a negative Content-Length": (_bytes(http("{", length=-5)), "not JSON"),
    "a Content-Length in words": (_bytes(OK + b"Content-Length: two\r\n\r\n{"), "not JSON"),
    "half a chunk": (_bytes(CHUNKED + b"ff\r\n{}"), r"half an answer \(\d bytes, then the end"),
    "no last chunk": (_bytes(CHUNKED + b"2\r\n{}\r\n"), r"half an answer \(\d bytes, then the end"),
    "chunks of no size": (_bytes(CHUNKED + b"zz\r\n{}\r\n"), "half an answer"),
    "a negative chunk": (_bytes(CHUNKED + b"-5\r\n{}\r\n0\r\n\r\n"), "half an answer|not JSON"),
    "a line without end": (_forever(b"HTTP/1.1 200 ", b"x" * 65536), "LineTooLong|BadStatusLine"),
    "a header without end": (_forever(OK + b"X: ", b"x" * 65536), "LineTooLong"),
    "headers without end": (_forever(OK, b"X: y\r\n" * 1000), "HTTPException: got more than 100 headers"),
    "no HTTP": (_bytes(b"hello\n"), "BadStatusLine: hello"),
    "no HTTP, escapes": (_bytes(ANSI.encode() + b"\n"), r"BadStatusLine: \\x1b\[2J"),
    "HTTP/0.9": (_bytes(b"{}"), "BadStatusLine"),
    "HTTP/2": (_bytes(b"HTTP/2 200 OK\r\n\r\n{}"), "UnknownProtocol|BadStatusLine"),
    "a status of letters": (_bytes(b"HTTP/1.1 abc OK\r\n\r\n{}"), "BadStatusLine"),
    "a status of 6 digits": (_bytes(b"HTTP/1.1 200200 OK\r\n\r\n{}"), "BadStatusLine"),
    "TLS": (_bytes(b"\x15\x03\x01\x00\x02\x02\x28"), "RemoteDisconnected|BadStatusLine"),
    "nothing": (_bytes(b""), "RemoteDisconnected"),
    "reset midway": (_reset, "ConnectionResetError"),
    **{
        f"HTTP {status}": (_bytes(http("busy", f"{status} Reason")), rf"HTTP {status} Reason: busy")
        for status in (408, 429, 500, 502, 503, 504)
    },
    "HTTP 503, Retry-After in words": (_bytes(http("busy", "503 S", "Retry-After: soon")), "HTTP 503 S: busy"),
    "HTTP 503, escapes": (_bytes(http(ANSI, "503 S")), r"HTTP 503 S: \\x1b\[2J"),
    "HTTP 503, half": (_bytes(http("bu", "503 S", length=99)), "HTTP 503 S: bu"),
}

#: the same, where the time of a request runs out
SLOW: dict[str, tuple[Answer, str]] = {
    "silence": (_silent, "no answer within"),
    "a body that drips": (_forever(OK + b"\r\n", b" ", 0.02), "no answer within"),
    "chunks that drip": (_forever(CHUNKED, b"1\r\n \r\n", 0.02), "no answer within"),
    "the size of a chunk drips": (_forever(CHUNKED, b"0", 0.02), "no answer within"),
    "trailers that drip": (_forever(CHUNKED + b"0\r\n", b"X: y\r\n", 0.02), "no answer within"),
    "a status that drips": (_forever(b"", b"HTTP/1.1 ", 0.02), "no answer within"),
    "headers that drip": (_forever(OK, b"X", 0.02), "no answer within"),
    "100 Continue for ever": (_forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0), "no answer within"),
    "an error that drips": (_forever(b"HTTP/1.1 404 No\r\n", b"X", 0.02), "no answer within"),
}

"""One POST request to a server, and its JSON answer or a ``Fault``.

The request goes to the address and nowhere else: redirects are not followed, and proxies of the environment are not
used. The time of a request and the bytes of an answer are bounded, however the server spreads them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from d2o_fast.errors import D2OError, shortened

RETRYABLE = (408, 429, 500, 502, 503, 504)  #: HTTP statuses after which a retry may succeed
LONGEST_WAIT = 60.0  #: seconds of a server's Retry-After that are obeyed

_CHECK = "Check server_url, server_model and the server's log"
_KEY = "server_api_key_env names the environment variable with an API key. Check that it is this server's"
_ADVICE = {401: _KEY, 403: _KEY, 407: "A proxy answers in the server's place. Check server_url"}
_REDIRECT = "Set server_url to the address itself if you trust it"
_TLS = "Check that server_url is right to begin with https. SSL_CERT_FILE names a file of further authorities"


class Fault(Exception):
    """A request without a usable answer.

    Attributes:
        found: what came instead.
        advice: what to do; "" if the next attempt may succeed.
        after: seconds that the server asks to wait.
        status: the HTTP status.
    """

    def __init__(self, found: str, advice: str = "", after: float = 0.0, status: int = 200) -> None:
        super().__init__(found)
        self.found, self.advice, self.after, self.status = found, advice, after, status

    def without(self, key: str | None) -> Fault:
        """The same fault. Its text has lost ``key``, also one that was cut to 8 characters or more."""
        found = self.found
        for part in (key, *(key[i : i + 8] for i in range(max(len(key) - 7, 1)))) if key else ():
            found = found.replace(part, "***")
        return Fault(found, self.advice, self.after, self.status)


def read_key(variable: str | None) -> str | None:
    """The API key in the environment variable, or None if no variable is named.

    Raises:
        D2OError: it is not set, or no HTTP header can hold it. The message shows neither the key nor the name, because
            a key may have been given as the name.
    """
    if variable is None:
        return None
    key = os.environ.get(variable)
    if key and all("!" <= character <= "~" for character in key):
        return key
    found = "empty" if key == "" else "not set" if key is None else "not one word of ASCII characters"
    raise D2OError(
        f"server_api_key_env names an environment variable that is {found}. Export it with the API key in it"
    )


def post(
    url: str, body: dict[str, Any], timeout: float, key: str | None, limit: int, under_way: set[socket.socket]
) -> Any:
    """Sends ``body`` and returns the parsed JSON answer.

    Args:
        timeout: seconds from the connection to the last byte.
        key: sent as a bearer token.
        limit: most bytes of the answer.
        under_way: holds the connection meanwhile, for ``cut``.

    Raises:
        Fault: there is no such answer.
    """
    try:
        data = _exchange(url, json.dumps(body).encode(), timeout, key, limit, under_way)
    except TimeoutError:
        raise Fault(f"no answer within {timeout:g} s") from None
    except ssl.SSLError as error:
        cut = isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
        raise Fault(f"{type(error).__name__}: {error}", "" if cut else _TLS) from None
    except (http.client.HTTPException, OSError) as error:
        raise Fault(f"{type(error).__name__}: {shortened(str(error), 200, one_line=True)}") from None
    if key and len(key) >= 16 and key.encode() in data:
        raise Fault("an answer that repeats the API key", "It would be kept as a response. " + _CHECK)
    return _parsed(data)


def cut(connection: socket.socket) -> None:
    """Ends a connection at once, also from another thread."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _exchange(
    url: str, body: bytes, timeout: float, key: str | None, limit: int, under_way: set[socket.socket]
) -> bytes:
    parts, deadline = urlsplit(url), time.monotonic() + timeout
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    with contextlib.closing(kind(parts.hostname or "", parts.port, timeout=timeout)) as connection:
        connection.connect()
        with _ended(connection.sock, deadline, under_way):
            connection.request("POST", parts.path, body, headers)
            with connection.getresponse() as response:
                if response.status != 200:
                    raise _refused(response)
                return _read(response, limit)


@contextlib.contextmanager
def _ended(sock: socket.socket, deadline: float, under_way: set[socket.socket]) -> Iterator[None]:
    """Ends the connection at ``deadline``. The socket's own time-out starts again with every byte."""
    over = threading.Event()

    def end() -> None:
        over.set()
        cut(sock)

    timer = threading.Timer(deadline - time.monotonic(), end)
    timer.daemon = True
    timer.start()
    under_way.add(sock)
    try:
        yield
    except (http.client.HTTPException, OSError, Fault):
        if not over.is_set():
            raise
    finally:
        timer.cancel()
        under_way.discard(sock)
    if over.is_set():
        raise TimeoutError


def _read(response: http.client.HTTPResponse, limit: int) -> bytes:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        found = f"an answer compressed as {shortened(encoding)!r}, which was not asked for"
        raise Fault(found, "Turn the server's compression off")
    data = bytearray()
    try:
        while part := response.read1(1 << 16):
            data += part
            if len(data) > limit:
                raise Fault(f"an answer of more than {limit >> 20} MiB", _CHECK)
    except http.client.IncompleteRead:
        raise Fault(f"half an answer ({len(data)} bytes, then the end)") from None
    if response.length:  # bytes that Content-Length promised and that did not come
        raise Fault(f"half an answer ({len(data)} bytes, then the end)")
    return bytes(data)


def _refused(response: http.client.HTTPResponse) -> Fault:
    try:
        text = response.read1(1000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as broken:
        text = f"(its text cannot be read: {type(broken).__name__})"
    status, advice = response.status, _ADVICE.get(response.status, _CHECK)
    if 300 <= status < 400:
        text = f"it sends on to {response.headers.get('Location')!a}, and redirects are not followed"
        advice = _REDIRECT
    found = f"HTTP {status} {shortened(response.reason, 60, one_line=True)}: {shortened(text, 200, one_line=True)}"
    if status not in RETRYABLE:
        return Fault(found, advice, status=status)
    seconds = response.headers.get("Retry-After", "")
    return Fault(found, after=min(float(seconds), LONGEST_WAIT) if seconds.isdecimal() else 0.0, status=status)


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError):
        end = shortened(data[-60:].decode("utf-8", "replace"), 200, one_line=True)
        raise Fault(f"an answer of {len(data)} bytes that is not JSON, ending in {end!r}") from None
    except (RecursionError, ValueError):
        found = f"an answer of {len(data)} bytes of JSON that is too deep, or has a number of too many digits"
        raise Fault(found, _CHECK) from None

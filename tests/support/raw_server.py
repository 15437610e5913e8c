"""A server of plain sockets, which can answer with any bytes; and right answers as vLLM gives them."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

from tiny import tiny_tokenizer

#: Answers one request: its headers (with the first line) and its body, and the connection to write to.
Answer = Callable[[str, dict[str, Any], socket.socket], None]


class RawServer:
    """Reads whole requests and leaves every byte of the answers to ``answer``. One thread per connection.

    Attributes:
        requests: (headers, body) of every request.
    """

    def __init__(self, answer: Answer, context: ssl.SSLContext | None = None) -> None:
        self.answer, self.context = answer, context
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.closing = threading.Event()
        self.listening = socket.create_server(("127.0.0.1", 0))
        scheme = "https" if context else "http"
        self.url = f"{scheme}://localhost:{self.listening.getsockname()[1]}/v1"
        self.threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> RawServer:
        self.threads[0].start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.closing.set()
        with contextlib.suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        for thread in self.threads:
            thread.join(10)

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            self.threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
            self.threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:  # the client may leave at any time
            if self.context is not None:
                connection = self.context.wrap_socket(connection, server_side=True)
            with connection:
                data = b""
                while b"\r\n\r\n" not in data:
                    part = connection.recv(1 << 16)
                    if not part:
                        return
                    data += part
                head, _, body = data.partition(b"\r\n\r\n")
                lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-l")]
                while len(body) < int(lengths[0] if lengths else 0):
                    body += connection.recv(1 << 16)
                self.requests.append((head.decode(), json.loads(body) if body else {}))
                self.answer(*self.requests[-1], connection)


def http(body: bytes | str, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    """An HTTP answer."""
    body = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + body


def right_answer(body: dict[str, Any]) -> dict[str, Any]:
    """What vLLM answers to a request with a plain prompt or token ids, with tokens and log-probabilities."""
    prompt = body["prompt"]
    ids = tiny_tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    generator = random.Random(body["seed"])
    choices = []
    for i in range(body.get("n", 1)):
        drawn = [generator.randrange(5, 160) for _ in range(min(3, body["max_tokens"] - 1))] + [2]
        logprobs = {"token_logprobs": [-5.0] * len(drawn)}
        choices.append({"index": i, "text": "go", "finish_reason": "stop", "token_ids": drawn, "logprobs": logprobs})
    for choice in choices:
        choice["prompt_token_ids"] = list(ids)
    return {"object": "text_completion", "choices": choices, "usage": {"prompt_tokens": len(ids)}}

"""A proxy in front of a real server, which can answer like vLLM and make faults."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from benchmarks.serving import PATIENCE


class Proxy:
    """Passes requests on to a server. It answers like vLLM if told to, and makes the faults it is told to make.

    Until it is entered it has its port, and refuses connections there.

    Args:
        faults: {number of the POST request, from 0: its fault}.
        like_vllm: reads sampling parameters as fields and prompts as token ids, and honours ``n``.

    Attributes:
        log: one entry for each POST request: its body, its fault, and the texts that were sent in full.
    """

    def __init__(
        self, server: str, faults: dict[int, str] | None = None, like_vllm: bool = False, tokenizer: Any = None
    ) -> None:
        self.server, self.faults, self.like_vllm, self.tokenizer = server, faults or {}, like_vllm, tokenizer
        self.log: list[dict[str, Any]] = []
        self.on_request: Callable[[int], None] = lambda number: None
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler, bind_and_activate=False)
        self.http.daemon_threads = True
        self.http.server_bind()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self) -> Proxy:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with proxy.lock:
                    number = len(proxy.log)
                    entry = {"body": body, "fault": proxy.faults.get(number), "texts": []}
                    proxy.log.append(entry)
                proxy.on_request(number)
                self.close_connection = True
                with contextlib.suppress(ConnectionError):  # the client has closed the connection
                    proxy.answer(self, self.path, entry)

        self.http.RequestHandlerClass = Handler
        self.http.server_activate()
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def answer(self, handler: BaseHTTPRequestHandler, path: str, entry: dict[str, Any]) -> None:
        fault = entry["fault"]
        if fault == "closed":
            return
        if fault in ("429", "500", "503", "400"):
            handler.send_response(int(fault))
            if fault == "429":
                handler.send_header("Retry-After", "1")
            handler.end_headers()
            handler.wfile.write(b'{"error": {"message": "injected"}}')
            return
        if fault == "slow":
            handler.connection.recv(1)  # until the client has gone
            return
        if fault == "drip":
            handler.send_response(200)
            handler.end_headers()
            for _ in range(400):  # blanks before an answer that is whole in the end, for a client that waits for it
                handler.wfile.write(b" ")
                time.sleep(0.05)
        status, answer = self.forward(path, entry["body"])
        answer = {"no choices": {**answer, "choices": []}, "no text": {**answer, "choices": [{}]}}.get(fault, answer)
        if fault == "fewer":
            answer["choices"] = answer["choices"][:2]
        if fault == "more":
            answer["choices"] = answer["choices"] * 2
        if fault == "other tokens":
            answer["usage"]["prompt_tokens"] += 1
        if fault == "aborted":
            answer["choices"][0]["finish_reason"] = "abort"
        data = json.dumps(answer).encode()
        if fault == "truncated JSON":
            data = data[: len(data) // 2]
        if fault == "HTML":
            data = b"<html>busy</html>"
        if fault != "drip":
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
        if fault == "half":
            handler.wfile.write(data[: len(data) // 2])
        elif fault == "reset":
            handler.wfile.write(data[: len(data) // 2])
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(handler.connection.detach())  # RST instead of an end
        else:
            if status == 200 and fault in (None, "fewer"):  # before it is sent: the test may look at once
                entry["texts"] = [c.get("text", c.get("message", {}).get("content")) for c in answer["choices"]]
            handler.wfile.write(data)

    def forward(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if not self.like_vllm:
            return self.ask(path, body)
        body = dict(body)
        settings = {"do_sample": True, "eos_token_id": body.pop("stop_token_ids")}
        settings |= {name: body.pop(name) for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
        settings["top_k"] = max(body.pop("top_k"), 0)
        body.pop("return_token_ids", None)  # as releases without this field do
        body["generation_config"] = json.dumps(settings)
        ids = body.get("prompt")
        if isinstance(ids, list):
            body["prompt"] = self.tokenizer.decode(ids)
        answers = [self.ask(path, {**body, "seed": body["seed"] + i}) for i in range(body.pop("n", 1))]
        status, answer = answers[0]
        if status == 200:
            answer["choices"] = [{**a["choices"][0], "index": i} for i, (_, a) in enumerate(answers)]
            if isinstance(ids, list):
                answer["usage"]["prompt_tokens"] = len(ids)
        return status, answer

    def ask(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(
            self.server + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return 200, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

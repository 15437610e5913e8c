"""API keys: where they go, and all the places where they do not."""

from __future__ import annotations

import json
import logging
import ssl
import traceback
from pathlib import Path
from typing import Any

import pytest

from d2o_fast.anchors.fingerprint import expected_fingerprint
from d2o_fast.cli import main
from d2o_fast.config import D2OConfig
from d2o_fast.data.reading import rows_from
from d2o_fast.errors import D2OError
from d2o_fast.sampling import server as server_module
from d2o_fast.sampling.protocol import Sampling, ServerPrompt
from d2o_fast.sampling.server import ServerSampler
from paths import SUPPORT
from raw_server import Answer, RawServer, http, right_answer
from stores import build
from tiny import VOCAB_SIZE, save_tiny, tiny_model, tiny_rows, tiny_tokenizer

KEY = "k3y-0123456789abcdefghij"
PROMPT = ServerPrompt("how to open?", tiny_tokenizer()("how to open?")["input_ids"], "here, row 1")
HOW = Sampling(max_new_tokens=6, temperature=1.0, top_p=1.0, eos_token_ids=(2,), seed=(0, 0))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2O_TEST_KEY", KEY)
    monkeypatch.setattr(server_module, "ATTEMPTS", 3)
    monkeypatch.setattr(server_module, "FIRST_DELAY", 0.001)


def right(head: str, body: dict[str, Any], connection: Any) -> None:
    connection.sendall(http(json.dumps(right_answer(body))))


def sampler(url: str, variable: str | None = "D2O_TEST_KEY") -> ServerSampler:
    return ServerSampler(url, "m", 1, 60.0, key_variable=variable, vocabulary=VOCAB_SIZE)


def keys_of(server: RawServer) -> list[str]:
    """The Authorization of each request, "" without one."""
    lines = [
        [line for line in head.split("\r\n") if line.lower().startswith("authorization:")]
        for head, _ in server.requests
    ]
    assert all(len(found) <= 1 for found in lines)
    return [found[0].partition(": ")[2] if found else "" for found in lines]


def test_the_key_goes_with_every_request_if_a_variable_is_named() -> None:
    with RawServer(right) as server:
        sampler(server.url).sample([PROMPT], 3, HOW)
        assert keys_of(server) == [f"Bearer {KEY}"] * 2
        sampler(server.url, None).sample([PROMPT], 3, HOW)
        assert keys_of(server)[2:] == ["", ""]
        assert KEY not in json.dumps([body for _, body in server.requests])


def test_the_key_is_read_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with RawServer(right) as server:
        one = sampler(server.url)
        monkeypatch.setenv("D2O_TEST_KEY", "another")
        one.sample([PROMPT], 3, HOW)
        assert keys_of(server) == ["Bearer another"] * 2
        assert KEY not in repr(vars(one))
        assert "another" not in repr(vars(one))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "not set"),
        ("", "empty"),
        *(
            (value, "not one word of ASCII characters")
            for value in (f"{KEY}\n", f"{KEY}\r\nX: y", f" {KEY}", "a b", "\t")
        ),
        *(
            (value, "not one word of ASCII characters")
            for value in (f"{KEY}é", f"{KEY}\u2028", f"{KEY}\x7f", f"{KEY}\udcff")
        ),
    ],
)
def test_a_variable_without_a_usable_key(
    value: str | None, found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("D2O_TEST_KEY")
    if value is not None:
        monkeypatch.setenv("D2O_TEST_KEY", value)
    with RawServer(right) as server:
        config = D2OConfig(max_length=64, max_completion_length=12, server_url=server.url, server_model="m",
                           server_api_key_env="D2O_TEST_KEY")  # fmt: skip
        with pytest.raises(
            D2OError, match=f"^server_api_key_env names an environment variable that is {found}"
        ) as error:
            build(tmp_path / "s", config=config)
        assert server.requests == []
    assert KEY not in str(error.value)
    assert not list((tmp_path / "s").glob("shard*"))


def test_over_plain_http_a_key_stays_on_this_machine() -> None:
    with pytest.raises(D2OError, match=r"^server_url is 'http://example.com'; it must be an https address"):
        sampler("http://example.com")
    sampler("http://example.com", None)


# --- Servers that repeat the key, or want it elsewhere ---------------------------------------------------------------


def echo(form: str, cut: int = 100) -> Answer:
    def answer(head: str, body: dict[str, Any], connection: Any) -> None:
        found = next(line for line in head.split("\r\n") if line.startswith("Authorization"))[:cut]
        said = right_answer(body)
        said["choices"][0]["text"] = found
        data = {
            "error": http(f"bad: {found}", "400 Bad"),
            "busy": http(f"bad: {found}", "503 Busy"),
            "far into an error": http("x" * (197 - len(found)) + found + "x" * 99, "401 Bad"),
            "reason": http("", f"404 {found}"),
            "location": http("", "302 Found", f"Location: http://example.com/?{found}"),
            "no HTTP": f"{found}\r\n\r\n".encode(),
            "no JSON": http(found),
            "JSON": http(json.dumps({"error": found})),
            "a field": http(json.dumps({"choices": found})),
            "far into a field": http(json.dumps({"choices": "x" * 50 + found + "x" * 99})),
            "compression": http("", "200 OK", f"Content-Encoding: {found}"),
            "response": http(json.dumps(said)),
        }
        connection.sendall(data[form])

    return answer


FORMS = ("error", "busy", "far into an error", "reason", "location", "no HTTP", "no JSON", "JSON", "a field",
         "far into a field", "compression", "response")  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_server_that_repeats_the_key(form: str, caplog: pytest.LogCaptureFixture) -> None:
    for cut in (100, 100 if form == "response" else 40):
        with RawServer(echo(form, cut)) as server, caplog.at_level(logging.DEBUG, logger="d2o_fast"):
            with pytest.raises(D2OError) as error:
                sampler(server.url).sample([PROMPT], 3, HOW)
            assert len(set(keys_of(server))) == 1
        found = traceback.TracebackException.from_exception(error.value, capture_locals=True)
        shown = "".join(found.format()).replace(f"KEY = {KEY!r}", "")
        own = [line for line in shown.splitlines() if "raw_server" not in line]  # the server's own memory
        for text in (str(error.value), caplog.text, "\n".join(own)):
            assert all(KEY[i : i + 8] not in text for i in range(len(KEY) - 7)), text


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_neither_key_nor_prompt(status: int) -> None:
    with RawServer(right) as other:

        def move(head: str, body: dict[str, Any], connection: Any) -> None:
            connection.sendall(http("", f"{status} Moved", f"Location: {other.url}/completions"))

        with RawServer(move) as server:
            with pytest.raises(
                D2OError, match=rf"HTTP {status} Moved: it sends on to '{other.url}/completions', and red"
            ):
                sampler(server.url).sample([PROMPT], 3, HOW)
            assert len(server.requests) == 1
        assert other.requests == []


def test_proxies_of_the_environment_get_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with RawServer(right) as proxy, RawServer(right) as server:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        sampler(server.url).sample([PROMPT], 3, HOW)
        url = server.url
    with pytest.raises(D2OError, match=r"refused .*; proxies of the environment are not used"):
        sampler(url).sample([PROMPT], 3, HOW)
    assert proxy.requests == []


# --- https -----------------------------------------------------------------------------------------------------------


def certified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(SUPPORT / "localhost.pem")
    return context


def test_https_with_a_certificate_that_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(SUPPORT / "localhost.pem"))
    with RawServer(right, certified()) as server:
        assert len(sampler(server.url).sample([PROMPT], 3, HOW)[0]) == 3
        assert keys_of(server) == [f"Bearer {KEY}"] * 2
        elsewhere = server.url.replace("localhost", "127.0.0.1")
        with pytest.raises(
            D2OError, match=r"SSLCertVerificationError: .*IP address mismatch.*\. Check that server_url"
        ):
            sampler(elsewhere).sample([PROMPT], 3, HOW)
        assert len(server.requests) == 2


def test_https_drips_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(SUPPORT / "localhost.pem"))

    def silent(head: str, body: dict[str, Any], connection: Any) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        connection.recv(1)

    with RawServer(silent, certified()) as server:
        one = sampler(server.url)
        one.timeout = 0.3
        with pytest.raises(D2OError, match=r"no answer within 0.3 s .attempt 3 of 3"):
            one.sample([PROMPT], 3, HOW)


def test_https_with_a_certificate_that_is_not_trusted() -> None:
    with RawServer(right, certified()) as server:
        with pytest.raises(D2OError, match=r"SSLCertVerificationError: .*self.signed.*SSL_CERT_FILE"):
            sampler(server.url).sample([PROMPT], 3, HOW)
        assert server.requests == [], "no key before the certificate"


@pytest.mark.parametrize("answer", [b"hello\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28"], ids=["plain http", "an alert"])
def test_https_to_something_else(answer: bytes) -> None:
    """An SSL error says so at once; no plain request follows."""
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(
            D2OError, match=r"here, row 1: SSLError: .*Check that server_url is right to begin with https"
        ):
            sampler(f"https://localhost:{listening.getsockname()[1]}").sample([PROMPT], 3, HOW)
        thread.join(10)


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_file_and_no_line_holds_the_key(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that sample, train with checkpoints, and train again where the key is not set any more."""
    save_tiny(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(4)))
    with RawServer(without_logprobs) as server:
        settings = {
            "model_name_or_path": str(tmp_path / "model"),
            "dataset_name": str(tmp_path / "data.jsonl"),
            "output_dir": str(tmp_path / "run"),
            "max_length": 64,
            "max_completion_length": 12,
            "num_generations": 2,
            "max_steps": 2,
            "save_steps": 1,
            "server_url": server.url,
            "server_api_key_env": "D2O_TEST_KEY",
        }
        (tmp_path / "config.yaml").write_text(json.dumps(settings))
        assert main(["sample", str(tmp_path / "config.yaml")]) == 0
        asked = keys_of(server)
        assert set(asked) == {f"Bearer {KEY}"}
        monkeypatch.delenv("D2O_TEST_KEY")
        assert main(["train", str(tmp_path / "config.yaml")]) == 0
        assert keys_of(server) == asked, "a finished store needs no server and no key"
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"d2o_config.yaml", "README.md"} <= {path.name for path in files}
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def without_logprobs(head: str, body: dict[str, Any], connection: Any) -> None:
    """Answers right, and lets the weights unchecked."""
    answer = right_answer(body)
    for choice in answer["choices"]:
        del choice["logprobs"]
    connection.sendall(http(json.dumps(answer)))


def test_fingerprint_and_repr_know_no_key() -> None:
    plain = D2OConfig(server_url="https://example.com/v1")
    config = D2OConfig(server_url="https://example.com/v1", server_api_key_env="D2O_TEST_KEY")
    assert KEY not in repr(config)
    of = [expected_fingerprint(tiny_model(), tiny_tokenizer(), rows_from(tiny_rows(1)), c) for c in (plain, config)]
    assert of[0] == of[1]
    assert "example.com" not in json.dumps(of[0])

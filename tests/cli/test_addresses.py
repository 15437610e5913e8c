"""Addresses of servers, and settings whose values may be secrets: what is refused, and that no message shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from d2o_fast.checks import is_confidential
from d2o_fast.cli import main
from d2o_fast.config import D2OConfig
from d2o_fast.errors import D2OError

SECRET = "hunter2"
WITH_SECRET: list[tuple[str, Any]] = [
    *(
        ("server_url", text)
        for text in (
            "http://user:hunter2@host:8000/v1",
            "https://hunter2@host",
            "https://:hunter2@host",
            "http://user:hun/hunter2@host",
            "http://user:hunter2%40host",
            "http://user:hunter2＠host",
            "user:hunter2@host",
            "http:/user:hunter2@host",
            "http:\\\\user:hunter2@host",
            "//user:hunter2@host",
            "http://host/v1?key=hunter2",
            "http://host/v1?hunter2",
            "https://host/v1/?api_key=hunter2&x=1",
            "https://host/v1;api_key=hunter2",
            "https://host/v1&api_key=hunter2",
            "http://host#hunter2",
            "http://host?#hunter2",
            "http://[::1?key=hunter2",
            " http://user:hunter2@host",
            "http://user:hunter2@host\n",
        )
    ),
    ("server_url", ["http://user:hunter2@host"]),
    ("server_url", {"http://user:hunter2@host": None}),
    ("server_api_key_env", "sk-hunter2"),
    ("server_api_key_env", "$hunter2"),
    ("server_api_key_env", "Bearer hunter2"),
    ("server_api_key_env", ["hunter2"]),
    ("server_api_key_env", "hunter2"),  # a name, but there is no server_url
]


@pytest.mark.parametrize(("name", "value"), WITH_SECRET)
def test_no_refusal_shows_a_secret(name: str, value: Any, tmp_path: Path, capsys: Any) -> None:
    """From Python, from the file and from a flag."""
    with pytest.raises(D2OError) as error:
        D2OConfig(**{name: value})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({name: value}, allow_unicode=True))
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    if isinstance(value, str):
        assert main(["train", f"--{name}={value}"]) == 2
        assert main(["train", f"--{name}", value]) == 2
    said = [str(error.value), *capsys.readouterr().err.splitlines()]
    assert len(said) == (4 if isinstance(value, str) else 2), said
    for line in said:
        assert f"{name} is a " in line
        assert "; it must be " in line
        assert "not shown because it may hold a secret" in line
        assert "api_key" in line
        assert SECRET not in line


def test_a_file_that_is_no_yaml_is_not_quoted(tmp_path: Path, capsys: Any) -> None:
    for text in ('server_url: "http://user:hunter2@host\n', "server_url: http://u:hunter2@host: x\n", "a: [hunter2\nb"):
        (tmp_path / "config.yaml").write_text(text)
        assert main(["train", str(tmp_path / "config.yaml")]) == 2
        said = capsys.readouterr().err
        assert "is not YAML" in said
        assert "line 1" in said
        assert SECRET not in said


@pytest.mark.parametrize(
    "url",
    [
        *("http://[::1", "http://::1", "http://[1::2::3]", "http://[::1]8000", "http://[::1]:x", "http://[fe80::1"),
        *("localhost:8000", "localhost", "//host", "/v1", "http", "http:", "http:/host", "http//host", "http://"),
        *("ftp://host", "file:///etc/passwd", "unix:///run/x", "ws://host", "javascript:1"),
        *(
            "http://host:",
            "http://host:x",
            "http://host:0",
            "http://host:65536",
            "http://host:-1",
            "http://host:8000:1",
        ),
        *("http:///v1", "http://.", "http://a..b", "http://-a", "http://a-", f"http://{'a' * 64}"),
        *("http://my host", "http://host /v1", "http://host/a b", "http://host/\x1b[31m", "http://host\r\nX: y"),
        *("http://bücher.example", "http://xn--ü", "http://ⓛocalhost", "http://host/ü", "http://host\\v1"),
        "http://" + ".".join(["a" * 63] * 4),
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(
        D2OError, match=r"^server_url is .*; it must be an address like 'http://localhost:8000/v1'"
    ) as e:
        D2OConfig(server_url=url)
    assert str(e.value).isprintable()


@pytest.mark.parametrize(
    "url",
    [
        *("http://localhost", "http://localhost:8000", "http://localhost:8000/v1/", "HTTP://LOCALHOST/v1"),
        *("http://127.0.0.1:1", "http://[::1]:65535/v1", "https://[2001:db8::1]", "http://node_7.cluster.local."),
        *("https://gateway.example/a%20b/team~x/v1", "http://xn--bcher-kva.example", "http://10.0.0.1"),
    ],
)
def test_addresses_that_are_some(url: str) -> None:
    assert D2OConfig(server_url=url).server_url == url


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://example.com", True),
        *((f"http://{host}:8000/v1", True) for host in ("localhost", "LOCALHOST", "localhost.", "127.0.0.1", "[::1]")),
        ("http://127.8.8.8", True),
        *(
            (f"http://{host}", False)
            for host in ("example.com", "10.0.0.1", "192.168.1.2", "0.0.0.0", "[::]", "[fe80::1]")
        ),
        *(
            (f"http://{host}", False)
            for host in ("localhost.example.com", "127.0.0.1.example.com", "localhost-x", "1.27")
        ),
    ],
)
def test_with_a_key_plain_http_stays_on_this_machine(url: str, safe: bool) -> None:
    assert is_confidential(url) is safe
    settings = {"server_url": url, "server_api_key_env": "SOME_KEY"}
    if safe:
        D2OConfig(**settings)
        return
    with pytest.raises(
        D2OError, match=r"^server_url is .*; it must be an https address, or one of this machine, while"
    ):
        D2OConfig(**settings)
    D2OConfig(server_url=url)

"""Texts of errors and of the log, as a terminal gets them."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from d2o_fast import cli
from d2o_fast.errors import D2OError, printable, refusal, shortened

HOSTILE = "red \x1b[31m, title \x1b]0;x\x07, C1 \x9b2J, back \x08\r, turned \u202e, hidden \u200b, half \ud800"


def test_no_control_character_is_printed() -> None:
    for character in [*map(chr, (*range(9), *range(11, 32), *range(127, 160))), *"\u202e\u200b\ud800"]:
        assert printable(f"a{character}b").isprintable()
        assert shortened(f"a{character}b", one_line=True).isprintable()
        assert printable(character) in (repr(character)[1:-1], f"\\x{ord(character):02x}")


def test_what_people_write_stays() -> None:
    text = "Grüße, 日本語, ελληνικά, 🚀\n\tin a second line"
    assert printable(text) == text
    assert printable("") == ""
    assert printable(HOSTILE).count("\\") == 9


def test_shortened_is_printable_and_never_longer() -> None:
    assert shortened("\x1b" * 100, 40) == "\\x1b" * 9 + "\\..."
    assert len(shortened("\x1b" * 100, 40)) == 40
    assert shortened(" a\n b\t", one_line=True) == "a b"
    assert shortened("a" * 40) == "a" * 40
    assert shortened("a" * 41) == "a" * 37 + "..."
    assert shortened("x" * 100_000_000, 200) == "x" * 197 + "..."


def test_the_command_prints_no_escape_sequence(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: str, arguments: list[str]) -> int:
        cli._show_log()
        logging.getLogger("d2o_fast").warning("log: %s", HOSTILE)
        raise D2OError(f"error: {HOSTILE}")

    monkeypatch.setattr(cli, "_run", fails)
    assert cli.main(["train"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("red \\x1b[31m") == 2
    assert printed.replace("\n", "").isprintable()


def test_a_refusal_is_one_printable_line() -> None:
    assert str(refusal("seed", HOSTILE + "\n", "a number")).isprintable()

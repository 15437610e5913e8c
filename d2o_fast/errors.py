"""Errors that a user can act on."""

from __future__ import annotations

import reprlib
import unicodedata

_JOINERS = "\u200c\u200d"  # join and part letters in Persian, Hindi and emoji


class D2OError(ValueError):
    """A fault in the input, the configuration or a folder. The message gives the remedy, and is safe to print."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class UnknownSettingError(D2OError, TypeError):
    """A setting of ``D2OConfig`` that does not exist, or one without its name."""


class DataError(D2OError):
    """One fault in the data, with its source, row and field."""

    def __init__(self, source: str, row: int | None, field: str | None, found: str, fix: str) -> None:
        self.source, self.row, self.field, self.found, self.fix = source, row, field, found, fix
        place = printable(source, one_line=True) + ("" if row is None else f", row {row}")
        if field is not None:
            place += f", field '{printable(field, one_line=True)}'"
        super().__init__(f"{place}: {found}. {fix}")


class FingerprintError(D2OError):
    """The stored anchors and reference scores were made under other conditions than the current ones."""

    def __init__(self, folder: str, differences: dict[str, tuple[object, object]]) -> None:
        self.differences = differences
        lines = [f"  {name}: stored {old!r}, now {new!r}" for name, (old, new) in differences.items()]
        super().__init__(
            f"{folder}: its anchors and reference scores were made under other conditions:\n"
            + "\n".join(lines)
            + "\nSet these back, or choose another anchors_dir to make new ones."
        )


def printable(text: str, one_line: bool = False) -> str:
    """``text`` with escapes for characters that steer a terminal or hide: controls, bidi marks, lone surrogates.

    Newlines and tabs stay, unless it must be one line.
    """
    if text.isascii() and text.isprintable():
        return text
    kept = _JOINERS if one_line else _JOINERS + "\n\t"
    return "".join(
        c
        if c.isprintable() or c in kept or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else c.encode("unicode_escape").decode()
        for c in text
    )


def shortened(text: str, limit: int = 40, one_line: bool = False) -> str:
    """Printable ``text``, or its beginning and an ellipsis. ``one_line`` replaces all white space by single spaces."""
    text = " ".join(text.split()) if one_line else text
    text = printable(text[: limit + 1])  # the rest may be millions of characters
    return text if len(text) <= limit else text[: limit - 3] + "..."


def refusal(name: str, found: object, wanted: str) -> D2OError:
    """The error of a setting, in one line."""
    return D2OError(f"{name} is {shown(found)}; it must be {wanted}")


def shown(value: object) -> str:
    """``value`` as code in one short line, however large or deep it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    try:
        return shortened(short.repr(value), 200, one_line=True)
    except Exception:  # an integer with more digits than Python writes; a class may raise anything
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"

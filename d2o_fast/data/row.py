"""The two forms of a row: as text (``Row``) and as token ids (``Example``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]


Text = str | Messages


@dataclass(frozen=True)
class Row:
    """One prompt with one negative. ``index`` is the row in ``source``, counted from 1; in a .jsonl file, the line."""

    prompt: Text
    rejected: Text  #: a string, or a list of one assistant message
    anchors: list[Any] | None  #: responses like ``rejected``; None if they are still to be sampled
    source: str
    index: int


@dataclass(frozen=True)
class Example:
    """One prompt with its negative and its anchors, as token ids."""

    prompt_ids: list[int]
    rejected_ids: list[int]  #: the negative, ending in EOS unless it was cut
    anchor_ids: list[list[int]]  #: K anchors
    #: K + 1 sums in nats: log ref+ of the negative, then log ref- of each anchor; [] if unscored
    ref_logps: list[float]

    def responses(self) -> list[list[int]]:
        """The negative first, then the anchors: the order of ``ResponseLayout``."""
        return [self.rejected_ids, *self.anchor_ids]

    def num_tokens(self) -> int:
        """Tokens of all responses, each with its prompt.

        The transformer reads fewer if prompts are shared. This count makes tokens per second comparable between runs
        with and without sharing.
        """
        return sum(len(self.prompt_ids) + len(response) for response in self.responses())


def prompt_key(row: Row) -> str:
    """Equal for rows with the same prompt. A single message of the user counts as its content."""
    prompt = row.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        prompt = prompt[0]["content"]
    return json.dumps(prompt, sort_keys=True)


_canonical = json.JSONEncoder(sort_keys=True, default=str).encode


def row_key(row: Row) -> str:
    """Equal for rows with the same prompt, negative and anchors."""
    return _canonical([row.prompt, row.rejected, row.anchors])


def prompt_text(row: Row) -> str:
    """The prompt as a judge sees it: the string itself, or ``role: content`` of each message.

    A single message of the user gives only its content.
    """
    if isinstance(row.prompt, str):
        return row.prompt
    if len(row.prompt) == 1 and row.prompt[0]["role"] == "user":
        return row.prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in row.prompt)

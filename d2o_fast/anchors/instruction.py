"""Puts an instruction around prompts while anchors are drawn. Scoring uses the bare prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Row
from d2o_fast.data.tokens import encode_prompts
from d2o_fast.errors import DataError

PLACE = "{prompt}"  #: the prompt replaces it in an instruction


def instructed(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: D2OConfig
) -> Iterator[tuple[Row, list[int]]]:
    """Each row with ``config.sampling_instruction`` around its prompt, and the token ids of that prompt.

    Raises:
        DataError: the instruction does not fit a prompt or its chat template, or the prompt would be cut.
    """
    limit = config.max_length - config.max_completion_length
    wrapped = [_wrapped(row, str(config.sampling_instruction)) for row in rows]
    encoded = encode_prompts(wrapped, tokenizer)
    for row, instructed_row, bare in zip(rows, wrapped, encode_prompts(rows, tokenizer), strict=True):
        try:
            ids = next(encoded)
        except DataError as error:
            found = f"with sampling_instruction {error.found}"
            fix = f"If the template has no system role, put {PLACE} into the instruction: it then goes to the user"
            raise DataError(row.source, row.index, "prompt", found, fix) from error
        if ids == bare:
            found = "the chat template leaves sampling_instruction out"
            fix = f"Put {PLACE} into the instruction: it then goes into the user's message"
            raise DataError(row.source, row.index, "prompt", found, fix)
        if len(ids) > limit:
            found = f"with sampling_instruction it has {len(ids)} tokens, and max_length would cut it to {limit}"
            raise DataError(row.source, row.index, "prompt", found, "Raise max_length, or shorten one of the two")
        yield instructed_row, ids


def _wrapped(row: Row, instruction: str) -> Row:
    if isinstance(row.prompt, str):
        if PLACE not in instruction:
            found = f"a plain text, and sampling_instruction has no {PLACE} where it could stand"
            raise DataError(row.source, row.index, "prompt", found, f"Put {PLACE} into sampling_instruction")
        return replace(row, prompt=instruction.replace(PLACE, row.prompt))
    messages = list(row.prompt)
    if PLACE in instruction:
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not asked:
            found = f"no message of the user that could stand at sampling_instruction's {PLACE}"
            raise DataError(row.source, row.index, "prompt", found, f"Leave {PLACE} out: it is then a system message")
        content = instruction.replace(PLACE, messages[asked[-1]]["content"])
        messages[asked[-1]] = {**messages[asked[-1]], "content": content}
    elif messages[0]["role"] in ("system", "developer"):
        messages[0] = {**messages[0], "content": f"{instruction}\n\n{messages[0]['content']}"}
    else:
        messages.insert(0, {"role": "system", "content": instruction})
    return replace(row, prompt=messages)

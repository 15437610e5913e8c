"""What ``d2o sample --dry-run`` prints: what was understood of the data. No model is loaded and nothing is written."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from d2o_fast.config import D2OConfig
from d2o_fast.data import Row, prompt_key
from d2o_fast.tokens import cut_prompt, encode_rows

BAR = 40  #: characters of a histogram's longest bar
SHOWN = 400  #: characters that an example shows of a prompt and of a negative


def describe(name: str, rows: Sequence[Row], tokenizer: Any, config: D2OConfig) -> str:
    """Counts, lengths in tokens, what would be cut or refused, and three examples with the region of the loss marked.

    Raises:
        DataError: a row that sampling would refuse for anything but its length.
    """
    limit, most = config.max_length - config.max_completion_length, config.max_completion_length
    prompts, negatives, anchors = list[int](), list[int](), list[int]()
    shown, examples = {0, len(rows) // 2, len(rows) - 1}, []
    for i, (row, (prompt_ids, responses, _)) in enumerate(zip(rows, encode_rows(rows, tokenizer), strict=True)):
        prompts.append(len(prompt_ids))
        negatives.append(len(responses[0]))
        anchors += map(len, responses[1:])
        if i in shown:
            prompt_ids = cut_prompt(prompt_ids, limit, config.truncation_mode, tokenizer.bos_token_id)
            examples += _example(row, prompt_ids, responses[0][:most], tokenizer)
    given = sum(row.anchors is not None for row in rows)
    distinct = len({prompt_key(row) for row in rows})
    refused = [row for row, length in zip(rows, prompts, strict=True) if length > config.max_length]
    side = "start" if config.truncation_mode == "keep_end" else "end"
    lines = [
        f"{name}: {len(rows)} negatives of {distinct} prompts; {(len(rows) - given) * config.draws} anchors "
        f"to draw, {len(anchors)} given with {given} rows",
        *histogram("tokens of a prompt", prompts),
        *histogram("tokens of a negative, its end included", negatives),
        *(histogram("tokens of a given anchor, its end included", anchors) if anchors else []),
        f"would be cut: {sum(length > limit for length in prompts)} prompts lose their {side} (at {limit} tokens), "
        f"{sum(length > most for length in negatives)} negatives and {sum(length > most for length in anchors)} given "
        f"anchors lose their end (at {most})",
    ]
    if refused:
        place = f"{refused[0].source}, row {refused[0].index}"
        lines.append(
            f"would be refused: {len(refused)} prompts of more than max_length = {config.max_length} tokens; the first "
            f"is {place}"
        )
    return "\n".join([*lines, "examples; the loss is on what stands between ⟦ and ⟧:", *examples])


def _example(row: Row, prompt_ids: list[int], negative_ids: list[int], tokenizer: Any) -> list[str]:
    prompt = tokenizer.decode(prompt_ids)
    full = tokenizer.decode([*prompt_ids, *negative_ids])  # together: some tokenizers drop a text's first space
    negative = full[len(prompt) :] if full.startswith(prompt) else tokenizer.decode(negative_ids)
    if len(prompt) > SHOWN:
        prompt = "..." + prompt[-SHOWN:]
    if len(negative) > SHOWN:
        negative = negative[:SHOWN] + "..."
    text = f"{prompt}⟦{negative}⟧".replace("\n", "\n    ")
    return [f"  {row.source}, row {row.index}:", f"    {text}"]


def histogram(title: str, lengths: Sequence[int]) -> list[str]:
    """Range, median and mean of the lengths (at least one), and a bar for each power of two: one line each."""
    low, high = min(lengths), max(lengths)
    counts = Counter(length.bit_length() for length in lengths)
    lines = [f"{title}: {low} to {high}, median {statistics.median(lengths):g}, mean {statistics.fmean(lengths):.1f}"]
    for bits in range(low.bit_length(), high.bit_length() + 1):
        first, last = max(low, 1 << bits >> 1), min(high, (1 << bits) - 1)
        bar = "#" * -(-counts[bits] * BAR // max(counts.values()))
        lines.append(f"  {first:>6} - {last:<6} {counts[bits]:>8} {bar}".rstrip())
    return lines

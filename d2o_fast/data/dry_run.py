"""The summary of the data that ``d2o sample --dry-run`` prints. It loads no model and writes nothing."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from d2o_fast.config import D2OConfig
from d2o_fast.data.on_disk import Digests
from d2o_fast.data.row import Row, prompt_key
from d2o_fast.data.tokens import cut_prompt, encode_rows, is_too_long, response_room
from d2o_fast.errors import printable

BAR = 40  #: characters of a histogram's longest bar
SHOWN = 400  #: most characters of a prompt, and of a negative, in an example


def describe(name: str, rows: Sequence[Row], tokenizer: Any, config: D2OConfig) -> str:
    """Counts, lengths in tokens, cuts, refusals, and up to three examples with the region of the loss marked.

    Control characters are shown as escapes.

    Raises:
        DataError: sampling would refuse a row for another reason than its length.
    """
    prompts, negatives, anchors = Counter[int](), Counter[int](), Counter[int]()
    given, distinct, refused, first_refused = 0, Digests(), 0, ""
    cut_prompts = cut_negatives = cut_anchors = 0
    shown, examples = {0, len(rows) // 2, len(rows) - 1}, list[str]()
    for i, (row, (prompt_ids, responses, _)) in enumerate(zip(rows, encode_rows(rows, tokenizer), strict=True)):
        prompts[len(prompt_ids)] += 1
        negatives[len(responses[0])] += 1
        anchors.update(map(len, responses[1:]))
        given += row.anchors is not None
        distinct.add(prompt_key(row))
        if is_too_long(prompt_ids, config):
            refused, first_refused = refused + 1, first_refused or f"{row.source}, row {row.index}"
            continue
        kept = cut_prompt(prompt_ids, config, tokenizer.bos_token_id)
        room = response_room(kept, config)
        cut_prompts += len(kept) < len(prompt_ids)
        cut_negatives += len(responses[0]) > room
        cut_anchors += sum(len(anchor) > room for anchor in responses[1:])
        if i in shown:
            examples += _example(row, kept, responses[0][:room], tokenizer)
    lines = [
        f"{name}: {len(rows)} negatives of {distinct.distinct()} prompts; {(len(rows) - given) * config.draws} anchors "
        f"to draw, {anchors.total()} given with {given} rows",
        *histogram("tokens of a prompt", prompts),
        *histogram("tokens of a negative, its end included", negatives),
        *(histogram("tokens of a given anchor, its end included", anchors) if anchors else []),
        f"would be cut: {cut_prompts} prompts lose their start, {cut_negatives} negatives and {cut_anchors} given "
        "anchors their end",
    ]
    if refused:
        lines.append(
            f"would be refused: {refused} prompts for which max_length = {config.max_length} leaves no response; the "
            f"first is {first_refused}"
        )
    return "\n".join([*lines, "examples; the loss is on what stands between ⟦ and ⟧:", *examples])


def _example(row: Row, prompt_ids: list[int], negative_ids: list[int], tokenizer: Any) -> list[str]:
    prompt = tokenizer.decode(prompt_ids)
    full = tokenizer.decode([*prompt_ids, *negative_ids])  # decoded together: some tokenizers drop a text's first space
    negative = full[len(prompt) :] if full.startswith(prompt) else tokenizer.decode(negative_ids)
    if len(prompt) > SHOWN:
        prompt = "..." + prompt[-SHOWN:]
    if len(negative) > SHOWN:
        negative = negative[:SHOWN] + "..."
    text = printable(f"{prompt}⟦{negative}⟧").replace("\n", "\n    ")
    return [f"  {row.source}, row {row.index}:", f"    {text}"]


def histogram(title: str, lengths: Counter[int]) -> list[str]:
    """A line with range, median and mean, then a line with a bar for each power of two.

    Args:
        lengths: the count of each length; not empty.
    """
    low, high = min(lengths), max(lengths)
    mean = sum(length * count for length, count in lengths.items()) / lengths.total()
    counts = Counter[int]()
    for length, count in lengths.items():
        counts[length.bit_length()] += count
    lines = [f"{title}: {low} to {high}, median {_median(lengths):g}, mean {mean:.1f}"]
    for bits in range(low.bit_length(), high.bit_length() + 1):
        first, last = max(low, 1 << bits >> 1), min(high, (1 << bits) - 1)
        bar = "#" * -(-counts[bits] * BAR // max(counts.values()))
        lines.append(f"  {first:>6} - {last:<6} {counts[bits]:>8} {bar}".rstrip())
    return lines


def _median(lengths: Counter[int]) -> float:
    ordered = sorted(lengths)
    upto = list(accumulate(lengths[length] for length in ordered))
    middle = ((upto[-1] - 1) // 2, upto[-1] // 2)  # equal if the number of lengths is odd
    return sum(ordered[bisect_right(upto, place)] for place in middle) / 2

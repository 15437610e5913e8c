"""A dry run's report on the data is equal to numbers counted by hand."""

from __future__ import annotations

import random
import statistics
from collections import Counter

import pytest

from d2o_fast.config import D2OConfig
from d2o_fast.data.dry_run import SHOWN, describe, histogram
from d2o_fast.data.reading import rows_from
from d2o_fast.errors import DataError
from tiny import tiny_rows, tiny_tokenizer

CONFIG = D2OConfig(max_length=64, max_completion_length=32, num_generations=5, truncation_mode="keep_end")


def test_counts_lengths_and_what_would_be_cut() -> None:
    records = [
        {"prompt": "x" * 40, "rejected": "y"},
        {"prompt": "x" * 40, "rejected": "z" * 31},
        {"prompt": "x" * 32, "rejected": "z" * 32, "anchors": ["a", "b" * 32]},
        {"prompt": "x" * 65, "rejected": "y"},
    ]
    text = describe("train", rows_from(records, "here"), tiny_tokenizer(), CONFIG)
    assert text.startswith("train: 4 negatives of 3 prompts; 15 anchors to draw, 2 given with 1 rows\n")
    assert "tokens of a prompt: 32 to 65, median 40, mean 44.2\n      32 - 63            3 ####" in text
    assert "\n      64 - 65            1 ##############\n" in text
    assert "tokens of a negative, its end included: 2 to 33, median 17, mean 17.2\n" in text
    assert "tokens of a given anchor, its end included: 2 to 33," in text
    assert "would be cut: 2 prompts lose their start, 1 negatives and 1 given anchors their end" in text
    assert (
        "would be refused: 1 prompts for which max_length = 64 leaves no response; the first is here, row 4\n" in text
    )


@pytest.mark.parametrize("options", [{}, {"bos": True}, {"prefix_space": True}], ids=["plain", "bos", "prefix space"])
def test_examples_mark_the_region_of_the_loss(options: dict[str, bool]) -> None:
    records = tiny_rows(9)
    text = describe("train", rows_from(records, "here"), tiny_tokenizer(**options), CONFIG)
    start = "<s>" if options.get("bos") else ""
    for i in (0, 4, 8):
        shown = f"  here, row {i + 1}:\n    {start}{records[i]['prompt']}⟦{records[i]['rejected']}</s>⟧"
        assert shown in text
    assert text.count("⟦") == 4, "three, and the line that explains it"
    assert "refused" not in text
    assert "tokens of a given anchor" not in text


def test_an_example_is_shown_as_it_will_be_cut() -> None:
    records = [{"prompt": "abc" + "x" * 35, "rejected": "y" * 40}]
    tokenizer = tiny_tokenizer()
    assert f"\n    {'x' * 32}⟦{'y' * 32}⟧" in describe("eval", rows_from(records), tokenizer, CONFIG)
    longer = D2OConfig(max_length=2048, max_completion_length=1024, truncation_mode="keep_end")
    records = [{"prompt": "x" * 900, "rejected": "y" * 900}]
    text = describe("eval", rows_from(records), tokenizer, longer)
    assert f"\n    ...{'x' * SHOWN}⟦{'y' * SHOWN}...⟧" in text


def test_messages_are_shown_through_the_template() -> None:
    records = [
        {"prompt": [{"role": "user", "content": "how?"}], "rejected": [{"role": "assistant", "content": "no"}]},
    ]
    text = describe("train", rows_from(records), tiny_tokenizer(chat=True), CONFIG)
    assert "<|im_start|>user\n    how?<|im_end|>\n    <|im_start|>assistant\n    ⟦no<|im_end|>⟧" in text


def test_a_fault_is_an_error_here_too() -> None:
    with pytest.raises(DataError, match="no chat template"):
        describe(
            "train",
            rows_from(
                [{"prompt": [{"role": "user", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]}]
            ),
            tiny_tokenizer(),
            CONFIG,
        )


def test_histogram() -> None:
    assert histogram("t", Counter([3])) == ["t: 3 to 3, median 3, mean 3.0", "       3 - 3             1 " + "#" * 40]
    lines = histogram("t", Counter([1, 1, 2, 3, 9]))
    assert [line.split()[:4] for line in lines[1:]] == [
        ["1", "-", "1", "2"],
        ["2", "-", "3", "2"],
        ["4", "-", "7", "0"],
        ["8", "-", "9", "1"],
    ]
    assert [line.count("#") for line in lines[1:]] == [40, 40, 0, 20]


def test_the_median_of_counted_lengths() -> None:
    chance = random.Random(0)
    for count in (1, 2, 3, 10, 101, 102):
        lengths = [chance.randrange(1, 40) for _ in range(count)]
        title = f"t: {min(lengths)} to {max(lengths)}, median {statistics.median(lengths):g}, mean "
        assert histogram("t", Counter(lengths))[0] == f"{title}{statistics.fmean(lengths):.1f}"

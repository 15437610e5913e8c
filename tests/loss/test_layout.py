"""The layout of responses in a packed batch: its results and its refusals."""

from __future__ import annotations

import pytest
import torch

from d2o_fast import ResponseLayout


def test_offsets_lengths_and_index_tensors() -> None:
    layout = ResponseLayout.from_lengths([[3, 1], [2, 4, 1]])
    assert layout == ResponseLayout(torch.tensor([0, 3, 4, 6, 10, 11], dtype=torch.int32), [0, 2, 5])
    assert (layout.num_tokens, layout.num_responses, layout.num_prompts) == (11, 5, 2)
    assert layout.num_anchors == (1, 2)
    assert [layout.token_range(g) for g in range(2)] == [(0, 4), (4, 11)]
    assert layout.tensor("cu_seqlens", "cpu").dtype == layout.tensor("cu_groups", "cpu").dtype == torch.int32
    assert layout.tensor("token_response", "cpu").tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4]
    assert layout.tensor("response_group", "cpu").tolist() == [0, 0, 1, 1, 1]
    assert layout.tensor("is_negative", "cpu").tolist() == [True, False, True, False, False]
    assert layout.tensor("cu_seqlens", "cpu") is layout.tensor("cu_seqlens", "cpu"), "made once per device"


@pytest.mark.parametrize(
    ("cu_seqlens", "cu_groups", "message"),
    [
        ([0, 3, 3, 5], [0, 3], r"response 1 has 0 tokens \(3 to 3\)"),
        ([0, 3, 2], [0, 2], "response 1 has -1 tokens"),
        ([0, 3, 5], [0, 1, 2], r"prompt 0 has 1 response\(s\); it needs its negative and at least one anchor"),
        ([0, 3, 5], [0, 3], "cu_groups ends at 3 but cu_seqlens describes 2 responses"),
        ([1, 3, 5], [0, 2], "cu_seqlens must start at 0"),
        ([0, 3, 5], [0], "cu_groups must start at 0 and describe at least one entry"),
        (torch.tensor([0.0, 3.0, 5.0]), [0, 2], "one-dimensional and of an integer type"),
        (torch.tensor([[0, 3, 5]]), [0, 2], "one-dimensional and of an integer type"),
    ],
)
def test_offsets_that_do_not_fit_are_refused(cu_seqlens: object, cu_groups: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResponseLayout(cu_seqlens, cu_groups)  # type: ignore[arg-type]


def test_offsets_on_a_device_are_refused() -> None:
    """Reading offsets back would make the step wait for the device."""
    with pytest.raises(TypeError, match="cu_seqlens is on meta: pass it as a list or a CPU tensor"):
        ResponseLayout(torch.tensor([0, 3, 5], device="meta"), [0, 2])


def test_negatives_alone_where_they_are_meant() -> None:
    layout = ResponseLayout.from_lengths([[3], [2, 2]], min_anchors=0)
    assert layout.num_anchors == (0, 1)
    with pytest.raises(ValueError, match="prompt 0 has 2 response"):
        ResponseLayout.from_lengths([[3, 2]], min_anchors=2)

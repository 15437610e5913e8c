"""Rows that hold each prompt once, and micro-batches under a token budget."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from d2o_fast.data.row import Example
from d2o_fast.forward.batch import micro_batches, pack, pack_shared, row_tokens
from d2o_fast.forward.shared_sequence import SharedSequence, Spans, slices_index, take_rows

ROW = SharedSequence((3, 1), ((2, 4), (1, 2, 3)))
#      prompts 0-2, 3; responses 4-5, 6-9 | 10, 11-12, 13-15


def test_where_everything_lies() -> None:
    assert ROW.num_prompt_tokens == 4
    assert ROW.longest == 7
    assert ROW.own.cu_q == ROW.own.cu_k == (0, 3, 4, 6, 10, 11, 13, 16)
    assert (ROW.own.max_q, ROW.own.max_k) == (4, 4)
    assert (ROW.cross.cu_q, ROW.cross.cu_k) == ((0, 6, 12), (0, 3, 4))
    assert (ROW.cross.max_q, ROW.cross.max_k) == (6, 3)
    assert ROW.position_ids().tolist() == [0, 1, 2, 0, 3, 4, 3, 4, 5, 6, 1, 1, 2, 1, 2, 3]
    assert slices_index(ROW.predicting()).tolist() == [2, 4, 2, 6, 7, 8, 3, 3, 11, 3, 13, 14]


def test_offsets_are_int32_and_made_once() -> None:
    cpu = torch.device("cpu")
    offsets = ROW.cross.tensor("cu_q", cpu)
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [0, 6, 12]
    assert ROW.cross.tensor("cu_q", cpu) is offsets


def test_equal_neighbours_are_one_run() -> None:
    assert Spans([2, 2, 2, 3, 2], [2, 2, 4, 3, 2]).runs == [
        (2, 0, 2, 0, 2),
        (1, 4, 2, 4, 4),
        (1, 6, 3, 8, 3),
        (1, 9, 2, 11, 2),
    ]


@pytest.mark.parametrize(
    ("window", "keys"),
    [
        (None, [[0, 1, 2], [3], [0, 1, 2, 4, 5], [0, 1, 2, 6, 7, 8, 9], [3, 10], [3, 11, 12], [3, 13, 14, 15]]),
        (2, [[0, 1, 2], [3], [2, 4, 5], [2, 6, 7, 8, 9], [3, 10], [3, 11, 12], [3, 13, 14, 15]]),
        (1, [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9], [10], [11, 12], [13, 14, 15]]),
    ],
)
def test_gathered_keys(window: int | None, keys: list[list[int]]) -> None:
    pieces, spans = ROW.gathered(window)
    index = slices_index(pieces).tolist()
    assert [index[a:b] for a, b in zip(spans.cu_k, spans.cu_k[1:], strict=False)] == keys
    assert spans.cu_q == ROW.own.cu_q


def test_empty_segments_are_refused() -> None:
    for prompts, responses in (((), ()), ((3,), ((),)), ((3, 2), ((1,),))):
        with pytest.raises(ValueError, match="prompts with"):
            SharedSequence(prompts, responses)
    with pytest.raises(ValueError, match="empty segment"):
        _ = SharedSequence((3,), ((2, 0),)).own


def test_a_shared_batch_holds_what_the_padded_one_holds() -> None:
    """Checks by tokens: each response token, the token that predicts it, and the position of the latter."""
    examples = [Example([3, 4, 5], [6, 7], [[8, 9, 10, 11]], []), Example([12], [13], [[14, 15], [16, 17, 18]], [])]
    padded, shared = pack(examples, 0), pack_shared(examples)
    assert shared.shared == ROW
    assert shared.input_ids.tolist() == [[3, 4, 5, 12, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 18]]
    assert torch.equal(shared.targets, padded.targets)
    assert shared.layout == padded.layout
    assert shared.num_tokens == padded.num_tokens == 5 + 7 + 2 + 3 + 4
    positions = torch.arange(padded.input_ids.shape[1]).repeat(5)
    assert shared.position_ids is not None
    for index in ("input_ids", "positions"):
        one = padded.input_ids.flatten() if index == "input_ids" else positions
        other = shared.input_ids[0] if index == "input_ids" else shared.position_ids[0]
        assert torch.equal(one[padded.predict_index], other[shared.predict_index])
    assert row_tokens(examples, shared=True) == shared.input_ids.numel() == 16
    assert row_tokens(examples, shared=False) == padded.input_ids.numel() == 35


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_taking_rows_and_its_gradient(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    pieces = ROW.predicting()
    index = slices_index(pieces)
    grad = torch.randn(len(index), 5, generator=generator, dtype=torch.float64).to(dtype)
    leaf = x.to(dtype, copy=True).requires_grad_()
    out = take_rows(leaf, index, pieces)
    assert torch.equal(out, leaf[index])
    out.backward(grad)
    exact = x.clone().requires_grad_()
    exact[index].backward(grad.double())
    assert leaf.grad is not None
    assert exact.grad is not None
    # bf16: the copies' gradients add up in fp32 and are rounded once
    torch.testing.assert_close(leaf.grad, exact.grad.to(dtype), rtol=1e-6, atol=1e-6)


def cost(batch: list[int]) -> int:
    return sum(batch)


def test_micro_batches_hold_everything_within_the_budget_and_evenly() -> None:
    for seed in range(30):
        chance = random.Random(seed)
        lengths = [chance.randint(1, 100) for _ in range(chance.randint(1, 40))]
        budget = chance.choice((50, 120, 400))
        batches = micro_batches(lengths, lambda n: n, cost, budget)
        assert sorted(n for batch in batches for n in batch) == sorted(lengths)
        assert all(sum(batch) <= budget or len(batch) == 1 for batch in batches)
        # The sum's bound shows that one fewer is impossible; no batch is a small rest if that can be avoided.
        assert len(batches) >= sum(lengths) / max(budget, *lengths)
        assert micro_batches(lengths, lambda n: n, cost, budget) == batches


def test_micro_batches_are_even() -> None:
    batches = micro_batches([10] * 12, lambda n: n, cost, 50)
    assert [sum(batch) for batch in batches] == [40, 40, 40]  # not 50, 50, 20
    assert micro_batches([70, 10, 10], lambda n: n, cost, 50) == [[70], [10, 10]]


def test_a_padded_batch_costs_its_padding() -> None:
    long, short = Example([1] * 20, [2], [[3]], []), Example([1] * 2, [2], [[3]], [])
    padded = partial(row_tokens, shared=False)
    batches = micro_batches([short, long, short, long], lambda example: padded([example]), padded, 88)
    assert [[len(e.prompt_ids) for e in batch] for batch in batches] == [[20, 20], [2, 2]]

"""The products over the kept columns of the gradient against fp64; interpreted on a CPU, compiled on CUDA."""

from __future__ import annotations

import math

import pytest
import torch

from d2o_fast.kernels.filtered_products import (
    BLOCK_PACK,
    DHIDDEN_TILES,
    DWEIGHT_TILES,
    FLAG_ROWS,
    filtered_products,
)
from helpers import assert_close, poison_empty, relative_errors

HALVES = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=["fp32", "bf16", "fp16"])
# n, V, H
SHAPES = {
    "one of everything": (1, 1, 1),
    "one row": (1, 131, 45),
    "fewer columns than a block": (17, 13, 20),
    "nothing divides": (37, 531, 45),
    "all rows fit 16 bytes": (48, 512, 64),
    "rows and columns beyond one program of every kernel": (FLAG_ROWS + 3, 600, 33),
}
MARKS = {"all rows fit 16 bytes": pytest.mark.sanitize, list(SHAPES)[-1]: pytest.mark.slow}
SHAPES_MARKED = [pytest.param(shape, id=name, marks=MARKS.get(name, ())) for name, shape in SHAPES.items()]


@pytest.fixture(autouse=True)
def _no_write_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)


class Problem:
    """A gradient whose columns have sizes from e^-12 to 1, so that a bound keeps some; operands of its dtype."""

    def __init__(self, device, n: int, V: int, H: int, dtype=torch.float32, *, gap: int = 0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        # As logit_grad_ leaves it: rows of a 16-bit gradient occupy the memory of fp32 rows.
        memory = torch.full((n, V + gap), 7.0).to(device)
        self.coef = normal(n).to(device)
        values = self.coef[:, None] * (normal(n, V) * torch.exp(-12 * torch.rand(V, generator=generator))).to(device)
        self.grad = memory.view(dtype)[:, :V] if dtype != torch.float32 else memory[:, :V]
        self.grad.copy_(values)
        self.exact = self.grad.double()
        self.weight, self.hidden = normal(V, H).to(device, dtype), normal(n, H).to(device, dtype)
        self.before = normal(V, H).to(device)
        self.dhidden = torch.empty(n, H, dtype=dtype, device=device)

    def kept(self, eps: float) -> torch.Tensor:
        return (self.exact.float().abs() > eps * self.coef.abs()[:, None]).any(0)

    def run(self, eps: float, *, fresh: bool = False, wide: bool = True) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(dhidden, dweight, kept) from a copy of the gradient in memory of the same layout."""
        span = self.grad.stride(0) * (self.grad.shape[0] - 1) + self.grad.shape[1]
        copy = self.grad.as_strided((span,), (1,)).clone().as_strided(self.grad.shape, self.grad.stride())
        dhidden = torch.empty_like(self.dhidden, dtype=torch.float32 if wide else None)
        dweight = torch.empty_like(self.before) if fresh else self.before.clone()
        kept = filtered_products(copy, self.coef, eps, self.weight, self.hidden, dhidden, dweight, fresh)
        assert kept.shape == ()
        assert kept.dtype == torch.int32
        assert kept.device == self.grad.device
        return dhidden, dweight, int(kept)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES_MARKED)
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "added"])
def test_products_over_the_kept_columns_match_fp64(device, dtype, shape, fresh) -> None:
    problem = Problem(device, *shape, dtype, gap=5)
    for eps in (0.0, 0.02, 0.5):
        dhidden, dweight, count = problem.run(eps, fresh=fresh)
        kept = problem.kept(eps)
        assert count == int(kept.sum())
        exact = problem.exact * kept
        share = exact.T @ problem.hidden.double()
        assert_close(dhidden, exact @ problem.weight.double(), 2e-6)
        if fresh:
            assert_close(dweight, share, 2e-6)
            assert (dweight[~kept] == 0).all()
        else:
            assert_close(dweight, problem.before.double() + share, 2e-6)
            assert torch.equal(dweight[~kept], problem.before[~kept]), "a column that was left out changed its row"


@pytest.mark.slow
@DTYPES
def test_error_against_all_columns_is_within_the_stated_bound(device, dtype) -> None:
    problem = Problem(device, 37, 531, 45, dtype)
    weight, hidden, coef = problem.weight.double(), problem.hidden.double(), problem.coef.double()
    full_dhidden, full_dweight = problem.exact @ weight, problem.exact.T @ hidden
    for eps in (1e-3, 0.1):
        dhidden, dweight, count = problem.run(eps, fresh=True)
        left_out = ~problem.kept(eps)
        assert 0 < count < 531
        rounding = 1e-5
        bound = eps * coef.abs()[:, None] * weight[left_out].abs().sum(0)
        assert ((dhidden - full_dhidden).abs() <= bound + rounding).all()
        bound = eps * (coef.abs()[:, None] * hidden.abs()).sum(0)
        assert ((dweight - full_dweight).abs()[left_out] <= bound).all()
        assert_close(dweight[~left_out], full_dweight[~left_out], 2e-6)


@pytest.mark.slow
@DTYPES
def test_without_a_bound_it_is_the_dense_product(device, dtype) -> None:
    """Every column has nonzero gradients: none is left out, and the error is not above eager's."""
    problem = Problem(device, 48, 600, 64, dtype)
    assert (problem.exact != 0).any(0).all()
    dhidden, dweight, count = problem.run(0.0, fresh=True, wide=False)
    assert count == 600
    for ours, left, right in (
        (dhidden, problem.grad, problem.weight),
        (dweight, problem.grad.T, problem.hidden),
    ):
        reference = left.double() @ right.double()
        found, eager = relative_errors(ours, reference), relative_errors(left @ right, reference)
        # In fp32 both errors are a few roundings, whose sizes mean nothing; the interpreter truncates to bf16.
        truncated = 2**-7 if device.type == "cpu" and dtype == torch.bfloat16 else 0.0
        assert found[0] <= max(eager[0], 1e-6, truncated)
        assert found[1] <= max(eager[1], 1e-6, truncated)


def test_a_bound_above_every_gradient_leaves_nothing(device) -> None:
    problem = Problem(device, 20, 140, 24)
    dhidden, dweight, count = problem.run(1e9, fresh=True)
    assert count == 0
    assert (dhidden == 0).all()
    assert (dweight == 0).all()
    assert torch.equal(problem.run(1e9)[1], problem.before)


def test_one_row_is_enough_to_keep_a_column_and_rows_have_their_own_bounds(device) -> None:
    problem = Problem(device, FLAG_ROWS + 9, 50, 8)
    problem.grad.zero_()
    problem.coef.fill_(1.0)
    problem.coef[3] = 100.0
    problem.grad[FLAG_ROWS + 8, 49] = -0.2  # the last column of the last row, negative
    problem.grad[3, 7] = 5.0  # large, but not beside its coefficient
    problem.grad[4, 9] = 0.1  # equal to the bound in fp32: not above it
    problem.exact = problem.grad.double()
    dhidden, _, count = problem.run(0.1)
    assert count == 1
    assert_close(dhidden[FLAG_ROWS + 8], -0.2 * problem.weight[49].double(), 1e-6)
    assert (dhidden[:FLAG_ROWS] == 0).all()


def test_a_row_without_a_coefficient_asks_for_nothing(device) -> None:
    problem = Problem(device, 4, 60, 8)
    problem.grad[1:] = 0.0
    problem.coef[1:] = 0.0
    problem.exact = problem.grad.double()
    assert problem.run(0.3)[2] == int(problem.kept(0.3)[None].sum())


@pytest.mark.parametrize("where", ["grad", "coef"])
def test_nan_is_never_left_out(device, where) -> None:
    problem = Problem(device, 5, 60, 8)
    getattr(problem, where)[2, ...].fill_(float("nan")) if where == "coef" else problem.grad[2, 31].fill_(math.nan)
    dhidden, dweight, count = problem.run(1e9, fresh=True)
    assert count == (60 if where == "coef" else 1)
    if where == "grad":
        assert dhidden.isnan().all(1).tolist() == [False, False, True, False, False]
        assert dweight.isnan().all(1).nonzero().tolist() == [[31]]


def test_what_is_left_out_is_not_read(device) -> None:
    """The weight row of a dropped column is NaN, and NaN follows the end of every row."""
    problem = Problem(device, 20, 140, 24, gap=4)
    kept = problem.kept(0.1)
    assert 0 < int(kept.sum()) < 140
    expected = problem.run(0.1)[0]
    problem.weight[~kept] = float("nan")
    problem.grad.as_strided((20, 4), (144, 1), 140).fill_(float("nan"))
    assert torch.equal(problem.run(0.1)[0], expected)


@pytest.mark.slow
@pytest.mark.sanitize
def test_packing_crosses_blocks_in_place(device) -> None:
    """There are more kept columns than one block of the walk holds, moved by odd distances."""
    V = 3 * BLOCK_PACK + 77
    problem = Problem(device, 2, V, 3, torch.float16)
    problem.grad[:, :] = torch.arange(V, device=device).remainder(7).half() * problem.coef.half()[:, None]
    problem.exact = problem.grad.double()
    dhidden, dweight, count = problem.run(2.5, fresh=True)
    kept = problem.kept(2.5)
    assert count == int(kept.sum()) > BLOCK_PACK
    exact = problem.exact * kept
    assert_close(dhidden, exact @ problem.weight.double(), 5e-6)
    assert_close(dweight, exact.T @ problem.hidden.double(), 5e-6)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_operands_and_results_of_any_stride(device, dtype) -> None:
    problem = Problem(device, 20, 140, 24, dtype)
    expected_dhidden, expected_dweight, count = problem.run(0.1, fresh=True)
    problem.weight = problem.weight.T.contiguous().T
    problem.hidden = problem.hidden.repeat_interleave(2, dim=1)[:, ::2]
    wide_dhidden = torch.full((20, 40), 7.0, device=device)
    wide_dweight = torch.full((140, 30), 7.0, device=device)
    into = wide_dhidden[:, 8:32], wide_dweight[:, 1:25]
    kept = filtered_products(problem.grad, problem.coef, 0.1, problem.weight, problem.hidden, *into, True)
    assert int(kept) == count
    assert torch.equal(into[0], expected_dhidden)
    assert torch.equal(into[1], expected_dweight)
    for memory, columns in ((wide_dhidden, [*range(8), *range(32, 40)]), (wide_dweight, [0, *range(25, 30)])):
        assert (memory[:, columns] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_results_in_the_operands_dtype_are_rounded_once(device, dtype) -> None:
    problem = Problem(device, 20, 140, 24, dtype)
    wide = problem.run(0.1, fresh=True)
    dhidden, dweight = (torch.empty_like(value, dtype=dtype) for value in wide[:2])
    arguments = (problem.grad, problem.coef, 0.1, problem.weight, problem.hidden)
    filtered_products(*arguments, dhidden, dweight, True)
    for narrow, value in ((dhidden, wide[0]), (dweight, wide[1])):
        bound = torch.finfo(dtype).eps * (1 if device.type == "cpu" else 0.5)  # the interpreter truncates
        assert ((narrow.float() - value).abs() <= bound * value.abs() + 1e-7).all()


@pytest.mark.parametrize("asked", ["dhidden", "dweight", "nothing"])
def test_only_what_is_asked_for(device, asked) -> None:
    problem = Problem(device, 20, 140, 24)
    expected_dhidden, expected_dweight, count = problem.run(0.1)
    dhidden = torch.empty_like(expected_dhidden) if asked == "dhidden" else None
    dweight = problem.before.clone() if asked == "dweight" else None
    arguments = (problem.grad, problem.coef, 0.1, problem.weight, problem.hidden)
    assert int(filtered_products(*arguments, dhidden, dweight, False)) == count
    assert dhidden is None or torch.equal(dhidden, expected_dhidden)
    assert dweight is None or torch.equal(dweight, expected_dweight)


def test_no_rows(device) -> None:
    problem = Problem(device, 0, 30, 8)
    dweight = torch.empty(30, 8, device=device)
    arguments = (problem.grad, problem.coef, 0.1, problem.weight, problem.hidden)
    assert int(filtered_products(*arguments, torch.empty(0, 8, device=device), dweight, True)) == 0
    assert (dweight == 0).all()


@pytest.mark.sanitize
def test_the_same_bits_twice(device) -> None:
    problem = Problem(device, 37, 531, 45, torch.bfloat16)
    for first, second in zip(problem.run(0.1)[:2], problem.run(0.1)[:2], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"grad": lambda p: p.grad.double()}, TypeError, "grad"),
        ({"grad": lambda p: p.grad.T.contiguous().T}, ValueError, "adjacent"),
        ({"grad": lambda p: p.grad[:1].expand(5, 60)}, ValueError, "overlap"),
        ({"coef": lambda p: p.coef.half()}, TypeError, "coef"),
        ({"coef": lambda p: p.coef[:-1]}, ValueError, "coef"),
        ({"eps": lambda p: -0.1}, ValueError, "eps"),
        ({"eps": lambda p: float("nan")}, ValueError, "eps"),
        ({"weight": lambda p: p.weight.half()}, TypeError, "weight"),
        ({"weight": lambda p: p.weight[:-1]}, ValueError, "weight"),
        ({"hidden": lambda p: p.hidden[:-1]}, ValueError, "hidden"),
        ({"dhidden": lambda p: torch.zeros(5, 8, dtype=torch.float16)}, TypeError, "dhidden"),
        ({"dweight": lambda p: torch.zeros(60, 7)}, ValueError, "dweight"),
        ({"dweight": lambda p: torch.zeros(8, 60).T}, ValueError, "adjacent"),
        ({"weight": lambda p: p.weight.to("meta")}, ValueError, "device"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refuses(device, change, error, match) -> None:
    problem = Problem(device, 5, 60, 8)
    arguments = {name: getattr(problem, name) for name in ("grad", "coef", "weight", "hidden", "dhidden")}
    arguments |= {"eps": 0.1, "dweight": problem.before, "fresh": False}
    arguments |= {name: make(problem) for name, make in change.items()}
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
        for name, value in arguments.items()
    }
    with pytest.raises(error, match=match):
        filtered_products(**arguments)


def test_every_architecture_has_a_tile_for_every_kind() -> None:
    for table in (DHIDDEN_TILES, DWEIGHT_TILES):
        assert len(table) == len({arch for arch, _ in table}) * len({kind for _, kind in table})
    assert DHIDDEN_TILES.keys() == DWEIGHT_TILES.keys()

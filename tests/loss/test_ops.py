"""``fused_d2o_loss`` and ``linear_logprob`` against the reference in fp64: results and every gradient."""

from __future__ import annotations

import pytest
import torch

from d2o_fast import ResponseLayout, fused_d2o_loss, linear_logprob
from d2o_fast.loss.reference import naive_d2o_loss, naive_linear_logprob
from helpers import relative_errors
from ops_cases import Problem, assert_all_close, problem, run

MIXED = [[3, 1, 7], [2, 5], [9, 4, 4, 4], [1, 1]]

# Every case has a reason to exist.
CASES = {
    "plain": problem([[3, 4]]),
    "one-token responses": problem([[1, 1], [1, 1, 1]]),
    "unequal lengths": problem([[30, 1, 2], [1, 17]]),
    "K from 1 to 13 in one batch": problem([[2] + [1 + i % 3 for i in range(K)] for K in range(1, 14)]),
    "odd vocabulary and width": problem(MIXED, V=1009, H=7),  # no block size divides a prime
    "vocabulary of one": problem([[2, 2]], V=1, H=3),
    "H of one": problem([[2, 2]], V=5, H=1),
    "bias": problem(MIXED, bias=True),
    "softcap": problem(MIXED, softcap=2.0),  # well inside the spread of the logits, so that the slope matters
    "logit scale": problem(MIXED, logit_scale=0.37),
    "scale, bias and cap": problem(MIXED, bias=True, softcap=3.0, logit_scale=1.7),  # their order matters
    "coefficients apart": problem(MIXED, alpha=0.7, beta=0.05),
    "accumulated batch": problem(MIXED, num_prompts=11),
    "ungated anchors": problem(MIXED, bias=True, anchor_weight=0.3),
    "NPO, beta 0": problem(MIXED, beta=0.0),
    "ungated anchors alone hold": problem(MIXED, beta=0.0, anchor_weight=0.3),
    "alpha 0": problem(MIXED, alpha=0.0),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def row_bytes(p: Problem, rows: int) -> int:
    return 4 * p.weight.shape[0] * rows


@cases
@pytest.mark.parametrize("rows", [1, 4, 8, None], ids=lambda rows: f"rows={rows}")  # staged, mixed, and whole prompts
def test_fp32_equals_the_reference(case: Problem, rows: int | None) -> None:
    workspace = None if rows is None else row_bytes(case, rows)
    exact = run(naive_d2o_loss, case, torch.float64)
    found = run(fused_d2o_loss, case, torch.float32, workspace_bytes=workspace)
    assert_all_close(found, exact, 3e-6)
    assert all(value.dtype == torch.float32 for value in found.values())


@cases
@pytest.mark.parametrize("rows", [4, None], ids=lambda rows: f"rows={rows}")
def test_fp64_equals_the_reference(case: Problem, rows: int | None) -> None:
    """Checks the formulas to the last digits: an error that fp32 would hide shows."""
    workspace = None if rows is None else 2 * row_bytes(case, rows)
    exact = run(naive_d2o_loss, case, torch.float64, upstream=0.7)
    assert_all_close(run(fused_d2o_loss, case, torch.float64, upstream=0.7, workspace_bytes=workspace), exact, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [4, None], ids=lambda rows: f"rows={rows}")
def test_16_bit_results_and_dtypes(dtype: torch.dtype, rows: int | None) -> None:
    p = CASES["scale, bias and cap"]
    workspace = None if rows is None else row_bytes(p, rows)
    exact = run(naive_d2o_loss, p, torch.float64, through=dtype)
    found = run(fused_d2o_loss, p, dtype, workspace_bytes=workspace)
    for name in ("loss", "logps", "chosen_rewards", "rejected_rewards", "margins"):
        assert found[name].dtype == torch.float32
        assert max(relative_errors(found[name], exact[name])) < 1e-6, name  # fp32 logits from exact products
    for name in ("dhidden", "dweight", "dbias"):
        assert found[name].dtype == dtype
        assert max(relative_errors(found[name], exact[name])) < 6e-3, name


@pytest.mark.parametrize("rows", [30, None], ids=["staged", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_no_worse_than_eager(dtype: torch.dtype, rows: int | None) -> None:
    """Compares largest and RMS errors against fp64 with those of the eager computation in the same dtype.

    K from 1 to 13, odd V and H. The rounding of a prompt's few coefficients to bf16 is random, and a single largest
    error even more so; therefore the mean over 16 problems is compared.
    """
    lengths = [[9] + [3 + (5 * i) % 11 for i in range(K)] for K in (1, 13, 4)]
    ours: dict[str, list[tuple[float, float]]] = {}
    theirs: dict[str, list[tuple[float, float]]] = {}
    for seed in range(16):
        p = problem(lengths, V=2003, H=97, bias=True, seed=seed)
        exact = run(naive_d2o_loss, p, torch.float64, through=dtype)
        eager = run(naive_d2o_loss, p, dtype)
        found = run(fused_d2o_loss, p, dtype, workspace_bytes=None if rows is None else row_bytes(p, rows))
        for name in exact:
            ours.setdefault(name, []).append(relative_errors(found[name], exact[name]))
            theirs.setdefault(name, []).append(relative_errors(eager[name], exact[name]))
    for name in ours:
        for ours_mean, eager_mean in zip(
            torch.tensor(ours[name]).mean(0), torch.tensor(theirs[name]).mean(0), strict=True
        ):
            # Two roundings of fp32: if eager is nearer than that, it is luck.
            assert ours_mean <= max(1.05 * eager_mean, 2.4e-7), f"{name}: {ours_mean:.2e}, eager {eager_mean:.2e}"


def test_bf16_hidden_with_a_master_weight() -> None:
    """fp32 master weights beside bf16 hidden states: operands in bf16, dWeight in fp32 without a bf16 rounding."""
    p = problem(MIXED, V=503, H=33, bias=True)
    rounded = run(naive_d2o_loss, p, torch.float64, through=torch.bfloat16)
    hidden = p.hidden.bfloat16().requires_grad_()
    weight, bias = p.weight.clone().requires_grad_(), p.bias.bfloat16().float().requires_grad_()
    out = fused_d2o_loss(hidden, weight, p.targets, p.layout, p.ref_logps, bias=bias)
    out.loss.backward()
    assert (
        relative_errors(out.logps, rounded["logps"])[1] < 1e-3
    )  # a CPU without bf16 products would keep the weight's fp32 digits
    assert (hidden.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert relative_errors(weight.grad, rounded["dweight"])[1] < 3e-3
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("bias",), ("weight", "bias"), ("hidden", "weight")])
@pytest.mark.parametrize("rows", [4, None], ids=["staged", "whole"])
def test_frozen_inputs(frozen: tuple[str, ...], rows: int | None) -> None:
    p = problem(MIXED, bias=True)
    workspace = None if rows is None else row_bytes(p, rows)
    exact = run(naive_d2o_loss, p, torch.float64, frozen=frozen)
    assert_all_close(run(fused_d2o_loss, p, frozen=frozen, workspace_bytes=workspace), exact, 3e-6)


def test_any_workspace_gives_the_same() -> None:
    p = problem([[5, 3, 8], [2, 2], [11, 6, 1]], V=211, bias=True, anchor_weight=0.1)
    exact = run(naive_d2o_loss, p, torch.float64)
    for rows in range(1, p.layout.num_tokens + 1):
        assert_all_close(run(fused_d2o_loss, p, workspace_bytes=row_bytes(p, rows)), exact, 3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_twice(dtype: torch.dtype) -> None:
    p = problem(MIXED, V=503, H=33, bias=True, softcap=5.0)
    for workspace in (row_bytes(p, 5), None):
        first, second = (run(fused_d2o_loss, p, dtype, workspace_bytes=workspace) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rows", [3, None], ids=["chunks", "whole"])
@pytest.mark.parametrize("case", ["plain", "odd vocabulary and width", "scale, bias and cap"])
def test_linear_logprob(case: str, rows: int | None) -> None:
    """Every token has its own upstream gradient: scaling all by the first would fail."""
    p = CASES[case]
    options = {name: value for name, value in p.options.items() if name in ("softcap", "logit_scale")}
    upstream = torch.randn(p.layout.num_tokens, generator=torch.Generator().manual_seed(1))

    def gradients(function, dtype, **extra):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (p.hidden, p.weight, p.bias) if x is not None]
        bias = {"bias": leaves[2]} if p.bias is not None else {}
        logps = function(leaves[0], leaves[1], p.targets, **bias, **options, **extra)
        logps.backward(upstream.to(dtype))
        return {"logps": logps.detach()} | {f"d{i}": leaf.grad for i, leaf in enumerate(leaves)}

    exact = gradients(naive_linear_logprob, torch.float64)
    workspace = None if rows is None else row_bytes(p, rows)
    found = gradients(linear_logprob, torch.float32, workspace_bytes=workspace)
    assert_all_close(found, exact, 3e-6)
    assert found["logps"].max() <= 0  # a vocabulary that no block divides once gave log-probabilities of +123


def test_linear_logprob_bf16_logps_are_those_of_fp32() -> None:
    p = problem([[64, 64]], V=997, H=64)
    hidden, weight = p.hidden.bfloat16(), p.weight.bfloat16()
    exact = naive_linear_logprob(hidden.double(), weight.double(), p.targets)
    assert (linear_logprob(hidden, weight, p.targets) - exact).abs().max() < 1e-5


def test_d2o_through_linear_logprob() -> None:
    """``linear_logprob`` and the fused loss give the same gradient."""
    from d2o_fast import d2o_loss
    from d2o_fast.loss.reference import sequence_logps

    p = problem(MIXED)

    def two_pass(hidden, weight, targets, layout, ref_logps):
        return d2o_loss(sequence_logps(linear_logprob(hidden, weight, targets), layout), ref_logps, layout)

    assert_all_close(run(two_pass, p), run(fused_d2o_loss, p), 3e-6)


def test_no_tokens() -> None:
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    logps = linear_logprob(hidden, weight, torch.empty(0, dtype=torch.long))
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(7, 4))


def test_strided_inputs() -> None:
    p = problem(MIXED, V=64, H=16)
    exact = run(naive_d2o_loss, p, torch.float64)
    wide = torch.zeros(p.layout.num_tokens, 32)
    wide[:, ::2] = p.hidden
    for hidden in (wide[:, ::2], p.hidden.T.contiguous().T):
        for weight in (p.weight, p.weight.T.contiguous().T):
            h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            out = fused_d2o_loss(h, w, p.targets, p.layout, p.ref_logps)
            out.loss.backward()
            assert relative_errors(h.grad, exact["dhidden"])[0] < 3e-6
            assert relative_errors(w.grad, exact["dweight"])[0] < 3e-6


def test_tied_embedding() -> None:
    """The weight is also an embedding: its gradient is the sum of both."""
    p = problem(MIXED, V=64, H=16)
    ids = torch.randint(64, (p.layout.num_tokens,), generator=torch.Generator().manual_seed(3))
    grads = []
    for function, dtype in ((naive_d2o_loss, torch.float64), (fused_d2o_loss, torch.float32)):
        table = p.weight.to(dtype, copy=True).requires_grad_()
        function(torch.tanh(table[ids]), table, p.targets, p.layout, p.ref_logps.to(dtype)).loss.backward()
        grads.append(table.grad)
    assert relative_errors(grads[1], grads[0])[0] < 3e-6


def test_minus_infinity_bias_takes_tokens_out() -> None:
    p = problem(MIXED, V=40, bias=True)
    p.targets.clamp_(max=29)
    p.bias[30:] = -float("inf")
    exact = run(
        naive_d2o_loss, Problem(p.hidden, p.weight[:30], p.bias[:30], p.targets, p.layout, p.ref_logps), torch.float64
    )
    for workspace in (row_bytes(p, 4), None):
        found = run(fused_d2o_loss, p, workspace_bytes=workspace)
        assert torch.equal(found["dweight"][30:], torch.zeros(10, 17))
        assert torch.equal(found["dbias"][30:], torch.zeros(10))
        found["dweight"], found["dbias"] = found["dweight"][:30], found["dbias"][:30]
        assert_all_close(found, exact, 3e-6)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(size: float) -> None:
    """One token has all or none of the mass: results are finite, and as near to fp64 as fp32 logits of 1e4 allow."""
    p = problem(MIXED, V=50, bias=True)
    p.bias[7] += size
    p.targets[::2] = 7
    exact, found = run(naive_d2o_loss, p, torch.float64), run(fused_d2o_loss, p)
    assert all(value.isfinite().all() for value in found.values())
    assert_all_close(found, exact, 2e-3)


def test_layout_offsets_as_tensors() -> None:
    p = problem([[2, 3], [1, 4]])
    layout = ResponseLayout(torch.tensor([0, 2, 5, 6, 10], dtype=torch.int32), torch.tensor([0, 2, 4]))
    assert layout == p.layout
    first = fused_d2o_loss(p.hidden, p.weight, p.targets, p.layout, p.ref_logps)
    second = fused_d2o_loss(p.hidden, p.weight, p.targets.int(), layout, p.ref_logps)
    assert torch.equal(first.loss, second.loss)

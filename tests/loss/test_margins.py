"""Other losses of one margin per prompt, on both paths; the filter on the gradient's columns, on Triton's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from d2o_fast import Margin, ResponseLayout, fused_d2o_loss, fused_margin_loss
from d2o_fast.loss.reference import d2o_loss, margin_loss, naive_d2o_loss, naive_linear_logprob, sequence_logps
from helpers import relative_errors
from ops_cases import Problem, assert_all_close, problem, run

BACKENDS = ("torch", "triton")
PAIRS, ALONE, MIXED = [[4, 3], [2, 6], [1, 1]], [[4], [3], [7]], [[3, 1, 7], [2], [9, 4, 4, 4], [1, 1]]


def naive_margin_loss(hidden: Any, weight: Any, targets: Any, layout: Any, ref_logps: Any, margin: Any, **options: Any):
    logps = sequence_logps(naive_linear_logprob(hidden, weight, targets, **options), layout)
    return margin_loss(logps, ref_logps, layout, margin)


def made(lengths: list[list[int]], device: torch.device, **options: Any) -> Problem:
    p = problem([[*group, 1, 1] for group in lengths], V=101, H=23)  # anchors for the builder; the layout is ours
    p.layout = ResponseLayout.from_lengths(lengths, min_anchors=0)
    p.hidden, p.targets = p.hidden[: p.layout.num_tokens], p.targets[: p.layout.num_tokens]
    p.ref_logps = p.ref_logps[: p.layout.num_responses]
    for name in ("hidden", "weight", "targets", "ref_logps"):
        setattr(p, name, getattr(p, name).to(device))
    p.options = options
    return p


# Every combination that the staged walk treats differently.
MARGINS = {
    "DPO": (PAIRS, Margin.dpo(0.3)),
    "NPO": (ALONE, Margin.npo(0.3)),
    "gradient ascent": (ALONE, Margin.gradient_ascent()),
    "gradient ascent beside anchors": (MIXED, Margin(0.0, 0.0, negative_weight=0.5, gate=0.0)),
    "ungated on both sides": ([[3, 4, 2], [5, 1]], Margin(0.3, 0.2, 0.1, 0.7, 1.5)),
    "ungated on both sides in one ratio": ([[3, 4, 2], [5, 1]], Margin(0.3, 0.2, 0.1, 0.15)),
    "ungated negative, gated anchors": ([[3, 4, 2], [5, 1]], Margin(0.0, 0.2, 0.0, 0.7)),
    "gated negative, ungated anchors": ([[3, 4, 2], [5, 1]], Margin(0.2, 0.0, 0.3)),
    "nothing weighs": ([[3, 4], [2, 2]], Margin(0.0, 0.0)),
}


@pytest.mark.parametrize("rows", [2, 6, None], ids=lambda rows: f"rows={rows}")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", MARGINS.values(), ids=MARGINS.keys())
def test_margins_equal_the_reference(case: Any, backend: str, rows: int | None, device: torch.device) -> None:
    lengths, margin = case
    p = made(lengths, device, margin=margin)
    exact = run(naive_margin_loss, p, torch.float64)
    workspace = None if rows is None else rows * 4 * 101
    assert_all_close(run(fused_margin_loss, p, backend=backend, workspace_bytes=workspace), exact, 3e-6)


def test_margins_are_the_losses_of_their_names() -> None:
    """Compares with formulas of the papers, written out here."""
    p = made(PAIRS, torch.device("cpu"))
    logps = -20 * torch.rand(6, dtype=torch.float64)
    refs = p.ref_logps.double()
    D = logps - refs
    dpo = -F.logsigmoid(0.3 * (D[1::2] - D[::2])).mean()
    assert torch.allclose(margin_loss(logps, refs, p.layout, Margin.dpo(0.3)).loss, dpo)
    alone = ResponseLayout.from_lengths([[1]] * 6, min_anchors=0)
    npo = -(2 / 0.3) * F.logsigmoid(-0.3 * D).mean()
    assert torch.allclose(margin_loss(logps, refs, alone, Margin.npo(0.3)).loss, npo)
    assert torch.allclose(margin_loss(logps, refs, alone, Margin.gradient_ascent()).loss, D.mean())
    d2o = d2o_loss(logps, refs, p.layout, alpha=0.2, beta=0.4, anchor_weight=0.1).loss
    assert torch.equal(margin_loss(logps, refs, p.layout, Margin(0.2, 0.4, 0.1)).loss, d2o)


def test_anchors_weighed_but_missing_are_refused() -> None:
    p = made(MIXED, torch.device("cpu"))
    with pytest.raises(ValueError, match="prompt 1 has no anchors"):
        fused_d2o_loss(p.hidden, p.weight, p.targets, p.layout, p.ref_logps)
    with pytest.raises(ValueError, match="needs its negative and at least one anchor"):
        ResponseLayout.from_lengths(MIXED)


# --- grad_filter_eps -------------------------------------------------------------------------------------------------


def peaked(device: torch.device, dtype: torch.dtype = torch.float32) -> Problem:
    """Each row's softmax is mostly on one of 40 words of 503, so that most columns are near zero."""
    p = problem([[30, 25, 20], [9, 14]], V=503, H=64, seed=3)
    words = torch.randint(40, (p.layout.num_tokens,), generator=torch.Generator().manual_seed(4))
    p.hidden = (p.weight[words] * 6 + 0.1 * p.hidden).to(dtype)
    p.targets = torch.where(torch.arange(len(words)) % 3 == 0, (words + 1) % 40, words)
    p.weight = p.weight.to(dtype)
    p.hidden, p.weight, p.targets, p.ref_logps = (x.to(device) for x in (p.hidden, p.weight, p.targets, p.ref_logps))
    return p


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [20, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (60, None))], ids=lambda rows: f"rows={rows}"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_filter_keeps_its_bound(dtype: torch.dtype, rows: int | None, device: torch.device) -> None:
    """Every entry of each token's and each word's gradient is bounded; on peaked inputs most products are skipped."""
    p = peaked(device, dtype)
    eps = 1e-3
    workspace = None if rows is None else rows * 4 * 503
    exact = run(naive_d2o_loss, p, torch.float64, through=dtype)
    plain = run(fused_d2o_loss, p, dtype, backend="triton", workspace_bytes=workspace)
    found = run(fused_d2o_loss, p, dtype, backend="triton", workspace_bytes=workspace, grad_filter_eps=eps)
    for name in ("loss", "logps", "margins"):
        assert torch.allclose(found[name], plain[name], rtol=1e-6), name  # chunks may differ, hence the last bit
    z = exact["margins"]
    K = torch.tensor(p.layout.num_anchors, device=device)
    gate = torch.sigmoid(-z) / p.layout.num_prompts
    per_response = torch.cat([torch.stack([0.1 * g] + [0.1 * g / k] * int(k)) for g, k in zip(gate, K, strict=True)])
    coef = per_response[p.layout.tensor("token_response", device)]
    slack = 3e-6 if dtype == torch.float32 else 8e-3  # for rounding alone
    for name, bound in (
        ("dhidden", eps * coef[:, None] * p.weight.double().abs().sum(0)),
        ("dweight", (eps * coef @ p.hidden.double().abs())[None]),
    ):
        error = (found[name].double() - exact[name]).abs()
        assert (error <= bound + slack * exact[name].abs().max()).all(), name
    if dtype == torch.float32:
        assert relative_errors(found["dhidden"], exact["dhidden"])[0] > 1e-5, "nothing was left out"


@pytest.mark.slow
def test_how_much_was_skipped_is_reported(device: torch.device) -> None:
    p = peaked(device)
    hidden = p.hidden.requires_grad_()

    def skipped(eps: float | None) -> Any:
        arguments = (hidden, p.weight, p.targets, p.layout, p.ref_logps)
        return fused_d2o_loss(*arguments, backend="triton", grad_filter_eps=eps).skipped

    with torch.no_grad():
        assert skipped(1e-3) == 0.0, "no gradient, nothing to skip"
    assert skipped(None) is None
    assert skipped(0.0) == 0.0
    few, many = float(skipped(1e-4)), float(skipped(1e-3))
    assert 0 < few < many < 1
    assert many > 0.5


def test_a_filter_of_zero_is_exact_and_the_same_twice(device: torch.device) -> None:
    p = problem([[3, 4], [5, 2, 2]], V=103, bias=True, softcap=3.0)
    for name in ("hidden", "weight", "bias", "targets", "ref_logps"):
        setattr(p, name, getattr(p, name).to(device))
    exact = run(naive_d2o_loss, p, torch.float64)
    found = [run(fused_d2o_loss, p, backend="triton", grad_filter_eps=0.0) for _ in range(2)]
    assert_all_close(found[0], exact, 3e-6)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("eps", [-1e-3, 1.0, float("nan")])
def test_a_filter_outside_its_range_is_refused(eps: float) -> None:
    p = problem([[2, 3]])
    with pytest.raises(ValueError, match="grad_filter_eps is"):
        fused_d2o_loss(p.hidden, p.weight, p.targets, p.layout, p.ref_logps, grad_filter_eps=eps)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_filter_without_the_kernels_is_refused(backend: str) -> None:
    p = problem([[2, 3]])
    with pytest.raises(ValueError, match="Leave grad_filter_eps out"):
        fused_d2o_loss(p.hidden, p.weight, p.targets, p.layout, p.ref_logps, backend=backend, grad_filter_eps=0.0)


@pytest.mark.parametrize("tokens", [33, 41, 57])
def test_an_odd_number_of_bf16_tokens_reads_nothing_beside_them(tokens: int) -> None:
    """oneDNN reads past the end of strided bf16 rows; the values there must not reach dWeight."""
    p = problem([[tokens - 8, 8]], V=203, H=32)
    exact = run(naive_d2o_loss, p, torch.float64, through=torch.bfloat16)
    found = run(fused_d2o_loss, p, torch.bfloat16)
    assert_all_close({"dweight": found["dweight"]}, {"dweight": exact["dweight"]}, 8e-3)

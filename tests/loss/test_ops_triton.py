"""The Triton path of the operations: the same walk over the kernels, interpreted on a CPU, compiled on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from d2o_fast import fused_d2o_loss, linear_logprob
from d2o_fast.loss.reference import naive_d2o_loss, naive_linear_logprob
from ops_cases import Problem, assert_all_close, problem, run

CASES = {
    "K from 1 to 3, unequal lengths": problem([[3, 1, 7], [2, 5], [4, 1, 2, 3]], V=203, H=19),
    "one-token responses": problem([[1, 1]], V=33, H=8),
    "scale, bias and cap": problem([[3, 2], [1, 4]], V=101, H=16, bias=True, softcap=3.0, logit_scale=1.7),
    "ungated anchors": problem([[3, 2], [1, 4]], V=65, H=9, anchor_weight=0.2, num_prompts=7),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def on(device: torch.device, p: Problem) -> Problem:
    """A copy: what a test does to it, another test does not see."""
    moved = {name: getattr(p, name).to(device, copy=True) for name in ("hidden", "weight", "targets", "ref_logps")}
    bias = None if p.bias is None else p.bias.to(device, copy=True)
    return replace(p, **moved, bias=bias, options=dict(p.options))


@cases
@pytest.mark.parametrize("rows", [4, None], ids=["staged", "whole"])
def test_fused(case: Problem, rows: int | None, device: torch.device) -> None:
    p = on(device, case)
    workspace = None if rows is None else rows * 4 * p.weight.shape[0]
    exact = run(naive_d2o_loss, p, torch.float64)
    assert_all_close(run(fused_d2o_loss, p, backend="triton", workspace_bytes=workspace), exact, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [4, None], ids=["staged", "whole"])
def test_fused_16_bit(dtype: torch.dtype, rows: int | None, device: torch.device) -> None:
    """The gradient of 16-bit operands is written as 16-bit over the logits; dWeight and dHidden are summed in fp32."""
    p = on(device, CASES["scale, bias and cap"])
    workspace = None if rows is None else rows * 4 * p.weight.shape[0]
    exact = run(naive_d2o_loss, p, torch.float64, through=dtype)
    found = run(fused_d2o_loss, p, dtype, backend="triton", workspace_bytes=workspace)
    gradients = {"dhidden", "dweight", "dbias"}
    assert_all_close(
        {k: found[k] for k in found.keys() - gradients}, {k: exact[k] for k in exact.keys() - gradients}, 1e-6
    )
    assert_all_close({k: found[k] for k in gradients}, {k: exact[k] for k in gradients}, 6e-3)
    assert {found[k].dtype for k in gradients} == {dtype}


@cases
def test_agrees_with_the_torch_path(case: Problem, device: torch.device) -> None:
    """Rewards are excepted: if log pi is near its reference, their few digits differ between the paths."""
    p = on(device, case)
    found, other = (run(fused_d2o_loss, p, backend=backend) for backend in ("triton", "torch"))
    names = [name for name in found if not name.endswith(("rewards", "margins"))]
    assert_all_close({name: found[name] for name in names}, {name: other[name] for name in names}, 3e-6)


def test_scoring_alone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gradient the forward kernel runs, which holds no logits: no product of torch may be called."""
    p = on(device, CASES["scale, bias and cap"])
    p.options["bias"] = p.bias

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("scoring must not build logits")

    monkeypatch.setattr("d2o_fast.loss.triton_engine.product_", refuse)
    with torch.no_grad():
        out = fused_d2o_loss(p.hidden, p.weight, p.targets, p.layout, p.ref_logps, backend="triton", **p.options)
    assert out.path == "triton"
    exact = naive_d2o_loss(p.hidden, p.weight, p.targets, p.layout, p.ref_logps, **p.options)
    assert torch.allclose(out.loss, exact.loss, rtol=1e-6)


def test_linear_logprob_with_a_gradient(device: torch.device) -> None:
    p = on(device, CASES["K from 1 to 3, unequal lengths"])
    upstream = torch.randn(p.layout.num_tokens, generator=torch.Generator().manual_seed(1)).to(device)

    def gradients(
        function: Callable[..., torch.Tensor], dtype: torch.dtype, **extra: object
    ) -> dict[str, torch.Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (p.hidden, p.weight)]
        logps = function(*leaves, p.targets, **extra)
        logps.backward(upstream.to(dtype))
        return {"logps": logps.detach(), "dhidden": leaves[0].grad, "dweight": leaves[1].grad}

    exact = gradients(naive_linear_logprob, torch.float64)
    found = gradients(linear_logprob, torch.float32, backend="triton", workspace_bytes=5 * 4 * 203)
    assert_all_close(found, exact, 3e-6)


def test_targets_outside_give_nan_without_a_fault(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU targets are not checked; on both paths a bad one must give NaN and leave other rows unchanged."""
    p = on(device, CASES["scale, bias and cap"])
    p.options.clear()
    p.targets[1] = 101
    p.targets[4] = -100
    monkeypatch.setattr("d2o_fast.loss.ops._check_targets", lambda targets, V: None)
    for backend in ("torch", "triton"):
        logps = linear_logprob(p.hidden, p.weight, p.targets, backend=backend)
        assert logps.isnan().nonzero().flatten().tolist() == [1, 4]
        out = fused_d2o_loss(p.hidden.requires_grad_(), p.weight, p.targets, p.layout, p.ref_logps, backend=backend)
        assert out.loss.isnan()


@pytest.mark.gpu
def test_no_synchronisation(device: torch.device) -> None:
    p = on(device, CASES["K from 1 to 3, unequal lengths"])
    run(fused_d2o_loss, p, backend="triton")  # compiles, and copies the layout
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(fused_d2o_loss, p, backend="triton")
        run(fused_d2o_loss, p, backend="triton", workspace_bytes=4 * 4 * 203)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_tf32_allowed_elsewhere_stays_elsewhere(device: torch.device) -> None:
    p = on(device, problem([[40, 60]], V=501, H=256))
    exact = run(naive_d2o_loss, p, torch.float64)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert_all_close(run(fused_d2o_loss, p, backend="triton"), exact, 3e-6)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before

"""What the operations promise besides numbers: memory, autograd's rules, precision settings, clear refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from d2o_fast import ResponseLayout, fused_d2o_loss, linear_logprob
from d2o_fast.loss.reference import naive_d2o_loss, naive_linear_logprob
from helpers import poison_empty, relative_errors
from ops_cases import Problem, assert_all_close, problem, run

MIXED = [[3, 1, 7], [2, 5], [9, 4, 4, 4], [1, 1]]


class Storages(TorchDispatchMode):
    """Largest storage made, bytes alive at once, and the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.largest = self.peak = 0
        self.operations: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.multiprocessing.reductions import StorageWeakRef

        result = func(*args, **(kwargs or {}))
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
        self.operations.append((func.overloadpacket.__name__, shapes))
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        known = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def peak(p: Problem, dtype: torch.dtype, workspace: int, function: Callable[..., Any] = fused_d2o_loss) -> Storages:
    hidden, weight = p.hidden.to(dtype).requires_grad_(), p.weight.to(dtype).requires_grad_()
    with Storages() as storages:
        if function is fused_d2o_loss:
            result = fused_d2o_loss(hidden, weight, p.targets, p.layout, p.ref_logps, workspace_bytes=workspace).loss
        else:
            result = linear_logprob(hidden, weight, p.targets, workspace_bytes=workspace).sum()
        result.backward()
    return storages


V, H = 4001, 8
ROW = 4 * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [fused_d2o_loss, linear_logprob], ids=lambda f: f.__name__)
def test_memory_does_not_grow_with_the_batch(function: Callable[..., Any], dtype: torch.dtype) -> None:
    """Four times the prompts: the same peak but for what is of the size of the hidden states and their gradient."""
    group, workspace = [10, 9, 11, 10], 40 * ROW
    few = peak(problem([group] * 4, V, H), dtype, workspace, function)
    many = peak(problem([group] * 16, V, H), dtype, workspace, function)
    assert many.largest <= workspace
    tokens = 12 * sum(group)
    assert many.peak - few.peak <= tokens * (3 * 4 * H + 64)
    assert many.peak < workspace + 3 * 4 * V * H + (2 << 20)


def test_memory_of_a_prompt_larger_than_the_workspace() -> None:
    """The first staged prompt needs no second buffer of the weight's size; more of them share one."""
    weight_bytes = 4 * V * H
    one = peak(problem([[90, 60]], V, H), torch.float32, 20 * ROW)
    three = peak(problem([[90, 60]] * 3, V, H), torch.float32, 20 * ROW)
    assert one.largest == three.largest == 20 * ROW
    assert 0.9 * weight_bytes < three.peak - one.peak < 1.1 * weight_bytes + 300 * (3 * 4 * H + 64)


def test_one_chunk_is_held_at_a_time(device: torch.device) -> None:
    """Also where a chunk is larger than the one before, whose logits must be gone by then. (On the device's own path:
    Triton's interpreter keeps its arguments alive in cycles.)"""
    peaks = []
    for lengths in ([[9, 9], [10, 11]], [[10, 11], [9, 9]]):
        p = problem(lengths, V, H)
        leaves = [x.to(device).requires_grad_() for x in (p.hidden, p.weight)]
        arguments = (*leaves, p.targets.to(device), p.layout, p.ref_logps.to(device))
        with Storages() as storages:
            fused_d2o_loss(*arguments, workspace_bytes=22 * ROW)
        peaks.append(storages.peak)
    assert abs(peaks[0] - peaks[1]) < 3 * ROW


@pytest.mark.parametrize("offset", [-50.0, 300.0])
@pytest.mark.parametrize("function", ["fused", "linear"])
def test_logits_far_from_zero(function: str, offset: float) -> None:
    """A common offset of a row's logits, as trained models have it, must not cost the gradient its digits: eager
    subtracts the maximum before anything is rounded."""

    def gradient(p: Problem, call: Callable[..., Any], dtype: torch.dtype) -> torch.Tensor:
        hidden = p.hidden.to(dtype, copy=True).requires_grad_()
        arguments = (hidden, p.weight.to(dtype), p.targets)
        if call in (fused_d2o_loss, naive_d2o_loss):
            call(*arguments, p.layout, p.ref_logps.to(dtype), bias=p.bias.to(dtype)).loss.backward()
        else:
            call(*arguments, bias=p.bias.to(dtype)).sum().backward()
        return hidden.grad

    ours, eager = (fused_d2o_loss, naive_d2o_loss) if function == "fused" else (linear_logprob, naive_linear_logprob)
    errors = []
    for seed in range(8):
        p = problem([[20, 20]], V=2003, H=64, seed=seed)
        p.weight *= 3
        p.bias = torch.full((2003,), offset)
        exact = gradient(p, eager, torch.float64)
        errors.append([relative_errors(gradient(p, call, torch.float32), exact)[1] for call in (ours, eager)])
    found, theirs = torch.tensor(errors).mean(0)
    assert found <= 1.2 * theirs


def shapes_of(p: Problem, frozen: tuple[str, ...]) -> list[tuple[int, ...]]:
    leaves = {name: getattr(p, name).clone().requires_grad_(name not in frozen) for name in ("hidden", "weight")}
    with Storages() as storages:
        out = fused_d2o_loss(leaves["hidden"], leaves["weight"], p.targets, p.layout, p.ref_logps)
        if out.loss.requires_grad:
            out.loss.backward()
    products = [shapes for name, shapes in storages.operations if name in ("mm", "addmm", "addmm_")]
    return [shapes[-2] + shapes[-1] for shapes in products]


def test_no_work_for_what_is_frozen() -> None:
    """Three products for a trainable head, two for a frozen one, two for frozen hidden states, one for none."""
    p = problem([[5, 6]], V=31, H=7)
    logits, dhidden, dweight = (31, 7, 7, 11), (11, 31, 31, 7), (31, 11, 11, 7)
    assert shapes_of(p, ()) == [logits, dweight, dhidden]
    assert shapes_of(p, ("weight",)) == [logits, dhidden]
    assert shapes_of(p, ("hidden",)) == [logits, dweight]
    assert shapes_of(p, ("hidden", "weight")) == [logits]


def test_a_frozen_head_has_no_buffer_of_its_size() -> None:
    p = problem([[3, 2]], V=501, H=64)
    hidden = p.hidden.requires_grad_()
    with Storages() as storages:
        fused_d2o_loss(hidden, p.weight, p.targets, p.layout, p.ref_logps).loss.backward()
    assert storages.largest <= 4 * 501 * 5


def test_no_grad_only_scores() -> None:
    p = problem(MIXED)
    hidden, weight = p.hidden.requires_grad_(), p.weight.requires_grad_()
    with torch.no_grad(), Storages() as storages:
        out = fused_d2o_loss(hidden, weight, p.targets, p.layout, p.ref_logps)
        logps = linear_logprob(hidden, weight, p.targets)
    assert not out.loss.requires_grad
    assert not logps.requires_grad
    assert sum(name == "mm" for name, _ in storages.operations) == 2
    assert torch.equal(out.loss, fused_d2o_loss(hidden, weight, p.targets, p.layout, p.ref_logps).loss.detach())


def test_results_are_detached_and_name_the_path() -> None:
    p = problem(MIXED)
    out = fused_d2o_loss(p.hidden.requires_grad_(), p.weight, p.targets, p.layout, p.ref_logps)
    assert out.path == "torch"
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in (out.logps, out.chosen_rewards, out.rejected_rewards, out.margins))


@pytest.mark.parametrize("rows", [5, None], ids=["staged", "whole"])
def test_nothing_uninitialised_is_read(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(MIXED, bias=True, anchor_weight=0.1)
    exact = run(naive_d2o_loss, p, torch.float64)
    poison_empty(monkeypatch)
    assert_all_close(run(fused_d2o_loss, p, workspace_bytes=None if rows is None else rows * 4 * 103), exact, 3e-6)


def test_retain_graph() -> None:
    """Kept for a second backward, the stored gradients are not scaled in place; each backward adds the same."""
    p = problem(MIXED, bias=True)
    for upstream in (1.0, 0.3):
        leaves = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
        loss = fused_d2o_loss(*leaves[:2], p.targets, p.layout, p.ref_logps, bias=leaves[2]).loss * upstream
        loss.backward(retain_graph=True)
        once = [leaf.grad.clone() for leaf in leaves]
        loss.backward(retain_graph=True)
        loss.backward()
        for leaf, grad in zip(leaves, once, strict=True):
            assert torch.allclose(leaf.grad, 3 * grad, rtol=1e-6)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_gradients_are_handed_over_not_copied() -> None:
    p = problem([[30, 30]], V=4001, H=64)
    weight = p.weight.requires_grad_()
    with Storages() as storages:
        fused_d2o_loss(p.hidden, weight, p.targets, p.layout, p.ref_logps, workspace_bytes=4 * 4001).loss.backward()
    assert storages.peak < 2 * 4 * 4001 * 64


@pytest.mark.parametrize("function", ["fused", "linear"])
def test_double_backward_is_refused(function: str) -> None:
    p = problem(MIXED)
    hidden = p.hidden.requires_grad_()
    if function == "fused":
        result = fused_d2o_loss(hidden, p.weight, p.targets, p.layout, p.ref_logps).loss
    else:
        result = linear_logprob(hidden, p.weight, p.targets).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(result, hidden, create_graph=True)


def test_autocast_changes_nothing() -> None:
    p = problem(MIXED)
    plain = run(fused_d2o_loss, p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(fused_d2o_loss, p)
        logps = linear_logprob(p.hidden, p.weight, p.targets)
    assert all(torch.equal(plain[name], inside[name]) for name in plain)
    assert torch.equal(logps, linear_logprob(p.hidden, p.weight, p.targets))


@pytest.fixture
def matmul_precision() -> Iterator[Any]:
    """torch's setting for fp32 products on a CPU, put back at the end."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    yield setting
    setting.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_reduced_precision_allowed_elsewhere_stays_elsewhere(dtype: torch.dtype, matmul_precision: Any) -> None:
    """oneDNN may be told to multiply fp32 as bf16, by the user or by us for bf16 inputs; fp32 and fp16 never are."""
    p = problem([[40, 60]], V=501, H=256)
    exact = run(naive_d2o_loss, p, torch.float64, through=dtype)
    matmul_precision.fp32_precision = "bf16"
    matters = relative_errors(p.hidden @ p.weight.T, p.hidden.double() @ p.weight.double().T)[1] > 1e-4
    found = run(fused_d2o_loss, p, dtype)
    assert matmul_precision.fp32_precision == "bf16"
    assert relative_errors(found["logps"], exact["logps"])[1] < 1e-6
    assert relative_errors(found["dweight"], exact["dweight"])[1] < (3e-6 if dtype == torch.float32 else 4e-4)
    if not matters:
        pytest.skip("oneDNN does not multiply fp32 as bf16 on this CPU (it takes AMX): exact either way")


def test_reduced_precision_for_bf16_ends_with_the_call(matmul_precision: Any) -> None:
    """Also after an error."""
    p = problem([[4, 6]], V=51, H=16)
    for before in ("none", "ieee"):
        matmul_precision.fp32_precision = before
        run(fused_d2o_loss, p, torch.bfloat16)
        assert matmul_precision.fp32_precision == before
        with pytest.raises(ValueError, match="workspace_bytes"):
            run(fused_d2o_loss, p, torch.bfloat16, workspace_bytes=1)
        assert matmul_precision.fp32_precision == before


def test_the_precision_setting_is_put_back() -> None:
    setting = torch.backends.mkldnn.matmul
    before, p = setting.fp32_precision, problem(MIXED)
    try:
        for allowed in ("bf16", "none"):
            setting.fp32_precision = allowed
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                run(fused_d2o_loss, p, dtype)
                assert setting.fp32_precision == allowed
                with pytest.raises(ValueError, match="workspace_bytes"):
                    run(fused_d2o_loss, p, dtype, workspace_bytes=1)
                assert setting.fp32_precision == allowed
    finally:
        setting.fp32_precision = before


@pytest.mark.slow
def test_torch_compile_around_it() -> None:
    p = problem(MIXED, V=64, H=16)
    layer = torch.nn.Linear(16, 16)

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        states = torch.tanh(layer(hidden))
        fused = fused_d2o_loss(states, weight, p.targets, p.layout, p.ref_logps).loss
        return fused + 0.01 * linear_logprob(states, weight, p.targets).sum() * 2

    results = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        layer.zero_grad()
        weight = p.weight.clone().requires_grad_()
        loss = function(p.hidden, weight)
        loss.backward()
        results.append((loss.detach(), weight.grad, layer.weight.grad.clone()))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*results, strict=True))


def error_cases() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    p = problem([[2, 3], [1, 2]], V=11, H=4)
    layout = ResponseLayout.from_lengths([[2, 3]])
    return {
        "batch and sequence": ({"hidden": torch.randn(2, 4, 4)}, ValueError, "Flatten batch"),
        "width": ({"weight": torch.randn(11, 5)}, ValueError, r"\(8, 4\) and \(11, 5\)"),
        "target too large": ({"targets": torch.full((8,), 11)}, ValueError, r"in \[0, 11\)"),
        "ignored index": ({"targets": torch.full((8,), -100)}, ValueError, "no ignored index"),
        "targets' length": ({"targets": p.targets[:5]}, ValueError, r"targets must be \(8,\)"),
        "targets' dtype": ({"targets": p.targets.float()}, TypeError, "int64 or int32"),
        "integer hidden": ({"hidden": torch.ones(8, 4, dtype=torch.long)}, TypeError, "hidden must be float32"),
        "fp8 hidden": ({"hidden": p.hidden.to(torch.float8_e4m3fn)}, TypeError, "hidden must be float32"),
        "dtypes apart": (
            {"weight": p.weight.bfloat16()},
            TypeError,
            "weight is torch.bfloat16 and hidden torch.float32",
        ),
        "not a tensor": ({"weight": [1.0]}, TypeError, "weight must be a tensor, not list"),
        "device": ({"weight": p.weight.to("meta")}, ValueError, "one device"),
        "bias shape": ({"bias": torch.zeros(4)}, ValueError, r"bias must be \(11,\)"),
        "layout": ({"layout": layout}, ValueError, "layout describes 5 tokens, hidden has 8"),
        "layout as list": ({"layout": [2, 3]}, TypeError, "ResponseLayout"),
        "references": ({"ref_logps": torch.zeros(8)}, ValueError, r"floating point \(4,\), one number per response"),
        "integer references": ({"ref_logps": torch.zeros(4, dtype=torch.long)}, ValueError, "floating point"),
        "softcap": ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        "scale": ({"logit_scale": float("nan")}, ValueError, "logit_scale is nan"),
        "alpha": ({"alpha": float("inf")}, ValueError, "alpha is inf"),
        "num_prompts": ({"num_prompts": 0}, ValueError, "num_prompts is 0"),
        "half a prompt": ({"num_prompts": 2.5}, TypeError, "integer"),
        "backend": ({"backend": "cuda"}, ValueError, "'auto', 'torch' or 'triton'"),
        "workspace": ({"workspace_bytes": 43}, ValueError, "already take 44"),
        "fp64 on triton": (
            {"backend": "triton", "hidden": p.hidden.double(), "weight": p.weight.double()},
            ValueError,
            "float64",
        ),
    }


@pytest.mark.parametrize(("change", "error", "message"), error_cases().values(), ids=error_cases().keys())
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    p = problem([[2, 3], [1, 2]], V=11, H=4)
    names = ("hidden", "weight", "targets", "layout", "ref_logps")
    arguments = {name: getattr(p, name) for name in names} | change
    with pytest.raises(error, match=message):
        fused_d2o_loss(**arguments)


def test_triton_by_name_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p = problem([[2, 3]])
    with pytest.raises(ValueError, match="needs a GPU and hidden is on cpu"):
        linear_logprob(p.hidden, p.weight, p.targets, backend="triton")


def test_a_sharded_weight_is_refused_by_name(tmp_path: Any) -> None:
    """Its local shard would give a wrong softmax in silence."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    p = problem([[2, 3]], V=12, H=4)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        weight = distribute_tensor(p.weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        for function in (
            lambda: linear_logprob(p.hidden, weight, p.targets),
            lambda: fused_d2o_loss(p.hidden, torch.nn.Parameter(weight), p.targets, p.layout, p.ref_logps),
        ):
            with pytest.raises(TypeError, match=r"weight is a DTensor .* weight.full_tensor\(\)"):
                function()
    finally:
        dist.destroy_process_group()

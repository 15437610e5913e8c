"""Complaints of users of other fused losses that no other file tests.

Shapes: N response tokens, V vocabulary, H hidden, S responses. *Rows*: tokens whose logits the workspace holds.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import d2o_fast
from d2o_fast import fused_d2o_loss, linear_logprob
from d2o_fast.loss.reference import d2o_loss, naive_d2o_loss, naive_linear_logprob, sequence_logps
from helpers import relative_errors
from ops_cases import Problem, assert_all_close, problem, run

MIXED = [[3, 1, 7], [2, 5], [9, 4, 4, 4], [1, 1]]
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def on(device: torch.device, p: Problem) -> Problem:
    tensors = (p.hidden, p.weight, p.bias, p.targets)
    hidden, weight, bias, targets = (None if x is None else x.to(device) for x in tensors)
    return Problem(hidden, weight, bias, targets, p.layout, p.ref_logps.to(device), p.options)


class Products(TorchDispatchMode):
    """Records (n, k, m) of every matrix product, and the largest storage that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            self.shapes.append((*left.shape, right.shape[1]))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                given = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
                if tensor.untyped_storage().data_ptr() not in given:
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


# --------------------------------------------------------------------- 16-bit accumulation: entropy drift, divergence


def bf16_errors(p: Problem, rows: int) -> dict[str, tuple[float, float]]:
    """Errors of the loss's gradients, and of ``linear_logprob``'s gradients for the same upstream numbers."""
    exact = run(naive_d2o_loss, p, torch.float64, through=torch.bfloat16)
    workspace = rows * 4 * p.weight.shape[0]

    def through_logprobs(hidden: Any, weight: Any, targets: Any, layout: Any, ref_logps: Any, **options: Any) -> Any:
        logps = linear_logprob(hidden, weight, targets, workspace_bytes=workspace)
        return d2o_loss(sequence_logps(logps, layout), ref_logps, layout, **options)

    fused = run(fused_d2o_loss, p, torch.bfloat16, workspace_bytes=workspace)
    general = run(through_logprobs, p, torch.bfloat16)
    return {
        f"{door} {name}": relative_errors(found[name], exact[name])
        for door, found in (("fused", fused), ("linear_logprob", general))
        for name in ("dhidden", "dweight")
    }


@pytest.mark.parametrize("lengths", [[[200, 200]], [[2, 2]] * 100], ids=["one staged prompt", "a prompt per chunk"])
def test_bf16_gradient_error_does_not_grow_with_the_number_of_chunks(lengths: list[list[int]]) -> None:
    """Liger 512, 830, 1391, Megatron 2739: sums over chunks kept in the weight's 16-bit dtype lose the small terms.

    All tokens push the same few logits one way, so that the sum is far larger than any chunk's share.
    """
    p = problem(lengths, V=67, H=32)
    p.hidden.add_(1.0)
    p.targets.remainder_(5)
    N = p.layout.num_tokens
    at_once, in_many = bf16_errors(p, N), bf16_errors(p, 4)
    eager = run(naive_d2o_loss, p, torch.bfloat16)
    exact = run(naive_d2o_loss, p, torch.float64, through=torch.bfloat16)
    for name, found in in_many.items():
        gradient = name.split()[1]
        theirs = relative_errors(eager[gradient], exact[gradient])
        for ours, whole, eager_error in zip(found, at_once[name], theirs, strict=True):
            assert ours <= 1.2 * whole, f"{name}: {ours:.2e} in 100 chunks, {whole:.2e} in one"
            assert ours <= 1.05 * eager_error, f"{name}: {ours:.2e}, eager {eager_error:.2e}"


# ------------------------------------------------------------------------ a vocabulary that no block divides, NaN


@backends
@pytest.mark.parametrize("V", [33, 4097], ids=["one past the forward's block", "one past the row kernels' block"])
def test_padding_of_the_vocabulary_takes_no_part(V: int, backend: str, device: torch.device) -> None:
    """verl 2656, 2899: padded columns of logit 0 beside real ones near -130 gave log-probabilities of +123.

    The loss's row kernels do the same work, and nearly all of the gradient would go to the padding.
    """
    p = problem([[2, 3], [1, 2]], V=V, H=9)
    p.hidden[:, 0], p.weight[:, 0] = 1.0, -130.0
    p = on(device, p)
    with torch.no_grad():
        logps = linear_logprob(p.hidden, p.weight, p.targets, backend=backend)
    assert logps.max() < 0
    exact_logps = naive_linear_logprob(p.hidden.double(), p.weight.double(), p.targets)
    assert_all_close({"logps": logps}, {"logps": exact_logps}, 1e-5)
    exact = run(naive_d2o_loss, p, torch.float64)
    found = run(fused_d2o_loss, p, backend=backend)
    assert (found["logps"] < 0).all()
    # fp32 numbers near 130 are 1.5e-5 apart, and a response's sum has up to three of them.
    assert_all_close({"logps": found["logps"]}, {"logps": exact["logps"]}, 1e-5)
    assert max(relative_errors(found["dweight"], exact["dweight"])) < 1e-4


@backends
def test_fp16_logits_beyond_the_range_of_fp16(backend: str, device: torch.device) -> None:
    """Logits of +-1e5 are infinite in fp16 and their softmax NaN; here they are fp32 from the start."""
    p = problem([[3, 4]], V=40, H=8)
    p.weight[::2] *= 2.0
    p.hidden.mul_(128.0)
    p.weight.mul_(256.0)
    p = on(device, p)
    assert (p.hidden.half() @ p.weight.half().T).isinf().any()
    exact = run(naive_d2o_loss, p, torch.float64, through=torch.float16)
    found = run(fused_d2o_loss, p, torch.float16, backend=backend)
    assert_all_close({"logps": found["logps"]}, {"logps": exact["logps"]}, 1e-6)
    assert found["dweight"].isfinite().all()
    # An fp32 logit of 1e5 has an error of 4e-3, and so have its token's probability and the weight's gradient.
    assert relative_errors(found["dweight"], exact["dweight"])[1] < 1e-2


# --------------------------------------------------------------------------------------- upstream gradients per token


@backends
def test_upstream_gradients_may_be_zero_or_share_their_memory(backend: str, device: torch.device) -> None:
    """Liger 968 took the first upstream number for all. Different numbers: test_ops.py, test_ops_triton.py.

    A sum's gradient is one number read N times with stride 0; a masked sum's is 0 for masked tokens.
    """
    p = on(device, problem([[4, 4]], V=45, H=8))

    def gradients(reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        found = []
        for function, dtype, extra in (
            (naive_linear_logprob, torch.float64, {}),
            (linear_logprob, torch.float32, {"backend": backend, "workspace_bytes": 3 * 4 * 45}),
        ):
            hidden = p.hidden.to(dtype, copy=True).requires_grad_()
            reduce(function(hidden, p.weight.to(dtype), p.targets, **extra)).backward()
            found.append(hidden.grad)
        return found

    for reduce in (torch.sum, lambda logps: logps[3::2].sum() - 2 * logps[6]):
        exact, found = gradients(reduce)
        assert max(relative_errors(found, exact)) < 3e-6
        assert torch.equal(found.count_nonzero(1) == 0, exact.count_nonzero(1) == 0)


# -------------------------------------------------------------------------------------------------- work for nothing


def test_linear_logprob_does_no_work_for_a_frozen_head() -> None:
    """Liger 1441: dWeight computed and thrown away. The loss itself: tests/loss/test_ops_contract.py."""
    p = problem([[5, 6]], V=31, H=7)
    logits, dhidden, dweight = (31, 7, 11), (11, 31, 7), (31, 11, 7)
    for trained, products in (
        (("hidden",), [logits, logits, dhidden]),
        (("weight",), [logits, logits, dweight]),
        (("hidden", "weight"), [logits, logits, dhidden, dweight]),
    ):
        inputs = {name: getattr(p, name).clone().requires_grad_(name in trained) for name in ("hidden", "weight")}
        with Products() as found:
            linear_logprob(inputs["hidden"], inputs["weight"], p.targets).sum().backward()
        assert found.shapes == products


@pytest.mark.parametrize(
    ("lengths", "rows", "most"),
    [
        ([[100, 100]], 60, 4),  # one staged prompt: the fewest chunks that hold it
        ([[10, 201]], 200, 3),  # one token too many must not make a chunk of one token beside 200 others
        ([[10, 10]] * 10, 60, 4),  # three prompts to a chunk, the last one alone
        ([[16, 15]] * 10, 60, 10),  # two do not fit together: a chunk each, at least half full
        ([[10, 10]] * 10, 10_000, 1),  # everything at once
        ([[40, 40], [5, 5], [40, 40], [5, 5]], 60, 6),  # staged prompts separate the small ones
    ],
)
def test_few_large_chunks(lengths: list[list[int]], rows: int, most: int) -> None:
    """Liger 1190, 1414: hundreds of small chunks, each of which reads and writes all of dWeight, bound by launches."""
    p = problem(lengths, V=101, H=4)
    hidden, weight = p.hidden.requires_grad_(), p.weight.requires_grad_()
    with Products() as found:
        loss = fused_d2o_loss(hidden, weight, p.targets, p.layout, p.ref_logps, workspace_bytes=rows * 4 * 101).loss
        loss.backward()
    sizes = [m for n, k, m in found.shapes if (n, k) == (101, 4)]
    assert sum(sizes) == p.layout.num_tokens, "tokens scored twice, or not at all"
    assert max(sizes) <= rows
    assert len(sizes) <= most
    assert len(found.shapes) == 3 * len(sizes)
    assert min(sizes) >= min(10, rows // 2), "a chunk too small to be worth its dWeight"


def test_the_default_workspace_holds_a_real_batch_in_few_chunks() -> None:
    """12 responses of 128 tokens over Llama 3's vocabulary: some hundred tokens to a chunk on a CPU, all on a GPU."""
    from d2o_fast.loss.ops import WORKSPACE_BYTES

    chunks = {name: math.ceil(12 * 128 * 4 * 128256 / size) for name, size in WORKSPACE_BYTES.items()}
    assert chunks["cuda"] == 1
    assert chunks["cpu"] <= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_wide_copy_of_a_16_bit_weight(dtype: torch.dtype) -> None:
    """nmoe 10: the whole weight widened to fp32 first, 13 times slower. A CPU widens a block of it at a time.

    The GPU's products take the operands as they are; the dtypes there are those of ``loss/matmul.py``.
    """
    from d2o_fast.loss.torch_engine import BLOCK_BYTES

    V, H = 64_000, 192
    p = problem([[2, 3]], V=V, H=H)
    assert BLOCK_BYTES < 0.5 * 4 * V * H, "too small a weight to tell a block from all of it"
    hidden, weight = p.hidden.to(dtype).requires_grad_(), p.weight.to(dtype)
    with Products() as found:
        fused_d2o_loss(hidden, weight, p.targets, p.layout, p.ref_logps).loss.backward()
        linear_logprob(hidden, weight, p.targets).sum().backward()
    assert found.largest <= BLOCK_BYTES


# ------------------------------------------------------------------------------------------------- heads and shards


@pytest.mark.parametrize("shape", [(0,), (0, 8), (33 * 8 // 4,)], ids=["ZeRO-3", "a rank without rows", "flat shard"])
def test_what_a_sharded_engine_leaves_of_a_weight_is_refused(shape: tuple[int, ...]) -> None:
    """TRL 6372, 4544, Liger 332: outside its module's forward a partitioned weight is empty, or a flat piece."""
    p = problem([[2, 3]], V=33, H=8)
    weight = torch.nn.Parameter(torch.zeros(shape))
    message = r"weight \(V, H\); found \(5, 8\) and \(" + str(shape[0])
    with pytest.raises(ValueError, match=message):
        fused_d2o_loss(p.hidden, weight, p.targets, p.layout, p.ref_logps)
    with pytest.raises(ValueError, match=message):
        linear_logprob(p.hidden, weight, p.targets)


def test_a_dtensor_beside_plain_tensors_is_refused_by_name(tmp_path: Path) -> None:
    """TRL 6065: "mixed torch.Tensor and DTensor" from deep inside. The weight itself: test_ops_contract.py."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    p = problem([[2, 3]], V=12, H=4, bias=True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = {"hidden": p.hidden, "weight": p.weight, "targets": p.targets, "bias": p.bias}
        for name in ("hidden", "bias", "targets"):
            mixed = plain | {name: distribute_tensor(plain[name], mesh, [Replicate()])}
            with pytest.raises(TypeError, match=rf"^{name} is a DTensor .*{name}\.full_tensor\(\)"):
                linear_logprob(**mixed)
    finally:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------- cached references


def test_cached_references_are_those_of_a_live_model(tmp_path: Path) -> None:
    """TRL 7083: the fused path refused precomputed references. A store on disk: tests/anchors/test_anchors.py.

    Each response has one number, scored in other chunks than the training step's, then written and read as text.
    """
    p = problem(MIXED, V=211, H=24)
    reference_weight = p.weight + 0.05 * torch.randn(211, 24, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logps = linear_logprob(p.hidden, reference_weight, p.targets, workspace_bytes=7 * 4 * 211)
        live = naive_linear_logprob(p.hidden.double(), reference_weight.double(), p.targets)
    (tmp_path / "references").write_text("\n".join(map(repr, sequence_logps(logps, p.layout).tolist())))
    cached = torch.tensor([float(line) for line in (tmp_path / "references").read_text().split()])
    assert torch.equal(cached, sequence_logps(logps, p.layout)), "the text loses digits"
    p.ref_logps = sequence_logps(live, p.layout)
    exact = run(naive_d2o_loss, p, torch.float64)
    for dtype in (torch.float32, torch.float64):  # both dtypes are accepted with fp32 hidden states
        p.ref_logps = cached.to(dtype)
        found = run(fused_d2o_loss, p, workspace_bytes=5 * 4 * 211)
        for name in ("loss", "dhidden", "dweight"):
            assert max(relative_errors(found[name], exact[name])) < 3e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_starts_at_its_own_cached_references(dtype: torch.dtype) -> None:
    """Every margin is 0 and the loss ln 2 at the first step, also in bf16: scoring and training agree to fp32."""
    p = problem(MIXED, V=211, H=24)
    hidden, weight = p.hidden.to(dtype), p.weight.to(dtype)
    cached = sequence_logps(linear_logprob(hidden, weight, p.targets), p.layout)
    out = fused_d2o_loss(
        hidden, weight.requires_grad_(), p.targets, p.layout, cached, alpha=1.0, beta=1.0, workspace_bytes=5 * 4 * 211
    )
    assert out.margins.abs().max() < 2e-5
    assert abs(out.loss.item() - math.log(2)) < 1e-5


# --------------------------------------------------------------------------------------------------------- autotuning


def kernel_modules() -> list[Any]:
    folder = Path(d2o_fast.__file__).parent / "kernels"
    return [importlib.import_module(f"d2o_fast.kernels.{path.stem}") for path in sorted(folder.glob("[!_]*.py"))]


def test_no_kernel_is_autotuned() -> None:
    """SkyRL 2141: tuning runs a kernel many times on the same tensors, which breaks kernels that write in place."""
    from triton.runtime.autotuner import Autotuner, Heuristics

    kernels = {
        f"{module.__name__}.{name}": value
        for module in kernel_modules()
        for name, value in vars(module).items()
        if hasattr(value, "run") and hasattr(value, "__getitem__")
    }
    assert len(kernels) >= 5, "no longer finds the kernels"
    assert [name for name, kernel in kernels.items() if isinstance(kernel, (Autotuner, Heuristics))] == []


def test_a_kernel_that_writes_in_place_runs_once_per_chunk(device: torch.device, monkeypatch: Any) -> None:
    from d2o_fast.kernels import logit_grad

    launches: list[int] = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid[0])
            return self.kernel[grid]

    monkeypatch.setattr(logit_grad, "logit_grad_kernel", Counted(logit_grad.logit_grad_kernel))
    p = on(device, problem([[2, 3], [4, 5], [1, 1]], V=65, H=8))
    exact = run(naive_d2o_loss, p, torch.float64)
    found = run(fused_d2o_loss, p, backend="triton", workspace_bytes=7 * 4 * 65)
    assert sorted(launches) == [2, 4, 5, 5]  # two whole prompts, and two chunks of the one of nine tokens
    assert_all_close(found, exact, 3e-6)

"""Attention over shared prompts against the definition: one sequence at a time, in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from d2o_fast.forward.attention import shared_attention
from d2o_fast.forward.flash import CpuFlash, CudaFlash, choose_kernel
from d2o_fast.forward.shared_sequence import SharedSequence, Spans
from helpers import assert_close, relative_errors

ROWS = {
    "ragged": SharedSequence((5, 1, 9), ((3, 7, 1), (4, 2), (6, 6, 6, 2))),
    "even": SharedSequence((8, 8), ((4,) * 5, (4,) * 5)),
    "one prompt": SharedSequence((40,), ((33, 20),)),
}
HEADS = {"4 of 4": (4, 4), "4 of 2": (4, 2), "6 of 1": (6, 1)}


def operands(row: SharedSequence, heads: tuple[int, int], channels: int = 16, size: float = 1.0) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, in fp64; queries are not contiguous, as transformers passes them."""
    generator = torch.Generator().manual_seed(3)
    tokens = sum(row.prompts) + sum(map(sum, row.responses))
    q, k, v, grad = (
        torch.randn(n, tokens, channels, generator=generator, dtype=torch.float64).transpose(0, 1)
        for n in (heads[0], heads[1], heads[1], heads[0])
    )
    return [size * q, k, v, grad]


def one_at_a_time(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: SharedSequence, scale: float, window: Any, softcap: Any
) -> torch.Tensor:
    """The definition: each prompt + response is a sequence with its own causal mask."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    out = torch.full_like(q, math.nan)
    prompt_start, response_start = 0, sum(row.prompts)
    pieces: list[tuple[list[int], torch.Tensor]] = []
    for prompt, responses in zip(row.prompts, row.responses, strict=True):
        before = list(range(prompt_start, prompt_start + prompt))
        for length in responses:
            own = list(range(response_start, response_start + length))
            index = before + own
            scores = torch.einsum("qad,kad->aqk", q[index], k[index]) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            position = torch.arange(len(index))
            distance = position[:, None] - position
            hidden = (distance < 0) | (distance >= (window or 10**9))
            found = torch.einsum("aqk,kad->qad", scores.masked_fill(hidden, -math.inf).softmax(-1), v[index])
            pieces.append((own, found[prompt:]))
            response_start += length
        pieces.append((before, found[:prompt]))
        prompt_start += prompt
    order = torch.tensor([token for index, _ in pieces for token in index])
    out = torch.cat([values for _, values in pieces])
    return out[order.argsort()]


def with_gradients(function: Any, operands_: list[torch.Tensor]) -> list[torch.Tensor]:
    *leaves, grad = operands_
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check(row: SharedSequence, heads: tuple[int, int], dtype: torch.dtype, bound: float, **options: Any) -> str:
    kernel, scale = options.pop("kernel", None), options.pop("scale", 0.3)
    window, softcap = options.get("window"), options.get("softcap")
    rounded = [x.to(dtype) for x in operands(row, heads, **{k: v for k, v in options.items() if k == "size"})]
    expected = with_gradients(
        lambda q, k, v: one_at_a_time(q, k, v, row, scale, window, softcap), [x.double() for x in rounded]
    )
    how: list[str] = []

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, words = shared_attention(q, k, v, row, scale, window, softcap, kernel)
        how.append(words)
        return out

    for found, true in zip(with_gradients(ours, rounded), expected, strict=True):
        assert found.dtype == dtype
        if true.any():  # with a window of 1, no gradient reaches queries and keys
            assert_close(found, true, bound)
        else:
            assert found.abs().max() < bound
    return how[0]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_split_attention_is_attention_of_each_sequence(row: SharedSequence, heads: tuple[int, int]) -> None:
    how = check(row, heads, torch.float64, 1e-14, kernel=CpuFlash())
    assert how == CpuFlash.name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_split_attention_in_other_types(dtype: torch.dtype, bound: float) -> None:
    check(ROWS["ragged"], (4, 2), dtype, bound, kernel=CpuFlash())


@pytest.mark.parametrize("size", [1e-3, 30.0, 300.0])
def test_scores_of_any_size(size: float) -> None:
    check(ROWS["ragged"], (4, 2), torch.float64, 1e-12, kernel=CpuFlash(), size=size)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 8, 11, 14])
def test_windows_and_softcaps_are_exact(window: int | None, softcap: float | None) -> None:
    row = ROWS["ragged"]
    how = check(row, (4, 2), torch.float64, 1e-14, kernel=CpuFlash(), window=window, softcap=softcap)
    assert row.longest == 15
    assert how == ("segment by segment" if window or softcap else CpuFlash.name)


def test_a_window_that_does_not_bind_costs_nothing() -> None:
    how = check(ROWS["ragged"], (4, 2), torch.float64, 1e-14, kernel=CpuFlash(), window=15)
    assert how == CpuFlash.name


def test_softcaps_in_bf16_are_computed_in_fp32_and_rounded_once() -> None:
    check(ROWS["ragged"], (4, 2), torch.bfloat16, 1e-2, softcap=0.7)
    given = [x.bfloat16() for x in operands(ROWS["ragged"], (4, 2))[:3]]
    rounded, exact = (
        shared_attention(*(x.to(dtype) for x in given), ROWS["ragged"], 0.3, softcap=0.7)[0]
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_autocast_does_not_reach_inside(softcap: float | None) -> None:
    given = [x.float() for x in operands(ROWS["ragged"], (4, 2))[:3]]
    expected = shared_attention(*given, ROWS["ragged"], 0.3, window=4, softcap=softcap)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(shared_attention(*given, ROWS["ragged"], 0.3, window=4, softcap=softcap)[0], expected)


def test_no_kernel_means_segments() -> None:
    assert check(ROWS["ragged"], (4, 2), torch.float64, 1e-14) == "segment by segment"


def test_the_same_bits_every_time() -> None:
    def run() -> list[torch.Tensor]:
        return with_gradients(lambda q, k, v: shared_attention(q, k, v, row, 0.3, kernel=CpuFlash())[0], given)

    row, given = ROWS["ragged"], [x.float() for x in operands(ROWS["ragged"], (4, 2))]
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# --- The CUDA path without a device: its operators, implemented here on the CPU --------------------------------------


@pytest.fixture
def flash_on_cpu() -> Iterator[list[dict[str, Any]]]:
    """Implements ``aten::_flash_attention_forward`` and ``_backward`` as documented, in fp64; yields the calls."""
    calls: list[dict[str, Any]] = []

    def probabilities(q, k, cu_q, cu_k, causal, scale, left, right):  # type: ignore[no-untyped-def]
        """Scores of each segment, -inf where hidden: causality is aligned at the segments' ends."""
        for s in range(len(cu_q) - 1):
            a, b, c, d = *cu_q[s : s + 2].tolist(), *cu_k[s : s + 2].tolist()
            keys = k[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1).double()
            scores = torch.einsum("qad,kad->aqk", q[a:b].double(), keys) * scale
            last = torch.arange(b - a)[:, None] + (d - c) - (b - a)
            key = torch.arange(d - c)
            hidden = torch.zeros(b - a, d - c, dtype=torch.bool)
            if causal or (right is not None and right >= 0):
                hidden |= key > last + (0 if causal else right)
            if left is not None and left >= 0:
                hidden |= key < last - left
            yield (a, b), (c, d), scores.masked_fill(hidden, -math.inf)

    def examine(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal):  # type: ignore[no-untyped-def]
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert cu_q.is_contiguous() and cu_q[0] == cu_k[0] == 0  # noqa: PT018
        assert (cu_q[-1], cu_k[-1]) == (q.shape[0], k.shape[0])
        assert (cu_q.diff().max(), cu_k.diff().max()) == (max_q, max_k)
        assert cu_q.diff().min() > 0
        assert cu_k.diff().min() > 0
        assert dropout == 0.0
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert k.shape == v.shape

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, **more):  # type: ignore[no-untyped-def]
        examine(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal)
        left, right = more.get("window_size_left"), more.get("window_size_right")
        calls.append({"causal": causal, "left": left, "segments": len(cu_q) - 1})
        out, lse = torch.full(q.shape, math.nan, dtype=q.dtype), torch.full((q.shape[1], q.shape[0]), math.nan)
        for (a, b), (c, d), scores in probabilities(q, k, cu_q, cu_k, causal, scale, left, right):
            values = v[c:d].repeat_interleave(q.shape[1] // v.shape[1], 1).double()
            out[a:b] = torch.einsum("aqk,kad->qad", scores.softmax(-1), values).to(q.dtype)
            lse[:, a:b] = scores.logsumexp(-1).float()
        empty = torch.empty(0)
        return out, lse, torch.zeros(2, dtype=torch.uint64), empty, empty

    def backward(
        grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, *, scale=None, **more
    ):  # type: ignore[no-untyped-def]
        examine(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal)
        assert lse.shape == (q.shape[1], q.shape[0])
        assert lse.is_contiguous()
        assert lse.dtype == torch.float32
        assert grad.is_contiguous()
        assert out.is_contiguous()
        left, right = more.get("window_size_left"), more.get("window_size_right")
        dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v))
        heads = k.shape[1]
        for (a, b), (c, d), scores in probabilities(q, k, cu_q, cu_k, causal, scale, left, right):
            p = (scores - lse[:, a:b, None].double()).exp()
            g, o, queries = (x[a:b].double() for x in (grad, out, q))
            repeat = q.shape[1] // heads
            keys, values = (x[c:d].double().repeat_interleave(repeat, 1) for x in (k, v))
            ds = p * (torch.einsum("qad,kad->aqk", g, values) - (g * o).sum(-1).T[:, :, None]) * scale
            dq[a:b] += torch.einsum("aqk,kad->qad", ds, keys)
            dk[c:d] += torch.einsum("aqk,qad->kad", ds, queries).unflatten(1, (heads, repeat)).sum(2)
            dv[c:d] += torch.einsum("aqk,qad->kad", p, g).unflatten(1, (heads, repeat)).sum(2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield calls
    library._destroy()


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_the_cuda_path_by_its_operators(flash_on_cpu: list[dict[str, Any]], row: SharedSequence) -> None:
    how = check(row, (4, 2), torch.float64, 1e-5, kernel=CudaFlash())  # its log-sum-exp is in fp32
    assert how == CudaFlash.name
    segments = len(row.prompts) + sum(map(len, row.responses))
    assert flash_on_cpu == [
        {"causal": True, "left": None, "segments": segments},
        {"causal": False, "left": None, "segments": len(row.prompts)},
    ]


@pytest.mark.parametrize("window", [1, 2, 4, 8])
def test_the_cuda_path_with_a_window(flash_on_cpu: list[dict[str, Any]], window: int) -> None:
    how = check(ROWS["ragged"], (4, 2), torch.float64, 1e-5, kernel=CudaFlash(), window=window)
    assert how == f"{CudaFlash.name}, windowed"
    assert flash_on_cpu == [{"causal": True, "left": window - 1, "segments": 12}]


def test_a_merge_left_to_autograd_would_be_wrong(flash_on_cpu: list[dict[str, Any]]) -> None:
    """The reason for our own backward: a log-sum-exp without a gradient silently gives wrong dQ and dK."""
    row, n, scale = ROWS["ragged"], ROWS["ragged"].num_prompt_tokens, 0.3
    kernel, given = CudaFlash(), operands(ROWS["ragged"], (4, 2))

    class Part(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, spans, causal):  # type: ignore[no-untyped-def]
            out, lse = kernel.forward(q, k, v, spans, causal, scale, None, None)
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.arguments = (spans, causal, scale, None, None)
            ctx.mark_non_differentiable(lse)
            return out, lse

        @staticmethod
        def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
            return *kernel.backward(grad.contiguous(), *ctx.saved_tensors, *ctx.arguments), None, None

    def merged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        own, lse = Part.apply(q, k, v, row.own, True)
        cross, cross_lse = Part.apply(q[n:], k[:n], v[:n], row.cross, False)
        share = torch.sigmoid(cross_lse - lse[:, n:]).T.unsqueeze(-1)
        return torch.cat([own[:n], own[n:] + (cross - own[n:]) * share])

    expected = with_gradients(lambda q, k, v: one_at_a_time(q, k, v, row, scale, None, None), given)
    found = with_gradients(merged, given)
    errors = [relative_errors(mine, true)[1] for mine, true in zip(found, expected, strict=True)]
    assert errors[0] < 1e-6  # the output is right
    assert min(errors[1], errors[2]) > 0.05  # dQ, dK are not


def test_the_cpu_kernel_refuses_what_it_would_align_otherwise() -> None:
    q, k, v, _ = operands(ROWS["ragged"], (4, 2))
    with pytest.raises(ValueError, match="only where queries and keys are as many"):
        CpuFlash().forward(q[:3], k[:4], v[:4], Spans([3], [4]), True, 0.3, None, None)


@pytest.mark.parametrize(
    ("device", "dtype", "channels", "implementation", "expected"),
    [
        ("cpu", torch.float64, 13, "sdpa", "CpuFlash"),
        ("cuda", torch.bfloat16, 128, "sdpa", "CudaFlash"),
        ("cuda", torch.float16, 64, "flash_attention_2", "FlashAttnPackage"),
        ("cuda", torch.float32, 64, "sdpa", None),
        ("cuda", torch.bfloat16, 60, "sdpa", None),
        ("cuda", torch.bfloat16, 512, "sdpa", None),
    ],
)
def test_which_kernel(
    device: str, dtype: torch.dtype, channels: int, implementation: str, expected: str | None
) -> None:
    class Stub:
        def __init__(self) -> None:
            self.device, self.dtype, self.shape = torch.device(device), dtype, (7, 4, channels)

    kernel = choose_kernel(Stub(), Stub(), implementation)  # type: ignore[arg-type]
    assert (None if kernel is None else type(kernel).__name__) == expected

"""The kernels at the sizes of real heads, for which the interpreter is too slow and a CPU too small."""

from __future__ import annotations

import math

import pytest
import torch

from d2o_fast.kernels import linear_logprob as forward_module
from d2o_fast.kernels.filtered_products import filtered_products
from d2o_fast.kernels.linear_logprob import linear_logprob_forward
from d2o_fast.kernels.logit_grad import logit_grad_, logit_stats
from d2o_fast.loss.layout import ResponseLayout
from d2o_fast.loss.ops import fused_d2o_loss
from d2o_fast.loss.reference import d2o_loss, naive_linear_logprob, sequence_logps
from helpers import assert_close

pytestmark = pytest.mark.gpu

# Few cases, since compiling takes most of a case's time: benchmarks.gpu runs these tests within its ten minutes.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SETTINGS = {
    "plain": {},
    "bias": {"bias": True},
    "capped": {"softcap": 30.0},
    "all": {"bias": True, "softcap": 30.0, "logit_scale": 0.0625},
}
# (N, H, V) of Qwen2.5-0.5B, Llama-3.2-1B, Gemma-2-2B, and of rows that only pointers can read.
HEADS = {
    "896 x 151936": (1500, 896, 151936),
    "2048 x 128256": (1500, 2048, 128256),
    "2304 x 256000": (700, 2304, 256000),
    "odd": (333, 1023, 50257),
}


def problem(device, N, H, V, dtype, *, bias=False, **settings):
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, device=device).to(dtype)
    weight = (2 * torch.randn(V, H, generator=generator, device=device) / math.sqrt(H)).to(dtype)
    targets = torch.randint(V, (N,), generator=generator, device=device)
    offset = torch.randn(V, generator=generator, device=device) if bias else None
    return hidden, weight, targets, {"bias": offset, **settings}


def logprob64(hidden, weight, targets, **options):
    """The reference in fp64, some rows at a time."""
    weight = weight.double()
    parts = zip(hidden.split(250), targets.split(250), strict=True)
    return torch.cat([naive_linear_logprob(rows.double(), weight, columns, **options) for rows, columns in parts])


@pytest.mark.parametrize(
    ("head", "dtype", "settings"),
    [(head, dtype, "plain") for head in HEADS for dtype in DTYPES]
    + [("2048 x 128256", "bf16", name) for name in SETTINGS if name != "plain"],
)
def test_forward_at_the_size_of_a_real_head(device, dtype, head, settings) -> None:
    """There are many tiles in every direction, V * H exceeds 2^31 bytes, and two runs give the same bits."""
    hidden, weight, targets, options = problem(device, *HEADS[head], DTYPES[dtype], **SETTINGS[settings])
    logps, stats = linear_logprob_forward(hidden, weight, targets, **options)
    assert_close(logps, logprob64(hidden, weight, targets, **options), 2e-6, 1e-6)
    again = linear_logprob_forward(hidden, weight, targets, **options)
    assert torch.equal(logps, again[0])
    assert torch.equal(stats, again[1])


@pytest.mark.parametrize("N", [1, 100, 12288], ids=lambda N: f"{N} rows")
def test_descriptors_and_pointers_agree(device, monkeypatch, N) -> None:
    hidden, weight, targets, _ = problem(device, N, 2048, 128256, torch.bfloat16)
    first = linear_logprob_forward(hidden, weight, targets)
    monkeypatch.setattr(forward_module, "DESCRIPTOR_TILES", {})
    second = linear_logprob_forward(hidden, weight, targets)
    for ours, theirs in zip(first, second, strict=True):
        assert_close(ours, theirs, 2e-6, 1e-6)


@pytest.mark.parametrize(
    ("dtype", "settings"), [*((dtype, "plain") for dtype in DTYPES), ("bf16", "bias"), ("bf16", "all")]
)
def test_rows_of_a_real_vocabulary(device, dtype, settings) -> None:
    n, V = 300, 151936
    hidden, weight, targets, options = problem(device, n, 64, V, torch.float32, **SETTINGS[settings])
    raw = hidden @ weight.T
    coef = torch.randn(n, device=device)
    leaf = raw.double().requires_grad_()
    x = leaf if options["bias"] is None else leaf + options["bias"].double()
    x = x * options.get("logit_scale", 1.0)
    if "softcap" in options:
        x = options["softcap"] * torch.tanh(x / options["softcap"])
    reference = x.log_softmax(1).gather(1, targets[:, None])[:, 0]
    (reference * coef.double()).sum().backward()
    logps, stats = logit_stats(raw, targets, **options)
    assert_close(logps, reference, 1e-6)
    grad = logit_grad_(raw, targets, stats, coef, **options, out_dtype=DTYPES[dtype])
    assert_close(grad, leaf.grad, 2e-6 + ROUNDING[DTYPES[dtype]])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("head", "share"), [*((head, 0.02) for head in HEADS), ("2048 x 128256", 1.0)], ids=[*HEADS, "all columns kept"]
)
def test_filtered_products_at_the_size_of_a_real_head(device, dtype, head, share) -> None:
    """Compares with the vendor's products of the same columns; ``share`` of the columns exceed the bound."""
    n, H, V = HEADS[head]
    hidden, weight, _, _ = problem(device, n, H, V, dtype)
    grad = torch.randn(n, V, device=device).mul_(torch.rand(V, device=device) < share).add_(1e-6)
    coef = torch.ones(n, device=device)
    memory = torch.empty_like(grad)
    view = memory if dtype == torch.float32 else memory.view(dtype)[:, :V]
    kept = (grad.to(dtype).float().abs() > 1e-3).any(0)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        view.copy_(grad)
        dhidden = torch.full_like(hidden, float("nan"))
        dweight = torch.full((V, H), float("nan"), device=device)
        assert int(filtered_products(view, coef, 1e-3, weight, hidden, dhidden, dweight, True)) == int(kept.sum())
        return dhidden, dweight

    dhidden, dweight = run()
    exact = grad.to(dtype)[:, kept]
    assert_close(dhidden, exact.double() @ weight[kept].double(), 5e-6 + ROUNDING[dtype])
    assert (dweight[~kept] == 0).all()
    columns = kept.nonzero()[:, 0]
    some = columns[:: max(1, len(columns) // 500)]
    assert_close(dweight[some], grad.to(dtype)[:, some].double().T @ hidden.double(), 5e-6)
    for first, second in zip((dhidden, dweight), run(), strict=True):
        assert torch.equal(first, second)


def test_launchers_of_real_sizes_do_not_wait_for_the_device(device) -> None:
    hidden, weight, targets, _ = problem(device, 512, 1024, 32000, torch.bfloat16)
    logits = torch.randn(512, 32000, device=device)
    coef = torch.randn(512, device=device)
    dhidden, dweight = torch.empty_like(hidden), torch.empty(32000, 1024, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_logprob_forward(hidden, weight, targets)
        _, stats = logit_stats(logits, targets)
        grad = logit_grad_(logits, targets, stats, coef, out_dtype=torch.bfloat16)
        filtered_products(grad, coef, 1e-4, weight, hidden, dhidden, dweight, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("eps", [None, 1e-4], ids=["dense", "filtered"])
def test_one_pass_gradient_of_a_head_beyond_32_bits(device, eps) -> None:
    """V * H = 3.1e9: the weight has 6 GB, its fp32 sum 12.6 GB. dweight is compared at some rows, in fp64."""
    V, H = 256000, 12288
    if torch.cuda.mem_get_info()[0] < 45 << 30:
        pytest.skip("needs a CUDA device with 45 GB of free memory")
    layout = ResponseLayout.from_lengths([[7, 9, 5], [11, 3]])
    hidden, weight, targets, _ = problem(device, layout.num_tokens, H, V, torch.bfloat16)
    ref_logps = torch.zeros(layout.num_responses, device=device)
    hidden.requires_grad_()
    weight.requires_grad_()
    out = fused_d2o_loss(hidden, weight, targets, layout, ref_logps, alpha=0.1, beta=0.1, grad_filter_eps=eps)
    out.loss.backward()

    # The same in fp64, with the logits of all rows (35 x 256000) and blocks of the weight.
    rows = hidden.detach().double()
    blocks = weight.detach().split(16000)
    logits = torch.cat([rows @ block.double().T for block in blocks], 1).requires_grad_()
    token_logps = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    reference = d2o_loss(sequence_logps(token_logps, layout), ref_logps.double(), layout, alpha=0.1, beta=0.1)
    reference.loss.backward()
    assert_close(out.loss, reference.loss, 1e-6)
    # bf16 gradients; the filter leaves out the tail of this nearly flat softmax, a few hundredths of dhidden.
    largest = 2e-2 if eps is None else 8e-2
    slices = [part @ block.double() for part, block in zip(logits.grad.split(16000, 1), blocks, strict=True)]
    assert_close(hidden.grad, torch.stack(slices).sum(0), largest)
    some = torch.cat([targets, torch.arange(V - 200, V, device=device)])
    assert_close(weight.grad[some], logits.grad[:, some].T @ rows, largest)

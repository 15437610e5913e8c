"""The kernels against the fp64 reference, at shapes that no block divides; interpreted on a CPU, compiled on CUDA."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from d2o_fast.kernels import linear_logprob as forward_module
from d2o_fast.kernels.common import architecture
from d2o_fast.kernels.group_loss import group_loss
from d2o_fast.kernels.linear_logprob import (
    DESCRIPTOR_TILES,
    MAX_ITEMS_PER_PROCESSOR,
    TILES,
    choose_splits,
    linear_logprob_forward,
)
from d2o_fast.kernels.logit_grad import ROW_TILES, logit_grad_, logit_stats
from d2o_fast.loss.layout import ResponseLayout
from d2o_fast.loss.reference import Margin, d2o_loss, margin_loss, naive_linear_logprob
from helpers import assert_close, poison_empty, relative_errors

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
SETTINGS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"logit_scale": 0.25},  # Cohere, Granite
    "capped": {"softcap": 3.0},  # Gemma 2, with a cap low enough to bend the logits of these tests
    "all": {"bias": True, "softcap": 3.0, "logit_scale": 1.5},
}


@pytest.fixture(autouse=True)
def _no_write_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)


def problem(device, N, H, V, dtype=torch.float32, *, bias=False, seed=0, **settings):
    """Arguments of ``linear_logprob_forward`` with logits of standard deviation about 2."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator).to(device, dtype)
    weight = (2 * torch.randn(V, H, generator=generator) / math.sqrt(H)).to(device, dtype)
    targets = torch.randint(V, (N,), generator=generator).to(device)
    offset = torch.randn(V, generator=generator).to(device) if bias else None
    return hidden, weight, targets, {"bias": offset, **settings}


def logits64(hidden, weight, bias=None, softcap=None, logit_scale=1.0):
    """The reference's logits in fp64."""
    x = hidden.double() @ weight.double().T
    x = (x if bias is None else x + bias.double()) * logit_scale
    return x if softcap is None else softcap * torch.tanh(x / softcap)


# ------------------------------------------------------------------------------------------------ the forward kernel


@DTYPES
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_forward_matches_fp64(device, dtype, settings) -> None:
    hidden, weight, targets, options = problem(device, 37, 45, 131, dtype, **settings)
    logps, stats = linear_logprob_forward(hidden, weight, targets, **options)
    assert logps.dtype == stats.dtype == torch.float32
    assert_close(logps, naive_linear_logprob(hidden.double(), weight.double(), targets, **options), 1e-6, 5e-7)
    assert_close(stats.sum(0), logits64(hidden, weight, **options).logsumexp(1), 1e-6, 5e-7)


@pytest.mark.sanitize
@DTYPES
def test_forward_error_is_not_above_eager_in_the_same_dtype(device, dtype) -> None:
    hidden, weight, targets, options = problem(device, 64, 96, 500, dtype)
    reference = naive_linear_logprob(hidden.double(), weight.double(), targets)
    ours = relative_errors(linear_logprob_forward(hidden, weight, targets, **options)[0], reference)
    eager = relative_errors(naive_linear_logprob(hidden, weight, targets), reference)
    # In fp32 both errors are roundings near 1e-7, whose sizes mean nothing; a 16-bit eager logit is rounded.
    assert ours[0] <= max(eager[0], 5e-7)
    assert ours[1] <= max(eager[1], 3e-7)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("N", "H", "V"),
    [
        (1, 1, 1),  # one of everything: the only token is certain
        (1, 32, 32),  # one row, blocks otherwise full
        (16, 32, 64),  # nothing to mask anywhere
        (17, 33, 33),  # one beyond every block of the interpreter
        (15, 31, 31),  # one short of every block
        (3, 5, 2000),  # many splits of the vocabulary for one tile of rows
        (129, 65, 257),  # one beyond the blocks of the GPU tables
    ],
)
def test_forward_masks_every_tail(device, N, H, V) -> None:
    hidden, weight, targets, _ = problem(device, N, H, V)
    logps, stats = linear_logprob_forward(hidden, weight, targets)
    assert (logps <= 1e-6).all(), "a probability above one: padding took part"
    logits = logits64(hidden, weight)
    assert_close(stats.sum(0), logits.logsumexp(1), 1e-6)
    assert_close(logps, logits.log_softmax(1).gather(1, targets[:, None])[:, 0], 1e-6)


def test_forward_pads_the_vocabulary_below_very_negative_logits(device) -> None:
    """verl 2656: padded columns of logit 0 beside real ones near -130 made log-probabilities of +123."""
    hidden = torch.full((5, 4), 1.0, device=device)
    weight = torch.full((33, 4), -32.5, device=device)
    logps, stats = linear_logprob_forward(hidden, weight, torch.arange(5, device=device))
    assert_close(logps, torch.full((5,), -math.log(33)), 1e-6)
    assert_close(stats.sum(0), torch.full((5,), -130 + math.log(33)), 1e-6)


@pytest.mark.sanitize
def test_forward_respects_strides(device) -> None:
    hidden, weight, targets, _ = problem(device, 20, 24, 70, bias=True)
    reference = linear_logprob_forward(hidden, weight, targets)[0]
    wide = torch.full((20, 60), float("nan"), device=device)
    wide[:, 3:51:2] = hidden  # a gap between rows, an odd start, every other element
    views = {
        "every other element": (wide[:, 3:51:2], weight),
        "transposed": (hidden.T.contiguous().T, weight.T.contiguous().T),
        "rows backwards in a larger buffer": (torch.cat([hidden, wide[:, :24]])[:20], weight),
    }
    for name, (hidden_view, weight_view) in views.items():
        assert torch.equal(linear_logprob_forward(hidden_view, weight_view, targets)[0], reference), name
    every_other_target = targets.repeat_interleave(2)[::2]
    assert torch.equal(linear_logprob_forward(hidden, weight, every_other_target.int())[0], reference)
    repeated = hidden[:1].expand(20, 24)  # row stride 0
    assert_close(
        linear_logprob_forward(repeated, weight, targets)[0],
        naive_linear_logprob(repeated.double(), weight.double(), targets),
        1e-6,
    )


@pytest.mark.sanitize
def test_forward_rounds_an_fp32_weight_to_the_dtype_of_hidden(device) -> None:
    hidden, weight, targets, _ = problem(device, 20, 48, 70)
    hidden = hidden.half()  # not bf16, to which the interpreter truncates instead of rounding
    mixed = linear_logprob_forward(hidden, weight, targets)[0]
    assert_close(mixed, naive_linear_logprob(hidden.double(), weight.half().double(), targets), 1e-6)


def test_forward_survives_extreme_logits(device) -> None:
    """Logits are +-1e4 in one row and in all columns of some tiles."""
    N, V = 6, 150
    logits = torch.zeros(N, V, device=device)
    logits[0] = -1e4
    logits[1] = 1e4
    logits[2, 149] = 1e4  # the last column of the last tile dominates all before it
    logits[3, 0] = 1e4  # the first column dominates all after it
    logits[4] = torch.linspace(-1e4, 1e4, V, device=device)
    logits[5, :64] = -1e4
    targets = torch.tensor([3, 3, 149, 1, 149, 0], device=device)
    logps, stats = linear_logprob_forward(torch.eye(N, device=device), logits.T.contiguous(), targets)
    assert_close(stats.sum(0), logits.double().logsumexp(1), 1e-7)
    assert_close(logps, logits.double().log_softmax(1).gather(1, targets[:, None])[:, 0], 1e-7)


def test_forward_takes_a_masked_vocabulary(device) -> None:
    """A bias of -inf forbids whole tiles and whole splits of tokens, and the target of one row."""
    hidden, weight, targets, _ = problem(device, 18, 20, 300)
    bias = torch.zeros(300, device=device)
    bias[10:290] = float("-inf")
    targets[:] = 295
    targets[4] = 100
    logps, stats = linear_logprob_forward(hidden, weight, targets, bias)
    reference = (logits64(hidden, weight) + bias.double()).log_softmax(1).gather(1, targets[:, None])[:, 0]
    assert reference[4] == float("-inf")
    assert_close(logps, reference, 1e-6)
    assert stats.isfinite().all()


def test_forward_answers_nan_for_a_target_outside_the_vocabulary(device) -> None:
    hidden, weight, targets, _ = problem(device, 5, 8, 33)
    good = linear_logprob_forward(hidden, weight, targets)
    targets = targets.clone()
    targets[1], targets[3], targets[4] = -100, 33, 2**40  # 33 is a padded column of the last tile
    logps, stats = linear_logprob_forward(hidden, weight, targets)
    assert logps.isnan().tolist() == [False, True, False, True, True]
    assert torch.equal(logps[[0, 2]], good[0][[0, 2]])
    assert torch.equal(stats, good[1])


def test_forward_lets_nan_through(device) -> None:
    hidden, weight, targets, _ = problem(device, 4, 8, 40)
    hidden[2, 3] = float("nan")
    for softcap in (None, 5.0):
        logps, stats = linear_logprob_forward(hidden, weight, targets, softcap=softcap)
        assert logps.isnan().tolist() == stats.sum(0).isnan().tolist() == [False, False, True, False]


def test_forward_of_no_rows(device) -> None:
    hidden, weight, targets, _ = problem(device, 0, 8, 40)
    logps, stats = linear_logprob_forward(hidden, weight, targets)
    assert (logps.shape, stats.shape) == ((0,), (2, 0))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: a.update(hidden=a["hidden"].double()), TypeError),
        (lambda a: a.update(targets=a["targets"].float()), TypeError),
        (lambda a: a.update(weight=a["weight"][:, :-1]), ValueError),
        (lambda a: a.update(weight=a["weight"][:0]), ValueError),
        (lambda a: a.update(targets=a["targets"][:-1]), ValueError),
        (lambda a: a.update(bias=torch.zeros(3, device=a["hidden"].device)), ValueError),
        (lambda a: a.update(softcap=0.0), ValueError),
        (lambda a: a.update(weight=a["weight"].to("meta")), ValueError),
    ],
    ids=["fp64", "float targets", "other H", "no V", "other N", "other bias", "softcap 0", "two devices"],
)
def test_forward_refuses(device, change, error) -> None:
    hidden, weight, targets, _ = problem(device, 5, 8, 33)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets}
    change(arguments)
    with pytest.raises(error):
        linear_logprob_forward(**arguments)


@pytest.mark.parametrize("processors", [1, 4, 132])
@pytest.mark.parametrize("num_n_tiles", [1, 7, 96, 1000])
@pytest.mark.parametrize("num_v_tiles", [1, 3, 501])
def test_splits_cover_the_vocabulary_once(num_n_tiles, num_v_tiles, processors) -> None:
    splits, tiles = choose_splits(num_n_tiles, num_v_tiles, processors)
    assert (splits - 1) * tiles < num_v_tiles <= splits * tiles, "an empty split, or columns that none covers"


def test_few_rows_still_use_the_whole_device() -> None:
    splits, tiles = choose_splits(1, 501, 132)
    assert splits > 120
    assert tiles == 4


@pytest.mark.parametrize("num_n_tiles", [1, 5, 96, 3000])
def test_partial_results_do_not_grow_with_the_batch(num_n_tiles) -> None:
    splits, _ = choose_splits(num_n_tiles, 501, 132)
    assert splits == 1 or splits * num_n_tiles <= MAX_ITEMS_PER_PROCESSOR * 132


def test_every_architecture_has_a_tile_for_every_kind() -> None:
    for table in (TILES, ROW_TILES):
        architectures, kinds = {arch for arch, _ in table}, {kind for _, kind in table}
        assert len(table) == len(architectures) * len(kinds)


# ------------------------------------------------------------------------------- the forward through tensor descriptors


@pytest.fixture
def chosen(monkeypatch) -> list[str]:
    """Names of the forward kernels in the order of their launches."""
    names: list[str] = []
    for name in ("linear_logprob_kernel", "linear_logprob_tma_kernel"):

        class Spy:
            def __init__(self, kernel, name: str) -> None:
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                names.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(forward_module, name, Spy(getattr(forward_module, name), name))
    return names


def best_kernel(device: torch.device) -> str:
    """The forward for rows that descriptors can read; a device without descriptors uses pointers."""
    has_descriptors = architecture(device) in DESCRIPTOR_TILES
    return "linear_logprob_tma_kernel" if has_descriptors else "linear_logprob_kernel"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    ("N", "H", "V"),
    [
        (1, 8, 1),  # one row, one token, the narrowest row that is a multiple of 16 bytes
        (37, 40, 131),  # tails everywhere: they read as zero, and must not count
        (16, 64, 64),  # no tail anywhere
        pytest.param(3, 24, 1000, marks=pytest.mark.slow),  # many splits, one tile of rows
        pytest.param(70, 40, 33, marks=pytest.mark.slow),  # more row tiles than programs
    ],
)
def test_descriptors_match_fp64_and_pointers(device, chosen, monkeypatch, dtype, settings, N, H, V) -> None:
    hidden, weight, targets, options = problem(device, N, H, V, dtype, **settings)
    best = best_kernel(device)
    by_descriptor = linear_logprob_forward(hidden, weight, targets, **options)
    monkeypatch.setattr(forward_module, "DESCRIPTOR_TILES", {})
    by_pointer = linear_logprob_forward(hidden, weight, targets, **options)
    assert chosen == [best, "linear_logprob_kernel"]
    reference = naive_linear_logprob(hidden.double(), weight.double(), targets, **options)
    lse = logits64(hidden, weight, **options).logsumexp(1)
    for logps, sums in (by_descriptor, by_pointer):
        assert_close(logps + 1, reference + 1, 1e-6)  # + 1: the one token of a vocabulary has log-probability 0
        assert_close(sums.sum(0), lse, 1e-6)


@pytest.mark.sanitize
def test_descriptors_take_rows_apart_and_a_masked_vocabulary(device, chosen) -> None:
    hidden, weight, targets, _ = problem(device, 20, 24, 300, torch.bfloat16)
    wide = torch.full((20, 64), float("nan"), device=device, dtype=torch.bfloat16)
    wide[:, 8:32] = hidden
    bias = torch.zeros(300, device=device)
    bias[10:290] = float("-inf")
    targets[:] = 295
    logps, _ = linear_logprob_forward(wide[:, 8:32], weight, targets, bias.repeat_interleave(2)[::2])
    reference = (logits64(hidden, weight) + bias.double()).log_softmax(1).gather(1, targets[:, None])[:, 0]
    assert_close(logps, reference, 1e-6)
    targets[:5] = torch.tensor([-100, 300, 2**40, -(2**33), 0], device=device)
    assert linear_logprob_forward(hidden, weight, targets)[0].isnan().tolist() == [True] * 4 + [False] * 16
    assert chosen == [best_kernel(device)] * 2


@pytest.mark.parametrize(
    "change",
    [
        lambda hidden, weight: (hidden[:, :23], weight[:, :23].contiguous()),  # rows of the weight 46 bytes apart
        lambda hidden, weight: (hidden[:, 4:20], weight[:, :16]),  # a base that is not a multiple of 16 bytes
        lambda hidden, weight: (hidden.T.contiguous().T, weight),  # columns apart
        lambda hidden, weight: (hidden[:1].expand(20, 24), weight),  # rows on top of each other
        lambda hidden, weight: (hidden.float(), weight.float()),
        lambda hidden, weight: (hidden, weight.float()),
    ],
    ids=["row stride", "base", "column stride", "expanded", "fp32", "mixed"],
)
def test_what_descriptors_cannot_read_goes_through_pointers(device, chosen, change) -> None:
    hidden, weight, targets, _ = problem(device, 20, 24, 70, torch.float16)
    hidden, weight = change(hidden, weight)
    logps, _ = linear_logprob_forward(hidden, weight, targets)
    assert chosen == ["linear_logprob_kernel"]
    assert_close(logps, naive_linear_logprob(hidden.double(), weight.double(), targets), 1e-6)


def test_older_devices_have_no_descriptors() -> None:
    assert DESCRIPTOR_TILES.keys() == {"sm_90", "sm_100", "interpreter"}


# ------------------------------------------------------------------------------------------- rows of logits in memory

# One block and a tail on every device.
BLOCK_V = max(tile.block_v for tile in ROW_TILES.values())
LONG = BLOCK_V + 77


def rows_problem(device, n, V, *, bias=False, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    raw = (2 * torch.randn(n, V, generator=generator)).to(device)
    targets = torch.randint(V, (n,), generator=generator).to(device)
    coef = torch.randn(n, generator=generator).to(device)
    offset = torch.randn(V, generator=generator).to(device) if bias else None
    return raw, targets, coef, {"bias": offset, **settings}


def grad64(raw, targets, coef, bias=None, softcap=None, logit_scale=1.0):
    """(logps, dL/draw) of L = sum coef * logp by autograd in fp64."""
    leaf = raw.double().requires_grad_()
    x = (leaf if bias is None else leaf + bias.double()) * logit_scale
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    logps = x.log_softmax(1).gather(1, targets[:, None])[:, 0]
    (logps * coef.double()).sum().backward()
    return logps.detach(), leaf.grad


def rounding(dtype, device) -> float:
    """Largest relative error of one rounding to ``dtype`` after fp32 arithmetic."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        return 2**-7  # the interpreter truncates to bf16, a GPU rounds
    return 1e-6 + {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]


@pytest.mark.parametrize("V", [1, 7, 4096, LONG, 2 * BLOCK_V + 1])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_stats_match_fp64(device, V, settings) -> None:
    raw, targets, _, options = rows_problem(device, 3, V, **settings)
    before = raw.clone()
    logps, stats = logit_stats(raw, targets, **options)
    x = logits64(raw, torch.eye(V, device=device), **options) if V < 100 else None
    reference, _ = grad64(raw, targets, torch.ones(3, device=device), **options)
    assert_close(logps + 1, reference + 1, 1e-6)  # + 1: a vocabulary of one token has log-probability 0
    if x is not None:
        assert_close(stats.sum(0), x.logsumexp(1), 1e-6)
    assert torch.equal(raw, before), "the statistics must not touch the logits"


@DTYPES
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_grad_matches_autograd_in_fp64(device, dtype, settings) -> None:
    """Two and a half blocks: every element must be read before it is overwritten, in its block and in others."""
    raw, targets, coef, options = rows_problem(device, 3, 2 * BLOCK_V + 2049, **settings)
    _, reference = grad64(raw, targets, coef, **options)
    _, stats = logit_stats(raw, targets, **options)
    grad = logit_grad_(raw, targets, stats, coef, **options, out_dtype=dtype)
    assert grad.dtype == dtype
    assert grad.data_ptr() == raw.data_ptr(), "not in place"
    largest = rounding(dtype, device)
    assert_close(grad, reference, largest)
    at_target = grad.gather(1, targets[:, None])
    assert_close(at_target, reference.gather(1, targets[:, None]), largest)
    rest = reference.scatter(1, targets[:, None], 0.0)  # a thousand times smaller: compared at its own scale
    assert_close(grad.scatter(1, targets[:, None], 0.0), rest, 2 * largest)


@DTYPES
def test_grad_is_coef_times_the_rounded_row(device, dtype) -> None:
    """A coefficient of zero silences a row; each row has its own."""
    raw, targets, coef, _ = rows_problem(device, 3, 129)
    coef[1] = 0.0
    _, stats = logit_stats(raw, targets)
    _, reference = grad64(raw, targets, coef)
    grad = logit_grad_(raw, targets, stats, coef, out_dtype=dtype)
    assert (grad[1] == 0).all()
    for row in (0, 2):
        assert_close(grad[row], reference[row], rounding(dtype, device))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_grad_leaves_the_memory_between_rows_alone(device, dtype) -> None:
    """Rows of 131 in a buffer 150 wide, as a chunk of a larger workspace is."""
    raw, targets, coef, _ = rows_problem(device, 4, 131)
    buffer = torch.full((4, 150), 7.0, device=device)
    buffer[:, :131] = raw
    logits = buffer[:, :131]
    logps, stats = logit_stats(logits, targets)
    expected_logps, reference = grad64(raw, targets, coef)
    assert_close(logps, expected_logps, 1e-6)
    grad = logit_grad_(logits, targets, stats, coef, out_dtype=dtype)
    assert grad.shape == (4, 131)
    assert grad.stride() == (150 * (4 // dtype.itemsize), 1)
    assert_close(grad, reference, rounding(dtype, device))
    assert (buffer[:, 131:] == 7.0).all()


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["uncapped", "capped"])
def test_grad_of_a_masked_vocabulary_is_exactly_zero(device, softcap) -> None:
    raw, targets, coef, _ = rows_problem(device, 4, 200)
    bias = torch.zeros(200, device=device)
    bias[50:150] = float("-inf")
    targets[:] = torch.tensor([0, 199, 20, 180], device=device)
    raw[3, :] = float("-inf")  # a fully masked row: its probabilities are NaN, but its gradient is zero
    expected_logps, reference = grad64(raw[:3], targets[:3], coef[:3], bias=bias, softcap=softcap)
    logps, stats = logit_stats(raw, targets, bias, softcap)
    assert_close(logps[:3], expected_logps, 1e-6)
    grad = logit_grad_(raw, targets, stats, coef, bias, softcap)
    assert (grad[:, 50:150] == 0).all()
    assert (grad[3] == 0).all()
    assert_close(grad[:3], reference.nan_to_num(0.0), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_survive_extreme_logits(device, dtype) -> None:
    raw, targets, coef, _ = rows_problem(device, 5, 300)
    raw[0] = -1e4
    raw[1] = 1e4
    raw[2, 299] = 1e4
    raw[3] = torch.linspace(-1e4, 1e4, 300, device=device)
    raw[4, 0] = -1e4
    targets[:] = torch.tensor([3, 3, 299, 299, 0], device=device)
    expected_logps, reference = grad64(raw, targets, coef)
    logps, stats = logit_stats(raw, targets)
    assert_close(logps, expected_logps, 1e-6)
    # The fp32 log-sum-exp, near 1e4 here, would put an error of 1e-3 on a probability; its two parts do not.
    assert_close(logit_grad_(raw, targets, stats, coef, out_dtype=dtype), reference, 1e-6 + rounding(dtype, device))


@pytest.mark.sanitize
def test_rows_with_a_target_outside_the_vocabulary(device) -> None:
    raw, targets, coef, _ = rows_problem(device, 3, 64)
    targets[1], targets[2] = -1, 2**33
    logps, stats = logit_stats(raw, targets)
    assert logps.isnan().tolist() == [False, True, True]
    softmax = raw.double().softmax(1)
    grad = logit_grad_(raw, targets, stats, coef)
    assert_close(grad[1:], -coef[1:, None].double() * softmax[1:], 1e-6)


def test_rows_refuse_what_they_cannot_take(device) -> None:
    raw, targets, coef, _ = rows_problem(device, 3, 64)
    _, stats = logit_stats(raw, targets)
    with pytest.raises(TypeError, match="float32"):
        logit_stats(raw.bfloat16(), targets)
    with pytest.raises(ValueError, match="adjacent"):
        logit_stats(raw.T.contiguous().T, targets)
    with pytest.raises(ValueError, match="overlap"):
        logit_stats(raw[:1].expand(3, 64), targets)
    with pytest.raises(ValueError, match="coef"):
        logit_grad_(raw, targets, stats, coef[:2])
    with pytest.raises(TypeError, match="out_dtype"):
        logit_grad_(raw, targets, stats, coef, out_dtype=torch.float64)


def test_rows_of_nothing(device) -> None:
    raw, targets, coef, _ = rows_problem(device, 0, 64)
    logps, stats = logit_stats(raw, targets)
    assert logps.shape == (0,)
    assert logit_grad_(raw, targets, stats, coef, out_dtype=torch.bfloat16).shape == (0, 64)


# ----------------------------------------------------------------------------------------------------- loss per prompt

LAYOUTS = {
    "one pair of one token": [[1, 1]],
    "K from 1 to 13 mixed": [[5, 9], [3, *range(1, 14)], [300, 2, 257], [1, 256, 255, 1]],  # 256 tokens are a block
    "thousands of tokens": [[4097, 3000]],
}


def loss_problem(device, lengths, seed=0, min_anchors=1):
    layout = ResponseLayout.from_lengths(lengths, min_anchors=min_anchors)
    generator = torch.Generator().manual_seed(seed)
    token_logps = -3 * torch.rand(layout.num_tokens, generator=generator)
    offsets = torch.tensor(layout.cu_seqlens)
    exact = torch.stack([token_logps[a:b].double().sum() for a, b in pairwise(offsets)])
    ref_logps = (exact + 4 * torch.randn(layout.num_responses, generator=generator)).float()
    on_device = (layout.tensor("cu_seqlens", device), layout.tensor("cu_groups", device))
    return layout, exact, token_logps.to(device), on_device, ref_logps.to(device)


@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("anchor_weight", [0.0, 0.05])
@pytest.mark.parametrize("num_prompts", [None, 9], ids=["own mean", "accumulated mean"])
def test_group_loss_matches_fp64(device, lengths, anchor_weight, num_prompts) -> None:
    layout, exact, token_logps, offsets, ref_logps = loss_problem(device, lengths)
    leaf = exact.clone().requires_grad_()
    settings = {"alpha": 0.2, "beta": 0.3, "anchor_weight": anchor_weight}
    settings["num_prompts"] = num_prompts or layout.num_prompts
    reference = d2o_loss(leaf, ref_logps.cpu().double(), layout, **settings)
    reference.loss.backward()
    logps, chosen, rejected, margins, losses, coef = group_loss(token_logps, *offsets, ref_logps, **settings)
    assert_close(logps, reference.logps, 1e-7)
    assert_close(chosen, reference.chosen_rewards, 1e-6)
    assert_close(rejected, reference.rejected_rewards, 1e-6)
    assert_close(margins, reference.margins, 1e-6)
    assert_close(losses.sum(), reference.loss, 1e-6)
    assert_close(coef, leaf.grad, 1e-6)


MARGINS = {
    "D2O with both ungated terms": Margin(0.2, 0.3, anchor_weight=0.05, negative_weight=0.02, gate=1.5),
    "DPO": Margin.dpo(0.3),
    "NPO": Margin.npo(0.2),
    "gradient ascent": Margin.gradient_ascent(),
}


@pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)
@pytest.mark.parametrize(
    "lengths", [[[4], [300]], [[7], [3, 5, 2], [1, 1]]], ids=["negatives alone", "with and without anchors"]
)
def test_group_loss_of_any_margin_matches_fp64(device, margin, lengths) -> None:
    layout, exact, token_logps, offsets, ref_logps = loss_problem(device, lengths, min_anchors=0)
    leaf = exact.clone().requires_grad_()
    reference = margin_loss(leaf, ref_logps.cpu().double(), layout, margin, num_prompts=5)
    reference.loss.backward()
    arguments = (margin.alpha, margin.beta, margin.anchor_weight, 5, margin.negative_weight, margin.gate)
    _, chosen, rejected, margins, losses, coef = group_loss(token_logps, *offsets, ref_logps, *arguments)
    assert_close(chosen, reference.chosen_rewards, 1e-6)
    assert_close(rejected, reference.rejected_rewards, 1e-6)
    assert_close(margins, reference.margins, 1e-6)
    assert_close(losses.sum(), reference.loss, 1e-6)
    assert_close(coef, leaf.grad, 1e-6)


def test_group_loss_with_a_gate_of_zero_is_exactly_the_ungated_terms(device) -> None:
    """It holds for any alpha and beta; z shows only in the margins."""
    _, _, token_logps, offsets, ref_logps = loss_problem(device, [[4, 5, 6], [300, 1, 2]])
    for alpha, beta in ((0.1, 0.1), (1e6, 1e6), (0.0, 0.0)):
        *_, coef = group_loss(token_logps, *offsets, ref_logps, alpha, beta, 0.5, 2, 0.25, 0.0)
        assert coef.tolist() == [0.125, -0.125, -0.125] * 2


@pytest.mark.parametrize("z", [-1e4, -100.0, -20.0, 0.0, 20.0, 80.0, 1e4])
def test_group_loss_is_stable_for_any_margin(device, z) -> None:
    layout = ResponseLayout.from_lengths([[1, 1]])
    token_logps = torch.tensor([-1.0, -2.0], device=device)
    ref_logps = torch.tensor([-1.0, -2.0 - z], device=device)
    offsets = (layout.tensor("cu_seqlens", device), layout.tensor("cu_groups", device))
    _, _, _, margins, losses, coef = group_loss(token_logps, *offsets, ref_logps, 1.0, 1.0, 0.0, 1)
    z64 = margins.double().cpu()
    assert abs(float(z64) - z) <= 1e-6 * max(1.0, abs(z)) + 1e-6
    # Relative to the true value even if it is small: sigmoid(-80) is 2e-35.
    assert torch.allclose(losses.double().cpu(), torch.nn.functional.softplus(-z64), rtol=1e-5, atol=1e-17)
    gate = torch.sigmoid(-z64)
    assert torch.allclose(coef.double().cpu(), torch.cat([gate, -gate]), rtol=1e-5, atol=1e-44)


def test_group_loss_at_the_references(device) -> None:
    """z is 0, the loss ln 2, the weight a half, and the gradient not zero (paper, Eq. 4)."""
    _, _, token_logps, offsets, ref_logps = loss_problem(device, [[4, 5, 6, 7]])
    logps = group_loss(token_logps, *offsets, ref_logps, 0.1, 0.1, 0.0, 1)[0]
    _, _, _, margins, losses, coef = group_loss(token_logps, *offsets, logps, 0.1, 0.1, 0.0, 1)
    assert_close(losses, torch.tensor([math.log(2)]), 1e-5)
    assert margins.abs().max() < 1e-5
    assert_close(coef, torch.tensor([0.05, *[-0.05 / 3] * 3]), 1e-5)


def test_group_loss_refuses(device) -> None:
    _, _, token_logps, (cu_seqlens, cu_groups), ref_logps = loss_problem(device, [[4, 5], [1, 2]])
    with pytest.raises(TypeError, match="token_logps"):
        group_loss(token_logps.bfloat16(), cu_seqlens, cu_groups, ref_logps, 0.1, 0.1, 0.0, 2)
    with pytest.raises(TypeError, match="cu_seqlens"):
        group_loss(token_logps, cu_seqlens.long(), cu_groups, ref_logps, 0.1, 0.1, 0.0, 2)
    with pytest.raises(ValueError, match="4 responses of 2 prompts cannot have 3"):
        group_loss(token_logps, cu_seqlens, cu_groups, ref_logps[:3], 0.1, 0.1, 0.0, 2)
    with pytest.raises(ValueError, match="1 responses of 2 prompts"):
        group_loss(token_logps, cu_seqlens[:2], cu_groups, ref_logps[:1], 0.1, 0.1, 0.0, 2)
    with pytest.raises(ValueError, match="num_prompts"):
        group_loss(token_logps, cu_seqlens, cu_groups, ref_logps, 0.1, 0.1, 0.0, 0)


# -------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.slow
@pytest.mark.sanitize
def test_the_same_bits_twice(device) -> None:
    hidden, weight, targets, options = problem(device, 37, 45, 531, torch.bfloat16, bias=True, softcap=3.0)
    raw, row_targets, coef, _ = rows_problem(device, 5, LONG)
    _, _, token_logps, offsets, ref_logps = loss_problem(device, LAYOUTS["K from 1 to 13 mixed"])

    def run() -> list[torch.Tensor]:
        logits = raw.clone()
        stats = logit_stats(logits, row_targets)
        grad = logit_grad_(logits, row_targets, stats[1], coef, out_dtype=torch.bfloat16)
        losses = group_loss(token_logps, *offsets, ref_logps, 0.1, 0.1, 0.05, 4)
        return [*linear_logprob_forward(hidden, weight, targets, **options), *stats, grad, *losses]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_launchers_do_not_wait_for_the_device(device) -> None:
    hidden, weight, targets, options = problem(device, 256, 256, 1000, torch.bfloat16)
    raw, row_targets, coef, _ = rows_problem(device, 5, 1000)
    _, _, token_logps, offsets, ref_logps = loss_problem(device, [[4, 5], [1, 2]])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_logprob_forward(hidden, weight, targets, **options)
        _, stats = logit_stats(raw, row_targets)
        logit_grad_(raw, row_targets, stats, coef, out_dtype=torch.bfloat16)
        group_loss(token_logps, *offsets, ref_logps, 0.1, 0.1, 0.0, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")

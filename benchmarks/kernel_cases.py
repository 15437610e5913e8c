"""Each kernel at the shape of a real head: its launch, the least bytes and operations it needs, and its error bound.

Shapes: N response tokens, n tokens of one chunk, V vocabulary, H hidden, M columns that the filter keeps.

Bytes count every input read once and every output written once. Operations count matrix products only. Importing this
module imports the kernels: set TRITON_INTERPRET before if they are to be interpreted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks.shapes import HEADS, equal_lengths, relative_error
from d2o_fast.kernels.filtered_products import filtered_products
from d2o_fast.kernels.group_loss import group_loss
from d2o_fast.kernels.linear_logprob import linear_logprob_forward
from d2o_fast.kernels.logit_grad import logit_grad_, logit_stats
from d2o_fast.loss.layout import ResponseLayout
from d2o_fast.loss.matmul import product_
from d2o_fast.loss.ops import WORKSPACE_BYTES
from d2o_fast.loss.reference import d2o_loss, naive_linear_logprob, sequence_logps

SAMPLE = 64  # rows, or kept columns, of a large result that are compared with fp64
FILTER_EPS = 1e-3
FP32_BOUND = 5e-6  # of the RMS error relative to fp64
ROUNDED_BOUND = 5e-3  # with one rounding to 16 bits (the interpreter truncates to bf16)


class Shape(NamedTuple):
    """``prompts`` prompts of 1 + 11 responses of ``tokens`` tokens; a chunk is one prompt or fills a workspace."""

    head: str
    H: int
    V: int
    softcap: float | None
    prompts: int
    tokens: int

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        return equal_lengths(self.prompts, self.tokens)

    @property
    def N(self) -> int:
        return 12 * self.prompts * self.tokens

    @property
    def n(self) -> int:
        return min(12 * self.tokens, WORKSPACE_BYTES["cuda"] // (4 * self.V))


def shape_of(head: str, tiny: bool = False) -> Shape:
    """The shape of a head. ``tiny``: a small one that shows whether everything runs; its V is odd if the head's is."""
    H, V, softcap = HEADS[head]
    return Shape(head, 40, 192 + V % 16, softcap, 2, 1) if tiny else Shape(head, H, V, softcap, 8, 128)


@dataclass(frozen=True)
class Work:
    """One kernel, or one product by the vendor's library, with its operands."""

    kernel: str
    size: dict[str, int]
    launch: Callable[[], Any]
    error: Callable[[Any], float]  #: RMS error of a launch's result relative to fp64, over its bound; infinite for NaN
    moved: float  #: bytes
    operations: float = 0.0
    launches: int = 1
    prepare: Callable[[], Any] = lambda: None  #: restores what a launch changes, and spoils its outputs; not timed


class Operands:
    """Random tensors of one head. Logits have a standard deviation of 2.

    A weight of a wider dtype holds numbers of the narrower one: rounding them loses nothing.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype | None = None):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.rounded = FP32_BOUND if dtype == torch.float32 else ROUNDED_BOUND  #: for results in ``dtype``
        self.draw = torch.Generator(device).manual_seed(0)
        self.hidden = self.normal(shape.N, shape.H).to(dtype)
        self.weight = (self.normal(shape.V, shape.H) * (2 / math.sqrt(shape.H))).to(dtype).to(weight_dtype or dtype)
        self.targets = torch.randint(shape.V, (shape.N,), generator=self.draw, device=device)

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.draw, device=self.device)

    def sample(self, count: int) -> torch.Tensor:
        """Some indices below ``count``, including the first and the last."""
        return torch.linspace(0, count - 1, min(count, SAMPLE), device=self.device).long()


class Logits:
    """A chunk's raw products (n, V), with a copy to restore them from."""

    def __init__(self, of: Operands) -> None:
        n = of.shape.n
        self.source = of.normal(n, of.shape.V).mul_(2.0)
        self.memory = torch.empty_like(self.source)
        self.targets, self.coef, self.options = of.targets[:n], of.normal(n), (None, of.shape.softcap)

    def exact(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(logps, dL/dproduct) of some rows in fp64."""
        leaf, softcap = self.source[rows].double().requires_grad_(), self.options[1]
        x = leaf if softcap is None else softcap * torch.tanh(leaf / softcap)
        logps = x.log_softmax(1).gather(1, self.targets[rows, None])[:, 0]
        (grad,) = torch.autograd.grad(logps, leaf, self.coef[rows].double())
        return logps.detach(), grad


class Gradient:
    """A chunk's gradient (n, V) in the operand dtype, as ``logit_grad_`` leaves it: in the memory of fp32 rows.

    About ``share`` of its columns exceed the filter's bound.
    """

    def __init__(self, of: Operands, share: float = 1.0) -> None:
        n, V = of.shape.n, of.shape.V
        large = torch.rand(V, generator=of.draw, device=of.device) < share
        large[-1] = True  # at least one column
        self.source = of.normal(n, V).mul_(large).add_(FILTER_EPS / 1000).to(of.dtype)
        memory = torch.zeros(n, V, device=of.device)  # a CPU's product may read past the end of a 16-bit row
        self.memory = memory if of.dtype == torch.float32 else memory.view(of.dtype)[:, :V]
        self.coef = torch.ones(n, device=of.device)
        self.kept = (self.source.float().abs() > FILTER_EPS).any(0).nonzero()[:, 0]


def against(
    bound: float, rows: torch.Tensor, exact: Callable[[], torch.Tensor], part: int | None = None
) -> Callable[[Any], float]:
    """Compares some rows of a result, or of one ``part`` of it, with their fp64 value; no element may be infinite."""

    def error(result: Any) -> float:
        found = result if part is None else result[part]
        return relative_error(found[rows], exact()).rms / bound if bool(found.isfinite().all()) else math.inf

    return error


def linear_logprob_work(of: Operands) -> Work:
    N, H, V, softcap = of.shape.N, of.shape.H, of.shape.V, of.shape.softcap
    rows, hidden, weight = of.sample(N), of.hidden, of.weight
    return Work(
        "linear_logprob",
        {"n": N, "H": H, "V": V},
        lambda: linear_logprob_forward(hidden, weight, of.targets, None, softcap),
        against(
            FP32_BOUND,
            rows,
            lambda: naive_linear_logprob(hidden[rows].double(), weight.double(), of.targets[rows], softcap=softcap),
            part=0,
        ),
        moved=hidden.nbytes + weight.nbytes + 20.0 * N,  # int64 targets, logps and two statistics
        operations=2.0 * N * H * V,
        launches=2,
    )


def logit_stats_work(of: Operands, logits: Logits) -> Work:
    n, V = logits.source.shape
    rows = of.sample(n)
    return Work(
        "logit_stats",
        {"n": n, "V": V},
        lambda: logit_stats(logits.source, logits.targets, *logits.options),
        against(FP32_BOUND, rows, lambda: logits.exact(rows)[0], part=0),
        moved=logits.source.nbytes + 20.0 * n,
    )


def logit_grad_work(of: Operands, logits: Logits) -> Work:
    n, V = logits.source.shape
    rows, stats = of.sample(n), logit_stats(logits.source, logits.targets, *logits.options)[1]
    arguments = (logits.memory, logits.targets, stats, logits.coef, *logits.options)
    return Work(
        "logit_grad",
        {"n": n, "V": V},
        lambda: logit_grad_(*arguments, out_dtype=of.dtype),
        against(of.rounded, rows, lambda: logits.exact(rows)[1]),
        moved=logits.source.nbytes + float(n) * V * of.dtype.itemsize + 20.0 * n,
        prepare=lambda: logits.memory.copy_(logits.source),
    )


def group_loss_work(of: Operands) -> Work:
    layout = ResponseLayout.from_lengths(of.shape.lengths)
    token_logps = -3.0 * torch.rand(of.shape.N, generator=of.draw, device=of.device)
    ref_logps = sequence_logps(token_logps, layout) + 4.0 * of.normal(layout.num_responses)
    offsets = (layout.tensor("cu_seqlens", of.device), layout.tensor("cu_groups", of.device))

    def exact() -> torch.Tensor:
        leaf = sequence_logps(token_logps.double(), layout).requires_grad_()
        loss = d2o_loss(leaf, ref_logps.double(), layout, alpha=0.1, beta=0.1).loss
        return torch.autograd.grad(loss, leaf)[0]

    return Work(
        "group_loss",
        {"n": of.shape.N},
        lambda: group_loss(token_logps, *offsets, ref_logps, 0.1, 0.1, 0.0, layout.num_prompts),
        against(FP32_BOUND, torch.arange(layout.num_responses, device=of.device), exact, part=-1),
        moved=token_logps.nbytes + 16.0 * layout.num_responses + 20.0 * layout.num_prompts,
    )


def filtered_work(of: Operands, gradient: Gradient, label: str, dhidden: bool = True, dweight: bool = True) -> Work:
    """Both products over the kept columns, or one of them; dWeight is added to an fp32 sum."""
    (n, V), H, M, size = gradient.source.shape, of.shape.H, len(gradient.kept), of.dtype.itemsize
    hidden, source, kept, rows = of.hidden[:n], gradient.source, gradient.kept, of.sample(n)
    columns = kept[of.sample(M)]
    into = torch.empty_like(hidden) if dhidden else None
    total = torch.empty(V, H, device=of.device) if dweight else None
    of_hidden = against(of.rounded, rows, lambda: source[rows][:, kept].double() @ of.weight[kept].double())
    of_weight = against(FP32_BOUND, columns, lambda: source[:, columns].double().T @ hidden.double())

    def prepare() -> None:
        gradient.memory.copy_(source)
        if into is not None:
            into.fill_(math.nan)
        if total is not None:
            total.zero_()

    def error(result: torch.Tensor) -> float:
        found = [0.0 if int(result) == M else math.inf]
        found += [of_hidden(into)] if into is not None else []
        found += [of_weight(total)] if total is not None else []
        return max(found)

    moved = float(source.nbytes + gradient.coef.nbytes)
    moved += (M * H + n * H) * size if dhidden else 0
    moved += n * H * size + 8.0 * M * H if dweight else 0
    return Work(
        label,
        {"n": n, "H": H, "V": V, "M": M},
        lambda: filtered_products(gradient.memory, gradient.coef, FILTER_EPS, of.weight, hidden, into, total, False),
        error,
        moved,
        operations=2.0 * n * H * M * (dhidden + dweight),
        launches=7 + dhidden + dweight,  # zeros, flags, the prefix sum's two, the last place, the list, the packing
        prepare=prepare,
    )


def vendor_work(of: Operands, logits: Logits, gradient: Gradient) -> list[Work]:
    """The three products of a step, as ``loss/triton_engine.py`` calls the vendor's library for them."""
    (n, V), H, size = gradient.source.shape, of.shape.H, of.dtype.itemsize
    hidden, weight, grad, source = of.hidden[:n], of.weight, gradient.memory, gradient.source
    out, into, total = logits.memory, torch.empty_like(hidden), torch.empty(V, H, device=of.device)
    rows, columns = of.sample(n), of.sample(V)

    def clean() -> None:
        out.fill_(math.nan)
        grad.copy_(source)
        total.zero_()

    def work(name: str, launch: Callable[[], Any], error: Callable[[Any], float], moved: float) -> Work:
        return Work(f"vendor {name}", {"n": n, "H": H, "V": V}, launch, error, moved, 2.0 * n * H * V, prepare=clean)

    of_logits = against(FP32_BOUND, rows, lambda: hidden[rows].double() @ weight.double().T)
    of_hidden = against(of.rounded, rows, lambda: source[rows].double() @ weight.double())
    of_weight = against(FP32_BOUND, columns, lambda: source[:, columns].double().T @ hidden.double())
    operands = float((n * H + V * H) * size)
    summed = float((n * H + n * V) * size) + 8.0 * V * H
    return [
        work("logits", lambda: product_(out, hidden, weight.T), of_logits, operands + 4.0 * n * V),
        work("dhidden", lambda: product_(into, grad, weight), of_hidden, operands + float(n) * V * size),
        work("dweight", lambda: product_(total, grad.T, hidden, add=True), of_weight, summed),
    ]


def all_work(of: Operands) -> list[Work]:
    """Every kernel at this head, the vendor's products last. They share memory, since one runs at a time."""
    logits, dense, sparse = Logits(of), Gradient(of), Gradient(of, share=0.05)
    return [
        linear_logprob_work(of),
        logit_stats_work(of, logits),
        logit_grad_work(of, logits),
        group_loss_work(of),
        filtered_work(of, sparse, "filtered_products, 5%"),
        filtered_work(of, dense, "filtered_products, all"),
        *vendor_work(of, logits, dense),
    ]

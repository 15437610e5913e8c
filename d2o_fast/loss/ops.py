"""The operations: log-probabilities and the D2O loss from hidden states and the head's weight, without the logits.

Shapes: N response tokens, V vocabulary, H hidden, S responses, G prompts, K anchors of one prompt.

``fused_d2o_loss`` computes its gradient together with the loss, in one pass (``loss/walk.py``): three N x H x V
products with a trainable head, two with a frozen one, one if no gradient is needed. ``linear_logprob`` takes any
upstream gradient and computes the logits a second time for it.

Memory beyond inputs and returned gradients:

- ``workspace_bytes`` of logits;
- an fp32 accumulator of the weight's size, if the weight is trained in a 16-bit dtype and the batch does not fit one
  workspace;
- a second one, if several prompts exceed the workspace, or if one does and the ungated shares of its anchors and its
  negative differ;
- fp32 dHidden of the tokens of such a prompt;
- on a CPU, fp32 copies of 16-bit ``hidden`` and of its gradient;
- on a GPU, a 16-bit copy of an fp32 ``weight`` beside a 16-bit ``hidden``.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from dataclasses import replace
from typing import Any

import torch

from d2o_fast.loss.engine import Engine, Head, Needs
from d2o_fast.loss.layout import ResponseLayout
from d2o_fast.loss.matmul import exact_products, wide_dtype
from d2o_fast.loss.reference import D2OOutput, Margin
from d2o_fast.loss.torch_engine import TorchEngine
from d2o_fast.loss.walk import MarginWalk

#: Default ``workspace_bytes`` by device type. The GPU's holds 12 responses of 128 tokens at V = 128256. The CPU's gives
#: chunks of some hundred tokens; larger chunks make its products no faster.
WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 768 << 20}


@torch._disable_dynamo
def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """log softmax(logits)[target] of each token, (N,) fp32 (fp64 for fp64 ``hidden``), in nats; differentiable.

    ``logits = softcap * tanh(x / softcap)`` with ``x = logit_scale * (hidden @ weight.T + bias)``; ``logits = x``
    without a softcap. Logits are fp32 or fp64 like the result. The forward keeps two numbers per token; the backward
    computes the logits again, in chunks. ``torch.compile`` breaks its graph here.

    Args:
        hidden: (N, H) fp32, bf16, fp16 or fp64, any strides. Products have operands of this dtype.
        weight: (V, H) the head, in ``hidden``'s dtype or an fp32 master. Its gradient has its own dtype.
        targets: (N,) int64 or int32 in [0, V). They are checked on a CPU. On a GPU a check would wait for the device;
            a target outside gives NaN.
        bias: (V,) of the head. -inf removes a token from the vocabulary, unless a softcap makes its logit finite.
        softcap: tanh cap of the logits (Gemma 2), > 0.
        logit_scale: factor on the logits before the cap (Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``).
        backend: "auto" (Triton on a GPU, torch elsewhere), "torch" or "triton".
        workspace_bytes: most bytes of logits in memory at a time; default 256 MiB on a CPU, 768 MiB on a GPU.

    Raises:
        TypeError, ValueError: arguments that do not fit, a weight sharded over ranks, a backend that cannot run here.
    """
    head = Head(weight, bias, softcap, float(logit_scale))
    _check(hidden, head, targets)
    engine = choose_engine(backend, hidden)
    workspace = _workspace(workspace_bytes, hidden.device)
    return _LinearLogprob.apply(hidden, weight, bias, targets, engine, softcap, float(logit_scale), workspace)


@torch._disable_dynamo
def fused_d2o_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    layout: ResponseLayout,
    ref_logps: torch.Tensor,
    *,
    alpha: float = 0.1,
    beta: float = 0.1,
    anchor_weight: float = 0.0,
    num_prompts: int | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    grad_filter_eps: float | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> D2OOutput:
    """D2O (arXiv 2403.03419, Eq. 3) of a packed batch, averaged over prompts, and its gradient in the same pass.

    Per prompt ``L = -log sigmoid(z) - anchor_weight * mean_i D(y_i)`` with ``z = (beta/K) sum_i D(y_i) - alpha *
    D(y_l)`` and ``D(y) = log pi(y) - ref``. ``hidden``, ``weight`` and ``bias`` get a gradient in their own dtype if
    they require one. Under ``torch.no_grad`` the batch is only scored. References are constants. A second derivative
    (``create_graph=True``) raises. ``torch.compile`` breaks its graph here.

    Args:
        hidden, weight, targets, bias, softcap, logit_scale, backend, workspace_bytes: as for ``linear_logprob``.
            Row n of ``hidden`` (N, H) is the state that predicts response token n; responses are back to back.
        layout: the tokens of each response and the responses of each prompt, its negative first.
        ref_logps: (S,) log ref+(y) for a negative, log ref-(y) for an anchor, summed over the response.
        alpha, beta: weights of the negative and of the anchors.
        anchor_weight: weight of the ungated anchor term, which is ours; 0 is the paper's loss.
        num_prompts: the mean's denominator: G, or all prompts of the accumulated batch.
        grad_filter_eps: None computes the gradient exactly. A number, for the Triton kernels only, omits a vocabulary
            column of a chunk's E from the products if every entry is at most ``eps * |c_n|``; ``c_n`` is the
            derivative of the loss by token n's log-probability. Elementwise, dHidden of token n is then off by at most
            ``eps * |c_n| * sum_v |weight_v|`` over the omitted columns v, and an omitted row of dWeight by at most
            ``eps * sum_n |c_n| |hidden_n|``. The loss and dBias stay exact.

    Returns:
        ``D2OOutput``: the loss, which carries the gradient; detached sums and rewards; the name of the path.

    Raises:
        TypeError, ValueError: arguments that do not fit, a weight sharded over ranks, a backend that cannot run here.
    """
    return fused_margin_loss(
        hidden,
        weight,
        targets,
        layout,
        ref_logps,
        Margin(alpha, beta, anchor_weight),
        num_prompts=num_prompts,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        grad_filter_eps=grad_filter_eps,
        backend=backend,
        workspace_bytes=workspace_bytes,
    )


@torch._disable_dynamo
def fused_margin_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    layout: ResponseLayout,
    ref_logps: torch.Tensor,
    margin: Margin,
    *,
    num_prompts: int | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    grad_filter_eps: float | None = None,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> D2OOutput:
    """Any loss of one margin per prompt, in one pass like ``fused_d2o_loss``.

    ``Margin.dpo(beta)`` takes pairs. ``Margin.npo(beta)`` and ``Margin.gradient_ascent()`` take negatives alone, in a
    layout with ``min_anchors=0``.

    Args:
        margin: the loss; see ``Margin`` for its formula.
        hidden, weight, ...: as for ``fused_d2o_loss``.

    Raises:
        TypeError, ValueError: as for ``fused_d2o_loss``; a prompt without anchors if the loss weighs anchors.
    """
    head = Head(weight, bias, softcap, float(logit_scale))
    _check(hidden, head, targets)
    num_prompts = _check_prompts(hidden, layout, ref_logps, margin, num_prompts)
    if grad_filter_eps is not None and not 0 <= grad_filter_eps < 1:
        raise ValueError(f"grad_filter_eps is {grad_filter_eps}; it must lie in [0, 1), or be None for no filter")
    engine = choose_engine(backend, hidden)
    if grad_filter_eps is not None and engine is TorchEngine:
        raise ValueError(
            f"grad_filter_eps is {grad_filter_eps}, and only the Triton kernels can filter: they need a GPU, a dtype "
            "other than float64, and no backend='torch'. Leave grad_filter_eps out; the gradient is then exact"
        )
    loss, logps, chosen, rejected, margins, skipped = _FusedMarginLoss.apply(
        hidden,
        weight,
        bias,
        targets,
        engine,
        head,
        _workspace(workspace_bytes, hidden.device),
        grad_filter_eps,
        layout,
        ref_logps.detach().to(wide_dtype(hidden.dtype)),
        Margin(*map(float, margin)),
        num_prompts,
        torch.is_grad_enabled(),
    )
    return D2OOutput(loss, logps, chosen, rejected, margins, engine.name, None if grad_filter_eps is None else skipped)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, engine: type[Engine], *options: Any
    ) -> torch.Tensor:
        softcap, logit_scale, workspace = options
        with exact_products(hidden.device, hidden.dtype):
            logps, stats = engine(hidden, Head(weight, bias, softcap, logit_scale), targets, workspace).score()
        ctx.save_for_backward(hidden, weight, bias, targets, stats)
        ctx.engine, ctx.options = engine, options
        return logps

    @staticmethod
    def backward(ctx: Any, dlogps: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _refuse_double_backward("linear_logprob")
        hidden, weight, bias, targets, stats = ctx.saved_tensors
        softcap, logit_scale, workspace = ctx.options
        engine = ctx.engine(hidden, Head(weight, bias, softcap, logit_scale), targets, workspace)
        with exact_products(hidden.device, hidden.dtype):
            gradients = engine.gradient(stats, dlogps.contiguous(), Needs(*ctx.needs_input_grad[:3]))
        return *gradients, *[None] * 5


class _FusedMarginLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Any,
        weight: Any,
        bias: Any,
        targets: Any,
        engine_class: type[Engine],
        head: Head,
        workspace: int,
        grad_filter_eps: float | None,
        layout: ResponseLayout,
        ref_logps: torch.Tensor,
        margin: Margin,
        num_prompts: int,
        tracked: bool,
    ) -> tuple[torch.Tensor, ...]:
        head = replace(head, weight=weight, bias=bias)
        engine = engine_class(hidden, head, targets, workspace, grad_filter_eps)
        walk = MarginWalk(engine, layout, ref_logps, margin, num_prompts)
        needs = Needs(*(tracked and needed for needed in ctx.needs_input_grad[:3]))
        with exact_products(hidden.device, hidden.dtype):
            if any(needs):
                dhidden, totals = walk.loss_and_gradient(needs)
                ctx.save_for_backward(dhidden, totals.weight, totals.bias)
                ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
            else:
                walk.loss()
        products = hidden.shape[0] * weight.shape[0] if any(needs) else 0  # no gradient: no products to skip
        skipped = (products - engine.kept).to(walk.losses.dtype) / max(1, products)
        results = (walk.logps, walk.chosen, walk.rejected, walk.margins, skipped)
        ctx.mark_non_differentiable(*results)
        return walk.losses.sum(), *results

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor, *unused: Any) -> tuple[torch.Tensor | None, ...]:
        _refuse_double_backward("the fused loss")
        # Only this node holds the stored gradients. They are scaled in place unless the graph is kept for another
        # backward.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        gradients = [
            None if grad is None else _scaled(grad, dloss, dtype, keep)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, *[None] * 10


def _scaled(grad: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, keep: bool) -> torch.Tensor:
    """``factor * grad`` in ``dtype``; may overwrite ``grad`` unless ``keep``. The host reads no factor on a GPU."""
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return grad.clone() if keep and grad.dtype == dtype else grad.to(dtype)
    if keep:
        return (grad * factor).to(dtype)
    return grad.mul_(factor).to(dtype)


def _refuse_double_backward(name: str) -> None:
    if torch.is_grad_enabled():  # autograd enables it inside a backward with create_graph=True
        raise RuntimeError(f"{name} cannot be differentiated twice: call backward or grad without create_graph=True")


def choose_engine(backend: str, hidden: torch.Tensor) -> type[Engine]:
    """The engine that ``backend`` names. "auto" is Triton for fp32, bf16 and fp16 on a GPU, torch otherwise.

    Raises:
        ValueError: an unknown name, or "triton" on tensors that Triton cannot serve.
        ImportError: Triton cannot be loaded.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}; it must be 'auto', 'torch' or 'triton'")
    on_gpu, is_double = hidden.device.type == "cuda", hidden.dtype == torch.float64
    if backend == "torch" or (backend == "auto" and (not on_gpu or is_double)):
        return TorchEngine
    if is_double:
        raise ValueError("backend='triton' computes in fp32; float64 tensors need backend='torch'")
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' needs a GPU and hidden is on {hidden.device}; use backend='torch', "
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    try:
        from d2o_fast.loss.triton_engine import TritonEngine
    except ImportError as error:
        raise ImportError(
            f"the Triton kernels cannot be loaded ({error}); backend='torch' runs without them"
        ) from error
    return TritonEngine


def _check_prompts(
    hidden: torch.Tensor, layout: ResponseLayout, ref_logps: torch.Tensor, margin: Margin, num_prompts: int | None
) -> int:
    """Checks layout, references and coefficients; returns the mean's denominator."""
    if not isinstance(layout, ResponseLayout):
        raise TypeError(f"layout must be a ResponseLayout, not {type(layout).__name__}")
    if layout.num_tokens != hidden.shape[0]:
        raise ValueError(f"layout describes {layout.num_tokens} tokens, hidden has {hidden.shape[0]}")
    if not isinstance(ref_logps, torch.Tensor):
        raise TypeError(f"ref_logps must be a tensor, not {type(ref_logps).__name__}")
    if ref_logps.shape != (layout.num_responses,) or not ref_logps.is_floating_point():
        raise ValueError(
            f"ref_logps must be floating point ({layout.num_responses},), one number per response; "
            f"found {ref_logps.dtype} {tuple(ref_logps.shape)}"
        )
    if ref_logps.device != hidden.device:
        raise ValueError(f"ref_logps is on {ref_logps.device}, hidden on {hidden.device}")
    num_prompts = layout.num_prompts if num_prompts is None else operator.index(num_prompts)
    if num_prompts < 1:
        raise ValueError(f"num_prompts is {num_prompts}; it divides the sum over prompts and must be at least 1")
    for name, value in margin._asdict().items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}; it must be a finite number")
    if (margin.beta or margin.anchor_weight) and min(layout.num_anchors) == 0:
        g = layout.num_anchors.index(0)
        raise ValueError(f"prompt {g} has no anchors, and the loss weighs them (beta or anchor_weight is not 0)")
    return num_prompts


def _workspace(workspace_bytes: int | None, device: torch.device) -> int:
    return WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cuda"]) if workspace_bytes is None else workspace_bytes


def _check(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> None:
    weight, bias = head.weight, head.bias
    for name, value in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        if value is None:
            raise TypeError(f"{name} must be a tensor, not None")
    _check_plain(hidden=hidden, weight=weight, bias=bias, targets=targets)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"hidden must be (N, H) and weight (V, H); found {tuple(hidden.shape)} and {tuple(weight.shape)}. "
            "Flatten batch and sequence first"
        )
    if weight.dtype != hidden.dtype and not (weight.dtype == torch.float32 and hidden.dtype.itemsize == 2):
        raise TypeError(
            f"weight is {weight.dtype} and hidden {hidden.dtype}: they must agree, "
            "or the weight be float32 beside 16-bit hidden states"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be ({hidden.shape[0]},), one per row of hidden; found {tuple(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, not {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), one per row of weight; found {tuple(bias.shape)}")
    softcap = head.softcap
    if softcap is not None and not (isinstance(softcap, numbers.Real) and 0 < softcap < math.inf):
        raise ValueError(f"softcap is {softcap!r}; it must be positive, or None for no cap")
    if not isinstance(head.logit_scale, numbers.Real) or not math.isfinite(head.logit_scale):
        raise ValueError(f"logit_scale is {head.logit_scale!r}; it must be a finite number")
    _check_targets(targets, weight.shape[0])


def _check_targets(targets: torch.Tensor, V: int) -> None:
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    low, high = targets.min().item(), targets.max().item()
    if low < 0 or high >= V:
        raise ValueError(
            f"targets range from {low} to {high}; they must lie in [0, {V}). "
            "There is no ignored index: leave such tokens out of hidden and targets"
        )


def _check_plain(**tensors: torch.Tensor | None) -> None:
    """Checks that all are plain tensors on one device, floating point except the targets."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in present.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if hasattr(tensor, "placements") or hasattr(tensor, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor ({tuple(tensor.shape)}), split over ranks; pass the whole tensor: "
                f"{name}.full_tensor(), or keep the head out of fully_shard"
            )
        if name != "targets" and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, not {tensor.dtype}")
    devices = {name: str(tensor.device) for name, tensor in present.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"all tensors must be on one device; found {devices}")

"""The providers of the loss: ours in each form, plain torch, and every peer that has this operation.

For one problem a provider makes a function ``loss(hidden, weight) -> ()`` that carries the gradients and, if it can, a
function ``logps(hidden, weight) -> (N,)``. Providers of log-probabilities per token get the same D2O loss on top. A
peer that is not installed, or cannot run a case, raises ``Missing`` with the reason; the table then lists it by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.shapes import Problem
from d2o_fast.loss.ops import choose_engine, fused_d2o_loss, linear_logprob
from d2o_fast.loss.reference import D2OOutput, naive_linear_logprob

ALPHA = BETA = 0.1
FILTER_EPS = 2.0**-12  # the threshold of cce's own filter
TokenLogps = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # hidden (N, H), weight (V, H) -> (N,)
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # hidden (N, H), weight (V, H) -> ()


class Missing(Exception):
    """This provider cannot take part in this case; the message says why."""


class Functions(NamedTuple):
    loss: Loss | None
    logps: TokenLogps | None
    path: str = ""  # the implementation that ran, if the provider names it


@dataclass(frozen=True)
class Provider:
    """``objective``: "d2o", or "sum" if it has only a plain sum of log-probabilities. A sum is timed, not ranked."""

    name: str
    make: Callable[[Problem], Functions]
    objective: str = "d2o"


def group_loss(token_logps: torch.Tensor, problem: Problem) -> torch.Tensor:
    """``loss/reference.py``'s ``d2o_loss`` of token log-probabilities (N,), for all prompts at once as a GPU needs it.

    Sums in fp64, the loss in fp32.
    """
    layout, device = problem.layout, token_logps.device
    cu_seqlens = layout.tensor("cu_seqlens", device).long()
    cu_groups = layout.tensor("cu_groups", device).long()
    logps = torch.segment_reduce(token_logps.double(), "sum", offsets=cu_seqlens, unsafe=True)
    log_ratio = logps - problem.ref_logps
    negatives = log_ratio[cu_groups[:-1]]
    anchors = torch.segment_reduce(log_ratio, "sum", offsets=cu_groups, unsafe=True) - negatives
    z = BETA * anchors / layout.tensor("num_anchors", device) - ALPHA * negatives
    return F.softplus(-z).mean().float()


def per_token(problem: Problem, logps: TokenLogps, path: str = "") -> Functions:
    return Functions(lambda hidden, weight: group_loss(logps(hidden, weight), problem), logps, path)


def need(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error


def need_cuda(problem: Problem) -> None:
    if not problem.hidden.is_cuda:
        raise Missing("its kernels need a CUDA device")


def refuse_softcap(problem: Problem) -> None:
    if problem.softcap is not None:
        raise Missing("has no softcap")


def ours(problem: Problem, workspace_bytes: int | None = None, grad_filter_eps: float | None = None) -> Functions:
    path = choose_engine("auto", problem.hidden).name
    if grad_filter_eps is not None and path != "triton":
        raise Missing("the filter needs the Triton kernels")
    options: dict[str, Any] = {"softcap": problem.softcap}
    if workspace_bytes is not None:
        options["workspace_bytes"] = workspace_bytes

    def result(hidden: torch.Tensor, weight: torch.Tensor) -> D2OOutput:
        arguments = (hidden, weight, problem.targets, problem.layout, problem.ref_logps)
        return fused_d2o_loss(*arguments, alpha=ALPHA, beta=BETA, grad_filter_eps=grad_filter_eps, **options)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return result(hidden, weight).loss

    if grad_filter_eps is not None:
        skipped = result(problem.hidden.detach().requires_grad_(), problem.weight.detach()).skipped
        assert skipped is not None
        return Functions(loss, None, f"{path}, {float(skipped):.0%} of the gradient's products left out")

    return Functions(loss, lambda hidden, weight: linear_logprob(hidden, weight, problem.targets, **options), path)


def ours_staged(problem: Problem) -> Functions:
    """Ours with room for a third of the longest prompt's logits, so that every long prompt is split into chunks."""
    ranges = [problem.layout.token_range(g) for g in range(problem.layout.num_prompts)]
    longest = max(end - start for start, end in ranges)
    return ours(problem, workspace_bytes=max(1, longest // 3) * problem.weight.shape[0] * 4)


def ours_two_pass(problem: Problem) -> Functions:
    return per_token(problem, lambda h, w: linear_logprob(h, w, problem.targets, softcap=problem.softcap))


def naive(problem: Problem, compiled: bool = False) -> Functions:
    function = naive_linear_logprob
    if compiled:
        torch._dynamo.reset()  # torch runs a function eagerly after a few recompilations
        function = torch.compile(naive_linear_logprob, dynamic=False)
    return per_token(problem, lambda h, w: function(h, w, problem.targets, softcap=problem.softcap))


def torch_linear_cross_entropy(problem: Problem, reduction: str = "none") -> Functions:
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Missing(f"torch {torch.__version__} has no F.linear_cross_entropy(options=...)")
    refuse_softcap(problem)
    options = torch.nn.LinearCrossEntropyOptions()

    def negative_logps(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear_cross_entropy(h, w, problem.targets, reduction=reduction, options=options)

    if reduction == "sum":
        return Functions(negative_logps, None)
    return per_token(problem, lambda h, w: -negative_logps(h, w))


def liger_flce(problem: Problem, reduction: str = "none") -> Functions:
    module = need("liger_kernel.ops.fused_linear_cross_entropy")
    need_cuda(problem)
    apply = module.LigerFusedLinearCrossEntropyFunction.apply

    def negative_logps(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        # No bias, no class weights, ignore_index, no z-loss, no smoothing; dWeight gathered in fp32.
        return apply(
            h, w, problem.targets, None, None, -100, 0.0, 0.0, reduction, problem.softcap, False, torch.float32
        )[0]

    if reduction == "sum":
        return Functions(negative_logps, None)
    return per_token(problem, lambda h, w: -negative_logps(h, w))


def liger_scaled_ce(problem: Problem) -> Functions:
    module = need("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    refuse_softcap(problem)
    try:
        implementation = module._resolve_implementation(problem.hidden.device).__name__
    except ImportError as error:
        raise Missing(f"its implementation for this device is not installed: {error}") from error
    function = module.LigerFusedLinearScaledCrossEntropyFunction
    return per_token(problem, lambda h, w: -function.apply(h, w, problem.targets), implementation)


def liger_chunked(problem: Problem) -> Functions:
    """D2O written into Liger's chunked unpaired preference loss, one prompt's 1 + K responses per chunk.

    The base has no cached references: the chunks come in order and read them from outside.
    """
    base = need("liger_kernel.chunked_loss.fused_linear_unpaired_preference").LigerFusedLinearUnpairedPreferenceBase
    refuse_softcap(problem)
    layout, G, S = problem.layout, problem.layout.num_prompts, problem.layout.num_responses
    tokens, rest = divmod(layout.num_tokens, S)
    if rest or len(set(layout.num_anchors)) > 1 or layout.cu_seqlens != tuple(range(0, layout.num_tokens + 1, tokens)):
        raise Missing("takes responses of one length and prompts with one K only")
    references = problem.ref_logps.view(G, -1)

    class Function(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def preference_loss_fn(log_probs: Any, labels: Any, full_target: Any, prompts: Any) -> Any:
            log_ratio = log_probs - next(prompts)
            return F.softplus(ALPHA * log_ratio[0] - BETA * log_ratio[1:].mean()) / G

        @classmethod
        def forward(cls, ctx: Any, hidden: Any, weight: Any, target: Any, labels: Any) -> Any:  # type: ignore[override]
            settings = {"chunk_size": S // G, "compiled": False, "prompts": iter(references)}
            return base.forward(cls, ctx, hidden, weight, target, labels, **settings)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return *base.backward(ctx, grads)[:2], None, None

    labels = layout.tensor("is_negative", problem.hidden.device).logical_not()

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return Function.apply(h.view(S, tokens, -1), w, problem.targets.view(S, tokens), labels)[0]

    return Functions(loss, None)


def liger_dpo(problem: Problem) -> Functions:
    """Liger's chunked DPO, which is D2O at K = 1 and alpha = beta; it also reads cached references from outside."""
    base = need("liger_kernel.chunked_loss.dpo_loss").LigerFusedLinearDPOFunction
    refuse_softcap(problem)
    layout, G, S = problem.layout, problem.layout.num_prompts, problem.layout.num_responses
    tokens = layout.num_tokens // S
    if set(layout.num_anchors) != {1} or layout.cu_seqlens != tuple(range(0, layout.num_tokens + 1, tokens)):
        raise Missing("pairs of one chosen and one rejected response only: D2O with K > 1 cannot be written in it")
    references = problem.ref_logps.view(G, 2)

    class Function(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def preference_loss_fn(chosen: Any, rejected: Any, full_target: Any, prompts: Any, beta: float) -> Any:
            refs = next(prompts)
            return base.preference_loss_fn(chosen, rejected, full_target, refs[1], refs[0], beta=beta)

        @classmethod
        def forward(cls, ctx: Any, hidden: Any, weight: Any, target: Any) -> Any:  # type: ignore[override]
            settings = {"compiled": False, "average_log_prob": False, "compute_nll_loss": False, "beta": BETA}
            return base.__base__.forward(cls, ctx, hidden, weight, target, prompts=iter(references), **settings)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return *base.__base__.backward(ctx, grads)[:2], None

    chosen_first = [1, 0]

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        pairs = h.view(G, 2, tokens, -1)[:, chosen_first].transpose(0, 1).reshape(S, tokens, -1)
        targets = problem.targets.view(G, 2, tokens)[:, chosen_first].transpose(0, 1).reshape(S, tokens)
        return Function.apply(pairs, w, targets)[0]

    return Functions(loss, None)


def trl_chunked(problem: Problem) -> Functions:
    function = need("trl.kernels.chunked_logprob").ChunkedLogProbFunction  # trl >= 1.16
    need("trl.trainer.utils")  # its backward imports this

    def logps(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return function.apply(h, w, None, problem.targets, 1.0, 32768, problem.softcap, 1.0, ())[0]

    return per_token(problem, logps)


def cce(problem: Problem, **filtering: Any) -> Functions:
    function = need("cut_cross_entropy").linear_cross_entropy
    need_cuda(problem)
    options = {"softcap": problem.softcap, "reduction": "none", **filtering}
    return per_token(problem, lambda h, w: -function(h, w, problem.targets, **options))


def quack(problem: Problem, reduction: str = "none") -> Functions:
    module = need("quack.linear_cross_entropy")
    need_cuda(problem)
    refuse_softcap(problem)
    if reduction == "sum":
        return Functions(lambda h, w: module.chunked_linear_cross_entropy(h, w, problem.targets, reduction="sum"), None)
    return per_token(
        problem, lambda h, w: -module.linear_cross_entropy_func(h, w, None, problem.targets, reduction="none")
    )


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("ours", ours),
        Provider("ours-staged", ours_staged),
        Provider("ours-filtered", partial(ours, grad_filter_eps=FILTER_EPS)),
        Provider("ours-two-pass", ours_two_pass),
        Provider("naive", naive),
        Provider("naive-compiled", partial(naive, compiled=True)),
        Provider("torch-lce", torch_linear_cross_entropy),
        Provider("liger-flce", liger_flce),
        Provider("liger-scaled-ce", liger_scaled_ce),
        Provider("liger-chunked", liger_chunked),
        Provider("liger-dpo", liger_dpo),
        Provider("trl-chunked", trl_chunked),
        Provider("cce", cce),
        Provider("cce-exact", partial(cce, filter_eps=None)),
        Provider("quack", quack),
        Provider("torch-lce-sum", partial(torch_linear_cross_entropy, reduction="sum"), "sum"),
        Provider("liger-flce-sum", partial(liger_flce, reduction="sum"), "sum"),
        Provider("quack-sum", partial(quack, reduction="sum"), "sum"),
    )
}

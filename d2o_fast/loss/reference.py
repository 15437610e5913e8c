"""The specification: D2O in plain torch, without optimisations. The fast paths are tested against this file.

Shapes: N response tokens, V vocabulary, H hidden, S responses, G prompts, K anchors of one prompt.

D2O (Duan et al., EMNLP 2024 Findings, arXiv 2403.03419 v2, Eq. 3):

    z = (beta/K) * sum_i [log pi(y_i) - log ref-(y_i)] - alpha * [log pi(y_l) - log ref+(y_l)]
    L = -log sigmoid(z), averaged over prompts

``log pi(y)`` is the sum of the response's token log-probabilities, never their mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from d2o_fast.loss.layout import ResponseLayout


class D2OOutput(NamedTuple):
    """``loss`` () carries the gradient; the others are detached, fp32 (fp64 for fp64 input), in nats."""

    loss: torch.Tensor  #: ()
    logps: torch.Tensor  #: (S,) log pi(y_s), summed over the response
    chosen_rewards: torch.Tensor  #: (G,) beta * mean over the anchors of [log pi - log ref-]
    rejected_rewards: torch.Tensor  #: (G,) alpha * [log pi - log ref+] of the negative
    margins: torch.Tensor  #: (G,) z = chosen_rewards - rejected_rewards
    path: str = "reference"  #: the path that computed it: "torch", "triton", or this file
    skipped: torch.Tensor | None = None  #: () share of the gradient's products that ``grad_filter_eps`` left out


class Margin(NamedTuple):
    """A loss of one margin z per prompt. Its token coefficients are known but for sigmoid(-z).

    With D(y) = log pi(y) - ref(y), and A the mean of D over a prompt's K anchors (0 if it has none)::

        z = beta * A - alpha * D(negative)
        L = -gate * log sigmoid(z) - anchor_weight * A + negative_weight * D(negative),   averaged over prompts
    """

    alpha: float
    beta: float
    anchor_weight: float = 0.0
    negative_weight: float = 0.0
    gate: float = 1.0

    @classmethod
    def dpo(cls, beta: float) -> Margin:
        """DPO (arXiv 2305.18290, Eq. 7) of pairs: the rejected response is the negative, the chosen one the anchor."""
        return cls(alpha=beta, beta=beta)

    @classmethod
    def npo(cls, beta: float) -> Margin:
        """NPO (arXiv 2404.05868, Eq. 3), on negatives alone."""
        return cls(alpha=beta, beta=0.0, gate=2.0 / beta)

    @classmethod
    def gradient_ascent(cls) -> Margin:
        """Gradient ascent: the loss is the negatives' log-ratio, which descent lowers without a bound."""
        return cls(alpha=0.0, beta=0.0, negative_weight=1.0, gate=0.0)


def naive_linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """log softmax(logits)[target] for each token, (N,), from full logits; arguments as for ``linear_logprob``.

    The product has the dtype of ``hidden``, the softmax fp32 (fp64 for fp64). Bias, scale and cap are applied in the
    order of transformers' heads: Cohere multiplies the head's output by ``logit_scale``, Granite divides it by
    ``logits_scaling``, Gemma 2 caps it.
    """
    logits = (hidden @ weight.to(hidden.dtype).T).to(torch.promote_types(hidden.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


def sequence_logps(token_logps: torch.Tensor, layout: ResponseLayout) -> torch.Tensor:
    """Sum of each response's token log-probabilities: (N,) -> (S,)."""
    return torch.stack([part.sum() for part in token_logps.split(_lengths(layout))])


def d2o_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    layout: ResponseLayout,
    *,
    alpha: float = 0.1,
    beta: float = 0.1,
    anchor_weight: float = 0.0,
    num_prompts: int | None = None,
) -> D2OOutput:
    """D2O from sequence log-probabilities ``logps`` (S,); pure, differentiable in ``logps``.

    Other arguments are as for ``fused_d2o_loss``.
    """
    return margin_loss(logps, ref_logps, layout, Margin(alpha, beta, anchor_weight), num_prompts=num_prompts)


def margin_loss(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    layout: ResponseLayout,
    margin: Margin,
    *,
    num_prompts: int | None = None,
) -> D2OOutput:
    """Any ``Margin`` from sequence log-probabilities; arguments as for ``d2o_loss``."""
    losses, chosen, rejected = [], [], []
    for first, end in zip(layout.cu_groups, layout.cu_groups[1:], strict=False):
        log_ratio = logps[first:end] - ref_logps[first:end]
        anchors = log_ratio[1:].sum() / max(1, end - first - 1)
        chosen.append(margin.beta * anchors)
        rejected.append(margin.alpha * log_ratio[0])
        gated = -margin.gate * F.logsigmoid(chosen[-1] - rejected[-1]) if margin.gate else 0.0
        losses.append(gated - margin.anchor_weight * anchors + margin.negative_weight * log_ratio[0])
    chosen_rewards, rejected_rewards = torch.stack(chosen), torch.stack(rejected)
    return D2OOutput(
        loss=torch.stack(losses).sum() / (num_prompts or layout.num_prompts),
        logps=logps.detach(),
        chosen_rewards=chosen_rewards.detach(),
        rejected_rewards=rejected_rewards.detach(),
        margins=(chosen_rewards - rejected_rewards).detach(),
    )


def naive_d2o_loss(
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
) -> D2OOutput:
    """Computes the result of ``fused_d2o_loss`` from full logits."""
    token_logps = naive_linear_logprob(hidden, weight, targets, bias=bias, softcap=softcap, logit_scale=logit_scale)
    return d2o_loss(
        sequence_logps(token_logps, layout),
        ref_logps,
        layout,
        alpha=alpha,
        beta=beta,
        anchor_weight=anchor_weight,
        num_prompts=num_prompts,
    )


def _lengths(layout: ResponseLayout) -> list[int]:
    return [b - a for a, b in zip(layout.cu_seqlens, layout.cu_seqlens[1:], strict=False)]

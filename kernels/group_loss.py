"""The loss of every prompt and its derivative by each response's log-probability, from token log-probabilities.

Shapes: n packed response tokens, S responses, G prompts, K anchors of one prompt; a prompt's negative comes first.

    logp_s  = sum of the response's token log-probabilities,   D_s = logp_s - ref_s,   A = mean of D over the K anchors
    chosen  = beta * A,   rejected = alpha * D_negative,   z = chosen - rejected           (K = 0: A = 0)
    loss    = (gate * softplus(-z) + negative_weight * D_negative - anchor_weight * A) / num_prompts

    dloss/dlogp_negative =  (alpha * gate * sigmoid(-z) + negative_weight) / num_prompts
    dloss/dlogp_anchor   = -(beta * gate * sigmoid(-z) + anchor_weight) / (K * num_prompts)

``Margin`` in ``d2o_fast/loss/reference.py`` names the losses of this form.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import check_device

BLOCK_TOKENS = 256


@triton.jit
def group_loss_kernel(
    token_logps_ptr,
    cu_seqlens_ptr,
    cu_groups_ptr,
    ref_logps_ptr,
    logps_ptr,
    chosen_ptr,
    rejected_ptr,
    margins_ptr,
    losses_ptr,
    coef_ptr,
    alpha,
    beta,
    anchor_weight,
    num_prompts,
    negative_weight,
    gate,
    BLOCK_TOKENS: tl.constexpr,
):
    """One program computes one prompt. Sums and loss are in fp64: they are few, and z is a difference of large sums."""
    g = tl.program_id(0)
    first = tl.load(cu_groups_ptr + g)
    end = tl.load(cu_groups_ptr + g + 1)
    num_anchors = (end - first - 1).to(tl.float64)
    negative = tl.zeros((), tl.float64)
    total = tl.zeros((), tl.float64)
    for s in range(first, end):
        start = tl.load(cu_seqlens_ptr + s)
        stop = tl.load(cu_seqlens_ptr + s + 1)
        sums = tl.zeros((BLOCK_TOKENS,), tl.float64)
        for offset in range(start, stop, BLOCK_TOKENS):
            offs_n = offset + tl.arange(0, BLOCK_TOKENS)
            sums += tl.load(token_logps_ptr + offs_n, mask=offs_n < stop, other=0.0).to(tl.float64)
        logp = tl.sum(sums, axis=0)
        tl.store(logps_ptr + s, logp.to(tl.float32))
        log_ratio = logp - tl.load(ref_logps_ptr + s).to(tl.float64)
        negative = tl.where(s == first, log_ratio, negative)
        total += tl.where(s == first, 0.0, log_ratio)
    anchors = total / tl.maximum(num_anchors, 1.0)  # 0 for a prompt without anchors
    chosen = anchors * beta
    rejected = negative * alpha
    z = chosen - rejected
    tl.store(chosen_ptr + g, chosen.to(tl.float32))
    tl.store(rejected_ptr + g, rejected.to(tl.float32))
    tl.store(margins_ptr + g, z.to(tl.float32))

    # The exponent is never positive, so neither softplus nor sigmoid overflows for any z.
    small = tl.exp(-tl.abs(z))
    softplus = tl.maximum(-z, 0.0) + tl.log(1.0 + small)
    sigmoid = tl.where(z > 0, small, 1.0) / (1.0 + small)  # sigmoid(-z)
    # A gate of zero removes its term, also for an infinite z.
    gated_loss = tl.where(gate == 0.0, 0.0, softplus * gate)
    gated_slope = tl.where(gate == 0.0, 0.0, sigmoid * gate)
    loss = gated_loss + negative * negative_weight - anchors * anchor_weight
    tl.store(losses_ptr + g, (loss / num_prompts).to(tl.float32))
    anchor_coef = -(gated_slope * beta + anchor_weight) / (tl.maximum(num_anchors, 1.0) * num_prompts)
    negative_coef = (gated_slope * alpha + negative_weight) / num_prompts
    for s in range(first, end):
        tl.store(coef_ptr + s, tl.where(s == first, negative_coef, anchor_coef).to(tl.float32))


def group_loss(
    token_logps: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_groups: torch.Tensor,
    ref_logps: torch.Tensor,
    alpha: float,
    beta: float,
    anchor_weight: float,
    num_prompts: int,
    negative_weight: float = 0.0,
    gate: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logps (S,), chosen (G,), rejected (G,), margins (G,), losses (G,), response_coef (S,)), all fp32, in nats.

    ``losses`` are divided by ``num_prompts``; their sum is the loss. ``response_coef`` is its derivative by each
    response's log-probability, hence by each token log-probability of the response. The host does not wait for the
    device.

    Args:
        token_logps: (n,) fp32, responses back to back.
        cu_seqlens: (S+1,) int32 on the device: the offsets of the responses in ``token_logps``.
        cu_groups: (G+1,) int32 on the device: the offsets of the prompts in the responses, the negative first.
            ``ResponseLayout`` checks both offsets; the host does not read them here.
        ref_logps: (S,) fp32 reference log-probability of each response.
        gate: zero removes its term exactly.

    Raises:
        TypeError, ValueError: other dtypes or shapes, tensors on several devices, num_prompts below 1.
    """
    for name, tensor, dtype in (
        ("token_logps", token_logps, torch.float32),
        ("cu_seqlens", cu_seqlens, torch.int32),
        ("cu_groups", cu_groups, torch.int32),
        ("ref_logps", ref_logps, torch.float32),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have one dimension, not shape {tuple(tensor.shape)}")
    S, G = cu_seqlens.shape[0] - 1, cu_groups.shape[0] - 1
    if G < 1 or ref_logps.shape[0] != S or G > S:
        raise ValueError(f"{S} responses of {G} prompts cannot have {ref_logps.shape[0]} reference log-probabilities")
    if num_prompts < 1:
        raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
    check_device(token_logps, cu_seqlens, cu_groups, ref_logps)
    logps = torch.empty(S, dtype=torch.float32, device=token_logps.device)
    response_coef = torch.empty_like(logps)
    chosen, rejected, margins, losses = torch.empty(4, G, dtype=torch.float32, device=token_logps.device).unbind(0)
    group_loss_kernel[(G,)](
        token_logps.contiguous(),
        cu_seqlens.contiguous(),
        cu_groups.contiguous(),
        ref_logps.contiguous(),
        logps,
        chosen,
        rejected,
        margins,
        losses,
        response_coef,
        float(alpha),
        float(beta),
        float(anchor_weight),
        num_prompts,
        float(negative_weight),
        float(gate),
        BLOCK_TOKENS=BLOCK_TOKENS,
        num_warps=4,
    )
    return logps, chosen, rejected, margins, losses, response_coef

"""Torch twins of ``kernels/``: the same functions, signatures and results, on any device.

Shapes: n tokens of a chunk, V vocabulary, S responses, G prompts. *Wide*: fp32, or fp64 for fp64 input.

    x = logit_scale * (product + bias),   logit = softcap * tanh(x / softcap)       (logit = x without a softcap)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

CACHE_BYTES = 3 << 19  # of logits that pass through a CPU's second-level caches at a time


def logit_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each row's target and the row's log-sum-exp, both (n,), from raw products (n, V), wide.

    A target outside [0, V) gives NaN.
    """
    n, V = logits.shape
    logps, lse = logits.new_empty(n), logits.new_empty(n)
    known = (targets >= 0) & (targets < V)
    columns = targets.where(known, 0).long()[:, None]
    for rows, block, scratch in _row_blocks(logits):
        x = _to_logits(block, bias, softcap, logit_scale)
        peak = x.amax(1, keepdim=True)
        target = x.gather(1, columns[rows]) - peak
        log_sum = torch.sub(x, peak, out=scratch).exp_().sum(1, keepdim=True).log_()
        logps[rows] = (target - log_sum).squeeze(1)
        lse[rows] = (peak + log_sum).squeeze(1)
    return logps.masked_fill_(~known, float("nan")), lse


def logit_grad_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    coef: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """dL/dproduct (n, V) of ``out_dtype``, written over ``logits``, which must not be used again.

    ``coef * (onehot(target) - softmax) * d(logit)/d(product)``, exactly zero where a logit is -inf before the softcap.
    A 2-byte result has rows that are twice as many elements apart as the products.
    """
    V = logits.shape[1]
    same = out_dtype == logits.dtype
    out = logits if same else logits.view(out_dtype)[:, :V]
    known = ((targets >= 0) & (targets < V))[:, None]
    columns = targets.where(known[:, 0], 0).long()[:, None]
    onehot = coef[:, None].where(known, 0)
    plain = bias is None and softcap is None and logit_scale == 1.0
    for rows, block, scratch in _row_blocks(logits):
        if plain:
            grad = torch.sub(block, lse[rows, None], out=block if same else scratch).exp_()
        else:
            x = _to_logits(block, bias, softcap, logit_scale)
            grad = (x - lse[rows, None]).exp_()
        grad.mul_(-coef[rows, None])
        grad.scatter_(1, columns[rows], grad.gather(1, columns[rows]) + onehot[rows])
        if not plain:
            if softcap is not None:
                grad.addcmul_(grad, (x / softcap).square_(), value=-1.0)
            grad.mul_(logit_scale)
            if bias is not None:  # a masked token: not even a row whose softmax is NaN gives it a gradient
                grad.masked_fill_(bias == -float("inf"), 0.0)
        if grad.data_ptr() != block.data_ptr() or not same:
            out[rows] = grad.to(out_dtype)
    return out


def group_loss(
    token_logps: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_groups: torch.Tensor,
    ref_logps: torch.Tensor,
    alpha: float,
    beta: float,
    anchor_weight: float,
    num_prompts: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logps (S,), chosen (G,), rejected (G,), margins (G,), losses (G,), response_coef (S,)) of packed prompts.

    ``losses`` are divided by ``num_prompts`` already; ``response_coef`` is the derivative of their sum by each
    response's log-probability. The few numbers here are taken in fp64: z is a difference of large sums.

    Args:
        token_logps: (n,) wide.
        cu_seqlens: (S+1,) int32 and ``cu_groups`` (G+1,) int32, on the device.
        ref_logps: (S,).
    """
    first, S = cu_groups[:-1].long(), cu_seqlens.shape[0] - 1
    K = cu_groups.diff() - 1
    logps = _segment_sums(token_logps.double(), cu_seqlens)
    log_ratio = logps - ref_logps.double()
    negatives = log_ratio.index_select(0, first)
    is_anchor = torch.ones_like(log_ratio, dtype=torch.bool).index_fill_(0, first, False)
    anchors = _segment_sums(log_ratio.where(is_anchor, 0.0), cu_groups) / K
    chosen, rejected = beta * anchors, alpha * negatives
    margins = chosen - rejected
    losses = (F.softplus(-margins) - anchor_weight * anchors) / num_prompts
    gate = torch.sigmoid(-margins)
    anchor_coef = -(beta * gate + anchor_weight) / (K * num_prompts)
    response_coef = anchor_coef.repeat_interleave(K + 1, output_size=S)
    response_coef.index_copy_(0, first, alpha * gate / num_prompts)
    results = (logps, chosen, rejected, margins, losses, response_coef)
    return tuple(value.to(token_logps.dtype) for value in results)  # type: ignore[return-value]


def _segment_sums(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    # unsafe: the check of the offsets would wait for the device, and a ResponseLayout has made it.
    return torch.segment_reduce(values, "sum", offsets=offsets.long(), unsafe=True)


def _row_blocks(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(rows, their logits, scratch of the same shape): blocks that stay in cache between the passes over them."""
    n, V = logits.shape
    step = max(1, CACHE_BYTES // (V * logits.element_size())) if logits.device.type == "cpu" else 64
    scratch = logits.new_empty(min(step, n), V)
    for start in range(0, n, step):
        block = logits[start : start + step]
        yield slice(start, start + step), block, scratch[: block.shape[0]]


def _to_logits(
    products: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, logit_scale: float
) -> torch.Tensor:
    x = products
    if bias is not None:
        x = x + bias.to(x.dtype)
    if logit_scale != 1.0:
        x = x * logit_scale
    if softcap is not None:
        x = (x / softcap).tanh_().mul_(softcap)
    return x

"""Four methods related to D2O in a few lines of plain torch each, for comparisons on the same model and data.

    GA    gradient ascent on the negatives                                  log pi(y-)
    NPO   negative preference optimization (arXiv 2404.05868)               -(2/beta) log sigmoid(-beta D-)
    DPO   direct preference optimization (arXiv 2305.18290)                 -log sigmoid(beta (D+ - D-))
    SFT   supervised fine-tuning on the positives                           -log pi(y+) / number of tokens

``D = log pi(y|x) - log ref(y|x)``, summed over the response's tokens; + is the preferred response, - the negative. The
reference is the model before training. GA and NPO use only the negatives, SFT only the positives, DPO both.

Shapes: B examples of a batch, T tokens of the longest prompt + response, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

METHODS = ("ga", "npo", "dpo", "sft")
#: (token ids of prompt and response, number of prompt tokens)
Sequence = tuple[list[int], int]


@dataclass(frozen=True)
class Pair:
    """One example. DPO and SFT need ``chosen``; GA, NPO and DPO need ``rejected``."""

    chosen: Sequence | None
    rejected: Sequence | None


def ga_loss(rejected: torch.Tensor) -> torch.Tensor:
    """``rejected`` (B,): log pi(y-), summed over tokens."""
    return rejected.mean()


def npo_loss(rejected: torch.Tensor, ref_rejected: torch.Tensor, beta: float) -> torch.Tensor:
    return -(2 / beta) * F.logsigmoid(-beta * (rejected - ref_rejected)).mean()


def dpo_loss(
    chosen: torch.Tensor, ref_chosen: torch.Tensor, rejected: torch.Tensor, ref_rejected: torch.Tensor, beta: float
) -> torch.Tensor:
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()


def sft_loss(chosen: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Cross-entropy per response token; ``chosen`` (B,) holds ``num_tokens`` tokens in all."""
    return -chosen.sum() / num_tokens


def sequence_logps(model: torch.nn.Module, sequences: list[Sequence]) -> torch.Tensor:
    """log pi(response | prompt) of each sequence, summed over the response's tokens: (B,)."""
    device = next(model.parameters()).device
    longest = max(len(ids) for ids, _ in sequences)
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in sequences], device=device)  # (B, T)
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()  # (B, T-1, V)
    token_logps = logits.log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    is_response = torch.zeros_like(token_logps)
    for row, (ids, prompt) in enumerate(sequences):
        is_response[row, prompt - 1 : len(ids) - 1] = 1  # padding follows, and a causal model does not see it
    return (token_logps * is_response).sum(1)


def train(
    method: str,
    model: torch.nn.Module,
    pairs: list[Pair],
    *,
    learning_rate: float,
    num_steps: int,
    batch_size: int = 16,
    beta: float = 0.1,
    warmup_ratio: float = 0.1,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    callback: Callable[[int, float], None] | None = None,
) -> None:
    """Trains ``model`` in place with AdamW, warm-up then linear decay, and clipped gradients.

    ``seed`` decides the order of ``pairs``. Only NPO and DPO use ``beta``. ``callback(step, loss)`` is called after
    every step, counted from 1.
    """
    with torch.no_grad():  # the references: the same model before its first step
        ref_chosen = sequence_logps(model, [p.chosen for p in pairs]) if method == "dpo" else None  # type: ignore[misc]
        ref_rejected = (
            sequence_logps(model, [p.rejected for p in pairs])  # type: ignore[misc]
            if method in ("npo", "dpo")
            else None
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    warmup = max(1, round(warmup_ratio * num_steps))
    rng = random.Random(seed)
    order: list[int] = []
    model.train()
    for step in range(1, num_steps + 1):
        while len(order) < batch_size:
            order += rng.sample(range(len(pairs)), len(pairs))
        batch, order = order[:batch_size], order[batch_size:]
        factor = step / warmup if step <= warmup else (num_steps - step) / max(1, num_steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        loss = _batch_loss(method, model, [pairs[i] for i in batch], batch, ref_chosen, ref_rejected, beta)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        if callback is not None:
            callback(step, loss.item())


def _batch_loss(method, model, pairs, index, ref_chosen, ref_rejected, beta):  # type: ignore[no-untyped-def]
    if method == "ga":
        return ga_loss(sequence_logps(model, [p.rejected for p in pairs]))
    if method == "npo":
        return npo_loss(sequence_logps(model, [p.rejected for p in pairs]), ref_rejected[index], beta)
    if method == "sft":
        num_tokens = sum(len(p.chosen[0]) - p.chosen[1] for p in pairs)
        return sft_loss(sequence_logps(model, [p.chosen for p in pairs]), num_tokens)
    if method == "dpo":
        logps = sequence_logps(model, [p.chosen for p in pairs] + [p.rejected for p in pairs])
        chosen, rejected = logps.chunk(2)
        return dpo_loss(chosen, ref_chosen[index], rejected, ref_rejected[index], beta)
    raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")

"""The measured cases: the heads of real models, prompts of 1 + K responses, and inputs like a language model's.

Shapes: N response tokens, V vocabulary, H hidden, S responses, G prompts, K anchors of one prompt.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from d2o_fast.loss.layout import ResponseLayout
from d2o_fast.loss.reference import naive_d2o_loss, naive_linear_logprob

MODES = {"train": 3, "frozen": 2, "score": 1}  # products of size N x H x V that an exact, dense computation needs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CANDIDATES = 8  # likely words per position of the peaked inputs


class Head(NamedTuple):
    H: int
    V: int
    softcap: float | None = None


HEADS = {
    "gpt2": Head(768, 50257),
    "qwen2.5-0.5b": Head(896, 151936),
    "llama-3.2-1b": Head(2048, 128256),
    "llama-3.1-8b": Head(4096, 128256),
    "gemma-2-2b": Head(2304, 256000, softcap=30.0),
}


@dataclass(frozen=True)
class Case:
    """One measurement: every named provider computes the same thing on the same tensors.

    Args:
        lengths: tokens of each response, ``lengths[g] = [negative, anchor_1, .. anchor_K]``.
        mode: "train" (gradients of hidden and weight), "frozen" (of hidden alone) or "score" (log-probabilities only).
        inputs: "random" (logits nearly uniform) or "peaked" (like a trained model's, see ``make_problem``).
        measure: any of "errors" (the gate), "memory" and "time".
        rounds: the most rounds of the timing.
    """

    suite: str
    head: str
    lengths: tuple[tuple[int, ...], ...]
    H: int
    V: int
    dtype: str = "bf16"
    mode: str = "train"
    inputs: str = "random"
    softcap: float | None = None
    device: str = "cpu"
    seed: int = 0
    providers: tuple[str, ...] = ()
    measure: tuple[str, ...] = ("errors", "memory", "time")
    rounds: int = 25

    @property
    def N(self) -> int:
        return sum(map(sum, self.lengths))

    def flops(self, units: int) -> float:
        """Operations of ``units`` products of N x H x V."""
        return 2.0 * units * self.N * self.H * self.V

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        lengths = tuple(tuple(group) for group in fields["lengths"])
        lists = {name: tuple(fields[name]) for name in ("providers", "measure")}
        return cls(**{**fields, **lists, "lengths": lengths})


def equal_lengths(prompts: int, tokens: int, K: int = 11) -> tuple[tuple[int, ...], ...]:
    """``prompts`` groups of 1 + K responses, each of ``tokens`` tokens."""
    return tuple((tokens,) * (K + 1) for _ in range(prompts))


def mixed_lengths(longest: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """13 prompts with K = 1 to 13 in a random order and responses of 1 to ``longest`` tokens; N is odd."""
    draw = random.Random(seed)
    groups = [[draw.randint(1, longest) for _ in range(K + 1)] for K in draw.sample(range(1, 14), 13)]
    groups[0][0] += 1 - sum(map(sum, groups)) % 2
    return tuple(tuple(group) for group in groups)


@dataclass(frozen=True)
class Problem:
    """The tensors of a case, all on its device."""

    hidden: torch.Tensor  #: (N, H)
    weight: torch.Tensor  #: (V, H)
    targets: torch.Tensor  #: (N,) int64
    layout: ResponseLayout
    ref_logps: torch.Tensor  #: (S,) fp32
    softcap: float | None
    entropy: float  #: of the softmax, nats, mean over some rows
    target_logp: float  #: log-probability of the targets, nats, mean over the same rows

    def prompt(self, g: int) -> Problem:
        """Prompt ``g`` alone."""
        start, end = self.layout.token_range(g)
        first, last = self.layout.cu_groups[g : g + 2]
        offsets = [offset - start for offset in self.layout.cu_seqlens[first : last + 1]]
        return replace(
            self,
            hidden=self.hidden[start:end],
            targets=self.targets[start:end],
            layout=ResponseLayout(offsets, [0, last - first]),
            ref_logps=self.ref_logps[first:last],
        )


def make_problem(case: Case) -> Problem:
    """Draws the tensors of a case from its seed.

    Weight rows are N(0, 1/H), so a random hidden state (N(0, 1)) gives logits of variance 1 and an almost uniform
    softmax. A *peaked* hidden state adds ``CANDIDATES`` random rows of the weight, each with its own margin. The first
    is about log V and the next ones fall off: a trained model, too, has a few likely next words and a long tail. The
    target is drawn from the softmax over these. References are within a few nats of the policy's log-probabilities, so
    that no prompt's weight sigmoid(-z) is saturated.
    """
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    draw = torch.Generator(device).manual_seed(case.seed)
    N, H, V = case.N, case.H, case.V
    weight = torch.empty(V, H, device=device, dtype=dtype).normal_(0.0, H**-0.5, generator=draw)
    hidden = torch.randn(N, H, device=device, generator=draw)
    targets = torch.randint(0, V, (N,), device=device, generator=draw)
    if case.inputs == "peaked":
        words = torch.randint(0, V, (N, CANDIDATES), device=device, generator=draw)
        falloff = torch.arange(CANDIDATES, device=device) * 1.5
        margins = math.log(V) + 2.0 - falloff + 1.5 * torch.randn(N, CANDIDATES, device=device, generator=draw)
        for j in range(CANDIDATES):
            hidden += margins[:, j, None] * weight[words[:, j]].float()
        targets = words.gather(1, torch.multinomial(margins.softmax(1), 1, generator=draw)).squeeze(1)
    hidden = hidden.to(dtype)
    layout = ResponseLayout.from_lengths(case.lengths)
    rows = torch.linspace(0, N - 1, min(N, 64), device=device).long()
    logits = (hidden[rows] @ weight.T).float()
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    log_probs = logits.log_softmax(1)
    problem = Problem(
        hidden=hidden,
        weight=weight,
        targets=targets,
        layout=layout,
        ref_logps=torch.zeros(layout.num_responses, device=device),
        softcap=case.softcap,
        entropy=-(log_probs.exp() * log_probs).sum(1).mean().item(),
        target_logp=log_probs.gather(1, targets[rows, None]).mean().item(),
    )
    for g, (first, end) in enumerate(zip(layout.cu_groups, layout.cu_groups[1:], strict=False)):
        part = problem.prompt(g)
        token_logps = naive_linear_logprob(part.hidden, weight, part.targets, softcap=case.softcap)
        problem.ref_logps[first:end] = torch.stack([r.sum() for r in token_logps.split(response_lengths(part.layout))])
    problem.ref_logps.add_(3.0 * torch.randn(layout.num_responses, device=device, generator=draw))
    return problem


def response_lengths(layout: ResponseLayout) -> list[int]:
    return [end - start for start, end in zip(layout.cu_seqlens, layout.cu_seqlens[1:], strict=False)]


class Results(NamedTuple):
    """The results of a step: ``loss`` and the gradients in "train" and "frozen", ``logps`` (N,) in "score"."""

    loss: torch.Tensor | None = None
    dhidden: torch.Tensor | None = None
    dweight: torch.Tensor | None = None
    logps: torch.Tensor | None = None

    @property
    def gradient_bytes(self) -> int:
        return sum(t.nbytes for t in (self.dhidden, self.dweight, self.logps) if t is not None)


def exact_results(problem: Problem, mode: str, objective: str = "d2o") -> Results:
    """The reference in fp64, one prompt at a time, so that only one prompt's logits are held.

    ``objective``: "d2o", or "sum" for the plain sum of the tokens' negative log-probabilities.
    """
    weight = problem.weight.double().requires_grad_(mode == "train")
    G = problem.layout.num_prompts
    losses: list[torch.Tensor] = []
    dhidden: list[torch.Tensor] = []
    logps: list[torch.Tensor] = []
    for g in range(G):
        part = problem.prompt(g)
        hidden = part.hidden.double().requires_grad_(mode != "score")
        if mode == "score" or objective == "sum":
            token_logps = naive_linear_logprob(hidden, weight, part.targets, softcap=problem.softcap)
            logps.append(token_logps.detach())
            loss = -token_logps.sum()
        else:
            refs = part.ref_logps.double()
            out = naive_d2o_loss(
                hidden, weight, part.targets, part.layout, refs, num_prompts=G, softcap=problem.softcap
            )
            loss = out.loss
        if mode != "score":
            loss.backward()
            losses.append(loss.detach())
            assert hidden.grad is not None
            dhidden.append(hidden.grad)
    if mode == "score":
        return Results(logps=torch.cat(logps))
    return Results(torch.stack(losses).sum(), torch.cat(dhidden), weight.grad)


class Error(NamedTuple):
    """Relative to the exact tensor: ``largest`` = max |x - exact| / max |exact|, ``rms`` = |x - exact| / |exact|."""

    largest: float
    rms: float


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> Error:
    """The error of a tensor against its fp64 value; NaN or infinity in ``found`` gives an infinite error."""
    if found.shape != exact.shape:
        raise ValueError(f"shape {tuple(found.shape)} instead of {tuple(exact.shape)}")
    largest = norm = scale = scale_norm = 0.0
    for part, true in zip(found.reshape(-1).split(1 << 26), exact.reshape(-1).split(1 << 26), strict=True):
        difference = (part.double() - true).abs()
        if not torch.isfinite(difference).all():
            return Error(math.inf, math.inf)
        largest, norm = max(largest, difference.max().item()), math.hypot(norm, difference.norm().item())
        scale, scale_norm = max(scale, true.abs().max().item()), math.hypot(scale_norm, true.norm().item())
    return Error(largest / scale, norm / scale_norm) if scale else Error(largest, norm)

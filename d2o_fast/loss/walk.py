"""The walk over prompts with the one-pass gradient; what computes a chunk of tokens is an engine.

Shapes: N response tokens, n those of a chunk, V vocabulary, H hidden, S responses, G prompts, K anchors of one prompt.

With ``p`` a row of softmax and ``c`` the derivative of the loss by the token's log-probability, the gradient by the
row's raw products is ``E = c * (onehot - p)`` (times the slope of scale and softcap), and

    dHidden = E @ weight        dWeight = E.T @ hidden        dBias = sum of E's rows

For a margin loss (``reference.Margin``) ``c = w * r + q`` with ``r`` and ``q`` known beforehand (for D2O ``r`` is
beta/K for an anchor's token and -alpha for the negative's) and one unknown ``w = -gate * sigmoid(-z) / num_prompts``
per prompt. A prompt whose logits fit the workspace is scored, ``w`` computed, and the logits become E in place. A
larger one is *staged*: chunk after chunk with ``E = r * (onehot - p)``, the sums multiplied by ``w`` at the end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from d2o_fast.loss.layout import ResponseLayout
from d2o_fast.loss.matmul import wide_dtype
from d2o_fast.loss.reference import Margin


@dataclass(frozen=True)
class Head:
    """The head: ``logits = softcap * tanh(x / softcap)`` with ``x = logit_scale * (hidden @ weight.T + bias)``."""

    weight: torch.Tensor  #: (V, H)
    bias: torch.Tensor | None  #: (V,)
    softcap: float | None
    logit_scale: float

    def options(self) -> dict[str, Any]:
        """The keyword arguments that ``fused_d2o_loss`` and ``linear_logprob`` take."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


class Needs(NamedTuple):
    """Which gradients somebody asked for."""

    hidden: bool
    weight: bool
    bias: bool


class Totals:
    """What is summed over tokens: dWeight (V, H) and dBias (V,); None where nobody asked.

    Wide, since they are summed over chunks; in the parameter's own dtype where one chunk is all there is.
    """

    def __init__(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.fresh = True  # nothing summed yet: the memory is uninitialised

    @classmethod
    def of(cls, head: Head, needs: Needs, one_chunk: bool) -> Totals:
        def total(parameter: torch.Tensor | None, needed: bool) -> torch.Tensor | None:
            if parameter is None or not needed:
                return None
            dtype = parameter.dtype if one_chunk else wide_dtype(parameter.dtype)
            return torch.empty(parameter.shape, dtype=dtype, device=parameter.device)

        return cls(total(head.weight, needs.weight), total(head.bias, needs.bias))

    def like(self) -> Totals:
        return Totals(*(None if total is None else torch.empty_like(total) for total in (self.weight, self.bias)))

    def add_scaled(self, other: Totals, factor: torch.Tensor | float) -> None:
        """``self += factor * other``, or ``self *= factor`` when it is the other."""
        for into, value in ((self.weight, other.weight), (self.bias, other.bias)):
            if into is None or value is None:
                continue
            if into is value:
                into.mul_(factor)
            elif self.fresh:
                torch.mul(value, factor, out=into)
            elif isinstance(factor, torch.Tensor):
                into.addcmul_(value, factor)
            else:
                into.add_(value, alpha=factor)
        self.fresh = False

    def zero_if_fresh(self) -> None:
        for total in (self.weight, self.bias):
            if self.fresh and total is not None:
                total.zero_()
        self.fresh = False


class Engine(ABC):
    """Computes chunks of one batch of N tokens with at most ``workspace_bytes`` of wide logits in memory.

    Raises:
        ValueError: the workspace does not hold the logits of one token.
    """

    name: ClassVar[str]

    def __init__(
        self,
        hidden: torch.Tensor,
        head: Head,
        targets: torch.Tensor,
        workspace_bytes: int,
        grad_filter_eps: float | None = None,
    ) -> None:
        self.hidden, self.head, self.targets, self.grad_filter_eps = hidden, head, targets, grad_filter_eps
        self.workspace_bytes = workspace_bytes
        self.wide = wide_dtype(hidden.dtype)
        self.N, (self.V, self.H) = hidden.shape[0], head.weight.shape
        row_bytes = self.V * self.wide.itemsize
        self.max_rows = workspace_bytes // row_bytes
        if self.max_rows < 1:
            raise ValueError(
                f"workspace_bytes is {workspace_bytes}; the fp32 logits of one token already take {row_bytes}"
            )
        self.kept_logits: torch.Tensor | None = None  #: of the chunk that ``forward`` saw last
        self._memory: dict[str, torch.Tensor] = {}
        #: Columns of E that grad_filter_eps kept, times the tokens of their chunk. Filled on the device: a number
        #: copied there from the host would wait for it.
        self.kept = torch.zeros((), dtype=torch.int64, device=hidden.device)

    def scratch(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialised memory, wide unless said otherwise, that is asked for once: fresh pages cost a CPU more than
        the passes over a block. The same name gives the same memory; nothing may hold on to what it gave before."""
        size, memory = math.prod(shape), self._memory.pop(name, None)
        if memory is None or memory.numel() < size:
            memory = None  # let go of the smaller one first
            memory = torch.empty(size, dtype=dtype or self.wide, device=self.hidden.device)
        self._memory[name] = memory
        return memory[:size].view(shape)

    def fits_without_accumulator(self, needs: Needs) -> bool:
        """Whether the whole batch can be one chunk, whose dWeight is rounded once from the product's own fp32 sum.

        It then needs no fp32 accumulator of the weight's size, and its logits may take that room.
        """
        weight = self.head.weight
        accumulator = weight.numel() * self.wide.itemsize if needs.weight and weight.dtype != self.wide else 0
        fits = self.N * self.V * self.wide.itemsize <= self.workspace_bytes + accumulator
        return fits and self.grad_filter_eps is None  # the filter adds columns up, which takes fp32

    @staticmethod
    @abstractmethod
    def group_loss(token_logps: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """Results of whole prompts and the derivative by each response's log-probability; see ``torch_path``."""

    @abstractmethod
    def score(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(logps (N,), stats (2, N)) of all tokens, wide; nothing of N times V is kept.

        ``stats`` are a row's maximum and the logarithm of its sum of exp(logit - maximum): the log-sum-exp in two
        parts, which keep the digits that it loses where logits are far from zero.
        """

    @abstractmethod
    def forward(self, start: int, end: int) -> torch.Tensor:
        """logps (n,) of tokens start..end, at most ``max_rows`` of them, whose logits are kept for ``backward``."""

    @abstractmethod
    def backward(self, coef: torch.Tensor, dhidden: torch.Tensor | None, totals: Totals) -> None:
        """The gradient of the tokens that ``forward`` saw last, for their dL/dlogp (n,).

        Fills ``dhidden`` (n, H), wide or in the operand dtype, and adds to ``totals``. Uses the kept logits up.
        """

    @abstractmethod
    def gradient(
        self, stats: torch.Tensor, coef: torch.Tensor, needs: Needs
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(dhidden (N, H), dweight (V, H), dbias (V,)) for ``score``'s stats and dL/dlogp (N,), logits anew;
        each in its parameter's dtype, None where it is not needed."""


class Section(NamedTuple):
    """The negative or the anchors of a staged prompt: tokens start..end with dL/dlogp = w * r + q."""

    start: int
    end: int
    r: float
    q: float


class MarginWalk:
    """A margin loss of a batch, with its gradient in one pass.

    Results, wide: ``logps`` (S,), ``chosen``, ``rejected``, ``margins`` and ``losses`` (G,), the latter divided by
    num_prompts.
    """

    def __init__(
        self, engine: Engine, layout: ResponseLayout, ref_logps: torch.Tensor, margin: Margin, num_prompts: int
    ) -> None:
        self.engine, self.layout, self.ref_logps = engine, layout, ref_logps
        self.margin, self.num_prompts = margin, num_prompts
        self.device = engine.hidden.device
        self.logps = torch.empty(layout.num_responses, dtype=engine.wide, device=self.device)
        per_prompt = torch.empty(4, layout.num_prompts, dtype=engine.wide, device=self.device)
        self.chosen, self.rejected, self.margins, self.losses = per_prompt.unbind(0)

    def loss(self) -> None:
        """The results without a gradient."""
        self._group_loss(0, self.layout.num_prompts, self.engine.score()[0])

    def loss_and_gradient(self, needs: Needs) -> tuple[torch.Tensor | None, Totals]:
        """The results; returns dhidden (N, H) in the operand dtype, and the totals.

        Staged prompts come first: the first is staged in the totals themselves.
        """
        hidden = self.engine.hidden
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else None
        one_chunk = self.engine.fits_without_accumulator(needs)
        runs, staged = ([(0, self.layout.num_prompts)], []) if one_chunk else self._plan()
        totals = Totals.of(self.engine.head, needs, one_chunk)
        staging: Totals | None = None
        for g in staged:
            staging = self._staged(g, dhidden, totals, staging)
        del staging
        for first, last in runs:
            start, end = self.layout.token_range(first)[0], self.layout.token_range(last - 1)[1]
            response_coef = self._group_loss(first, last, self.engine.forward(start, end))
            response = self.layout.tensor("token_response", self.device)[start:end]
            coef = response_coef.index_select(0, response - self.layout.cu_groups[first])
            self.engine.backward(coef, None if dhidden is None else dhidden[start:end], totals)
        totals.zero_if_fresh()
        return dhidden, totals

    def _plan(self) -> tuple[list[tuple[int, int]], list[int]]:
        """(runs of neighbouring prompts that fit the workspace together, prompts that do not fit it alone)."""
        runs: list[tuple[int, int]] = []
        staged: list[int] = []
        for g in range(self.layout.num_prompts):
            start, end = self.layout.token_range(g)
            if end - start > self.engine.max_rows:
                staged.append(g)
            elif runs and runs[-1][1] == g and end - self.layout.token_range(runs[-1][0])[0] <= self.engine.max_rows:
                runs[-1] = (runs[-1][0], g + 1)
            else:
                runs.append((g, g + 1))
        return runs, staged

    def _group_loss(self, first: int, last: int, token_logps: torch.Tensor) -> torch.Tensor:
        """Fills the results of prompts first..last from their tokens' log-probabilities; returns their dL/dlogp_s."""
        layout, (alpha, beta, anchor_weight, negative_weight, gate) = self.layout, self.margin
        s0, s1 = layout.cu_groups[first], layout.cu_groups[last]
        *results, response_coef = self.engine.group_loss(
            token_logps,
            layout.tensor("cu_seqlens", self.device)[s0 : s1 + 1] - layout.cu_seqlens[s0],
            layout.tensor("cu_groups", self.device)[first : last + 1] - s0,
            self.ref_logps[s0:s1],
            alpha,
            beta,
            anchor_weight,
            self.num_prompts,
            negative_weight,
            gate,
        )
        self.logps[s0:s1] = results[0]
        for into, value in zip((self.chosen, self.rejected, self.margins, self.losses), results[1:], strict=True):
            into[first:last] = value
        return response_coef

    def _staged(self, g: int, dhidden: torch.Tensor | None, totals: Totals, staging: Totals | None) -> Totals | None:
        """One prompt whose logits exceed the workspace; returns the second buffer if one was needed.

        A section without a share in ``w`` has a known coefficient and goes straight into ``totals``. The others are
        summed with their ``r``, the anchors first, and then stand for ``w + l`` times themselves, ``l = q / r``. Where
        the two have different ``l``, ``totals`` gains the difference times what the anchors alone have summed.
        """
        known, gated = self._sections(g)
        start, end = self.layout.token_range(g)
        logps = torch.empty(end - start, dtype=self.engine.wide, device=self.device)
        wide = dhidden is None or dhidden.dtype == self.engine.wide
        dstaged = None
        if dhidden is not None:
            dstaged = dhidden[start:end] if wide else torch.empty_like(dhidden[start:end], dtype=self.engine.wide)
        for section in known:
            self._walk(start, section, section.q, logps, dstaged, totals)
        shares = [section.q / section.r for section in gated]
        in_place = totals.fresh and len(set(shares)) == 1
        if gated:
            staging = staging if in_place else staging or totals.like()
            into = totals if in_place or staging is None else staging
            into.fresh = True
            for section, share in zip(gated, shares, strict=True):
                self._walk(start, section, section.r, logps, dstaged, into)
                if share != shares[-1]:
                    totals.add_scaled(into, share - shares[-1])
        self._group_loss(g, g + 1, logps)
        w = -self.margin.gate * torch.sigmoid(-self.margins[g]) / self.num_prompts
        if gated:
            totals.add_scaled(into, w + shares[-1])
        if dhidden is not None and dstaged is not None:
            for section, share in zip(gated, shares, strict=True):
                dstaged[section.start : section.end].mul_(w + share)
            if not wide:
                dhidden[start:end] = dstaged
        return staging

    def _sections(self, g: int) -> tuple[list[Section], list[Section]]:
        """(sections whose coefficient is known, sections that share in ``w``), tokens counted from the prompt's
        first."""
        alpha, beta, anchor_weight, negative_weight, gate = self.margin
        start, end = self.layout.token_range(g)
        first_anchor = self.layout.cu_seqlens[self.layout.cu_groups[g] + 1] - start
        K, P = max(1, self.layout.num_anchors[g]), self.num_prompts
        anchors = Section(first_anchor, end - start, beta / K, -anchor_weight / (K * P))
        negative = Section(0, first_anchor, -alpha, negative_weight / P)
        sections = [section for section in (anchors, negative) if section.start < section.end]
        gated = [section for section in sections if section.r != 0 and gate != 0]
        return [section for section in sections if section not in gated], gated

    def _walk(
        self,
        first: int,
        section: Section,
        coefficient: float,
        logps: torch.Tensor,
        dhidden: torch.Tensor | None,
        totals: Totals,
    ) -> None:
        for a, b in split(section.start, section.end, self.engine.max_rows):
            logps[a:b] = self.engine.forward(first + a, first + b)
            into = None if dhidden is None else dhidden[a:b]
            if coefficient != 0:
                self.engine.backward(torch.full_like(logps[a:b], coefficient), into, totals)
            elif into is not None:
                into.zero_()


def split(start: int, end: int, max_rows: int) -> Iterator[tuple[int, int]]:
    """start..end in as few ranges of at most ``max_rows`` as possible, equal to within one row."""
    count = -(-(end - start) // max_rows)
    for i in range(count):
        yield start + (end - start) * i // count, start + (end - start) * (i + 1) // count

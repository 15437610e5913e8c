"""The walk over prompts with the one-pass gradient; an engine computes each chunk of tokens.

Shapes: N response tokens, n tokens of a chunk, V vocabulary, H hidden, S responses, G prompts, K anchors of one prompt.

With ``p`` a row of softmax and ``c`` the derivative of the loss by the token's log-probability, the gradient by the
row's raw products is ``E = c * (onehot - p)`` (times the slope of scale and softcap), and

    dHidden = E @ weight        dWeight = E.T @ hidden        dBias = sum of E's rows

For a margin loss (``loss/reference.py``) ``c = w * r + q``. ``r`` and ``q`` are known beforehand: for D2O ``r`` is
beta/K for an anchor's token and -alpha for the negative's. Each prompt has one unknown, ``w = -gate * sigmoid(-z) /
num_prompts``. If a prompt's logits fit the workspace, they are scored, ``w`` is computed, and they become E in place. A
larger prompt is *staged*: each chunk uses ``E = r * (onehot - p)``, and the sums are multiplied by ``w`` at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from d2o_fast.loss.engine import Engine, Needs, Totals, split
from d2o_fast.loss.layout import ResponseLayout
from d2o_fast.loss.reference import Margin


class Section(NamedTuple):
    """The negative or the anchors of a staged prompt: tokens start..end, whose dL/dlogp is w * r + q."""

    start: int
    end: int
    r: float
    q: float


class MarginWalk:
    """A margin loss of a batch, with its gradient in one pass.

    Results, wide: ``logps`` (S,), ``chosen``, ``rejected``, ``margins`` and ``losses`` (G,). The losses are divided by
    ``num_prompts``.
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
        """Fills the results, without a gradient."""
        self._group_loss(0, self.layout.num_prompts, self.engine.score()[0])

    def loss_and_gradient(self, needs: Needs) -> tuple[torch.Tensor | None, Totals]:
        """Fills the results; returns dhidden (N, H) in the operand dtype, and the totals.

        Staged prompts come first, because the first one can be staged in the totals themselves.
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
        """(runs of neighbouring prompts that fit the workspace together, single prompts that exceed it)."""
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
        """Fills the results of prompts first..last from token log-probabilities; returns their responses' dL/dlogp."""
        layout, s0, s1 = self.layout, self.layout.cu_groups[first], self.layout.cu_groups[last]
        *results, response_coef = self.engine.group_loss(
            token_logps,
            layout.tensor("cu_seqlens", self.device)[s0 : s1 + 1] - layout.cu_seqlens[s0],
            layout.tensor("cu_groups", self.device)[first : last + 1] - s0,
            self.ref_logps[s0:s1],
            **self.margin._asdict(),
            num_prompts=self.num_prompts,
        )
        self.logps[s0:s1] = results[0]
        for into, value in zip((self.chosen, self.rejected, self.margins, self.losses), results[1:], strict=True):
            into[first:last] = value
        return response_coef

    def _staged(self, g: int, dhidden: torch.Tensor | None, totals: Totals, staging: Totals | None) -> Totals | None:
        """Adds a prompt whose logits exceed the workspace; returns the second buffer if one is needed.

        A section independent of ``w`` has a known coefficient and is added to ``totals`` directly. The others are
        summed with weight ``r``, the anchors first, and scaled by ``w + l`` at the end, where ``l = q / r``. If the
        anchors' ``l`` differs from the negative's, ``totals`` also gains the difference times the anchors' sum.
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
        """(sections with a known coefficient, sections with one that depends on ``w``), in the prompt's tokens."""
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

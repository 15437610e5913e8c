"""The walk over chunks of the batch: scoring, the one-pass D2O gradient, and the gradient of given coefficients.

Shapes: N response tokens, n those of a chunk, V vocabulary, H hidden, S responses, G prompts, K anchors of one prompt.

With ``p`` a row of softmax and ``c`` the derivative of the loss by the token's log-probability, the gradient by the
row's raw products is ``E = c * (onehot - p)`` (times the slope of scale and softcap), and

    dHidden = E @ weight        dWeight = E.T @ hidden        dBias = sum of E's rows

For D2O ``c = w * r`` with ``r`` known beforehand (beta/K for an anchor's token, -alpha for the negative's) and one
unknown ``w = -sigmoid(-z)/G`` per prompt. A prompt whose logits fit the workspace is scored, ``w`` computed, and the
logits become E in place. A larger one is *staged*: chunk after chunk with ``E = r * (onehot - p)``, the sums
multiplied by ``w`` at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from d2o_fast.layout import ResponseLayout
from d2o_fast.products import add_dweight_, dhidden_, logits_, operand_weight, wide_dtype


class Path(NamedTuple):
    """The device functions of a path; ``kernels/`` and ``torch_path`` describe them."""

    name: str
    logit_stats: Callable[..., Any]
    logit_grad_: Callable[..., torch.Tensor]
    group_loss: Callable[..., Any]
    linear_logprob_forward: Callable[..., Any] | None  #: scores a whole batch without logits; None: chunk by chunk


@dataclass(frozen=True)
class Head:
    """The head's parameters; ``options`` are the last arguments of the device functions, in their order."""

    weight: torch.Tensor  #: (V, H)
    bias: torch.Tensor | None  #: (V,)
    softcap: float | None
    logit_scale: float

    @property
    def options(self) -> tuple[torch.Tensor | None, float | None, float]:
        return self.bias, self.softcap, self.logit_scale


class Totals:
    """What is summed over tokens: dWeight (V, H) and dBias (V,), wide; None where nobody asked."""

    def __init__(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.fresh = True  # nothing summed yet: the memory is uninitialised

    @classmethod
    def of(cls, head: Head, dtype: torch.dtype, weight: bool, bias: bool) -> Totals:
        V, H = head.weight.shape
        device = head.weight.device
        return cls(
            torch.empty(V, H, dtype=dtype, device=device) if weight else None,
            torch.empty(V, dtype=dtype, device=device) if bias else None,
        )

    def like(self) -> Totals:
        return Totals(*(None if total is None else torch.empty_like(total) for total in (self.weight, self.bias)))

    def add(self, grad: torch.Tensor, hidden: torch.Tensor) -> None:
        """A chunk's E (n, V) and hidden states (n, H)."""
        if self.weight is not None:
            add_dweight_(grad, hidden, self.weight, fresh=self.fresh)
        if self.bias is not None:
            columns = grad.sum(0, dtype=self.bias.dtype)
            self.bias.copy_(columns if self.fresh else self.bias + columns)
        self.fresh = False

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


class Walk:
    """Chunks of one batch of N tokens, at most ``workspace_bytes`` of wide logits at a time.

    Raises:
        ValueError: the workspace does not hold the logits of one token.
    """

    def __init__(
        self, path: Path, hidden: torch.Tensor, head: Head, targets: torch.Tensor, workspace_bytes: int
    ) -> None:
        self.path, self.hidden, self.head, self.targets = path, hidden, head, targets
        self.wide = wide_dtype(hidden.dtype)
        self.N, self.V = hidden.shape[0], head.weight.shape[0]
        row_bytes = self.V * self.wide.itemsize
        self.max_rows = workspace_bytes // row_bytes
        if self.max_rows < 1:
            raise ValueError(
                f"workspace_bytes is {workspace_bytes}; the fp32 logits of one token already take {row_bytes}"
            )
        # On a CPU the torch path multiplies widened operands, so there E stays wide.
        self.grad_dtype = self.wide if path.name == "torch" and hidden.device.type == "cpu" else hidden.dtype
        self._weight: torch.Tensor | None = None
        self._buffer: torch.Tensor | None = None

    def score(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(logps (N,), lse (N,)) of all tokens."""
        if self.path.linear_logprob_forward is not None:
            return self.path.linear_logprob_forward(self.hidden, self.head.weight, self.targets, *self.head.options)
        logps = torch.empty(self.N, dtype=self.wide, device=self.hidden.device)
        lse = torch.empty_like(logps)
        for start, end in split(0, self.N, self.max_rows):
            logps[start:end], lse[start:end] = self.stats(self.logits(start, end), start, end)
        return logps, lse

    def gradient(self, lse: torch.Tensor, coef: torch.Tensor, dhidden: torch.Tensor | None, totals: Totals) -> None:
        """The gradient for given lse (N,) and dL/dlogp (N,), the logits computed anew; ``dhidden`` (N, H) is filled."""
        for start, end in split(0, self.N, self.max_rows):
            into = None if dhidden is None else dhidden[start:end]
            self.backward(self.logits(start, end), start, end, lse[start:end], coef[start:end], into, totals)

    def logits(self, start: int, end: int) -> torch.Tensor:
        """Raw products (n, V), wide, of tokens start..end, in the walk's one buffer."""
        if self._weight is None:
            self._weight = operand_weight(self.head.weight, self.hidden.dtype)
        if self._buffer is None or self._buffer.shape[0] < end - start:
            self._buffer = None  # let go of the smaller one first
            self._buffer = torch.empty(end - start, self.V, dtype=self.wide, device=self.hidden.device)
        return logits_(self.hidden[start:end], self._weight, self._buffer[: end - start])

    def stats(self, logits: torch.Tensor, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(logps (n,), lse (n,)) of tokens start..end."""
        return self.path.logit_stats(logits, self.targets[start:end], *self.head.options)

    def backward(
        self,
        logits: torch.Tensor,
        start: int,
        end: int,
        lse: torch.Tensor,
        coef: torch.Tensor,
        dhidden: torch.Tensor | None,
        totals: Totals,
    ) -> None:
        """Turns the logits of tokens start..end into E; fills ``dhidden`` (n, H) and adds to ``totals``."""
        targets = self.targets[start:end]
        grad = self.path.logit_grad_(logits, targets, lse, coef, *self.head.options, self.grad_dtype)
        if dhidden is not None:
            assert self._weight is not None
            if dhidden.dtype == self.wide:
                dhidden_(grad, self._weight, dhidden)
            else:
                dhidden.copy_(dhidden_(grad, self._weight, torch.empty_like(dhidden, dtype=self.wide)))
        totals.add(grad, self.hidden[start:end])


class Coefficients(NamedTuple):
    """As ``fused_d2o_loss`` takes them."""

    alpha: float
    beta: float
    anchor_weight: float
    num_prompts: int


class D2OWalk(Walk):
    """D2O of a batch, with its gradient in one pass.

    Results, wide: ``logps`` (S,), ``chosen``, ``rejected``, ``margins`` and ``losses`` (G,), the latter divided by
    num_prompts.
    """

    def __init__(
        self,
        path: Path,
        hidden: torch.Tensor,
        head: Head,
        targets: torch.Tensor,
        workspace_bytes: int,
        layout: ResponseLayout,
        ref_logps: torch.Tensor,
        coefficients: Coefficients,
    ) -> None:
        super().__init__(path, hidden, head, targets, workspace_bytes)
        self.layout, self.ref_logps, self.coefficients = layout, ref_logps, coefficients
        self.logps = torch.empty(layout.num_responses, dtype=self.wide, device=hidden.device)
        per_prompt = torch.empty(4, layout.num_prompts, dtype=self.wide, device=hidden.device)
        self.chosen, self.rejected, self.margins, self.losses = per_prompt.unbind(0)

    def loss(self) -> None:
        """The results without a gradient."""
        self._group_loss(0, self.layout.num_prompts, self.score()[0])

    def loss_and_gradient(self, dhidden: torch.Tensor | None, totals: Totals) -> None:
        """The results; fills ``dhidden`` (N, H) and ``totals``. Staged prompts first: the first is staged in
        ``totals`` itself."""
        runs, staged = self._plan()
        staging: Totals | None = None
        for g in staged:
            if totals.fresh and self.coefficients.anchor_weight == 0:
                self._staged(g, dhidden, totals, totals)
            else:
                staging = staging or totals.like()
                self._staged(g, dhidden, totals, staging)
        staging = None
        for first, last in runs:
            start, end = self.layout.token_range(first)[0], self.layout.token_range(last - 1)[1]
            logits = self.logits(start, end)
            logps, lse = self.stats(logits, start, end)
            response_coef = self._group_loss(first, last, logps)
            response = self.layout.tensor("token_response", self.hidden.device)[start:end]
            coef = response_coef.index_select(0, response - self.layout.cu_groups[first])
            into = None if dhidden is None else dhidden[start:end]
            self.backward(logits, start, end, lse, coef, into, totals)

    def _plan(self) -> tuple[list[tuple[int, int]], list[int]]:
        """(runs of neighbouring prompts that fit the workspace together, prompts that do not fit it alone)."""
        runs: list[tuple[int, int]] = []
        staged: list[int] = []
        for g in range(self.layout.num_prompts):
            start, end = self.layout.token_range(g)
            if end - start > self.max_rows:
                staged.append(g)
            elif runs and runs[-1][1] == g and end - self.layout.token_range(runs[-1][0])[0] <= self.max_rows:
                runs[-1] = (runs[-1][0], g + 1)
            else:
                runs.append((g, g + 1))
        return runs, staged

    def _group_loss(self, first: int, last: int, token_logps: torch.Tensor) -> torch.Tensor:
        """Fills the results of prompts first..last from their tokens' log-probabilities; returns their dL/dlogp_s."""
        layout, device = self.layout, self.hidden.device
        s0, s1 = layout.cu_groups[first], layout.cu_groups[last]
        *results, response_coef = self.path.group_loss(
            token_logps,
            layout.tensor("cu_seqlens", device)[s0 : s1 + 1] - layout.cu_seqlens[s0],
            layout.tensor("cu_groups", device)[first : last + 1] - s0,
            self.ref_logps[s0:s1],
            *self.coefficients,
        )
        self.logps[s0:s1] = results[0]
        for into, value in zip((self.chosen, self.rejected, self.margins, self.losses), results[1:], strict=True):
            into[first:last] = value
        return response_coef

    def _staged(self, g: int, dhidden: torch.Tensor | None, totals: Totals, staging: Totals) -> None:
        """One prompt whose logits exceed the workspace.

        The ungated anchor term, -anchor_weight/(K*G) per anchor, is a known multiple, ``leash``, of the anchors' own
        share: the anchors are walked first, and ``totals`` gains ``leash`` times the staging while nothing else is in
        it. Where beta is 0 they have no gated share; then ``r`` is 1/K for that term alone, and the staging starts
        anew after it.
        """
        alpha, beta, anchor_weight, num_prompts = self.coefficients
        start, end = self.layout.token_range(g)
        n, first_anchor = end - start, self.layout.cu_seqlens[self.layout.cu_groups[g] + 1] - start
        has_leash = anchor_weight != 0
        unit = 1.0 if has_leash and beta == 0 else beta
        leash = -anchor_weight / (unit * num_prompts) if has_leash else 0.0
        coef = torch.empty(n, dtype=self.wide, device=self.hidden.device)
        coef[:first_anchor] = -alpha
        coef[first_anchor:] = unit / self.layout.num_anchors[g]
        logps = torch.empty_like(coef)
        dstaged = None
        if dhidden is not None:
            same = dhidden.dtype == self.wide
            dstaged = dhidden[start:end] if same else torch.empty_like(dhidden[start:end], dtype=self.wide)

        staging.fresh = True
        for section in ((first_anchor, n), (0, first_anchor)) if has_leash else ((0, n),):
            for a, b in split(*section, self.max_rows):
                logits = self.logits(start + a, start + b)
                logps[a:b], lse = self.stats(logits, start + a, start + b)
                into = None if dstaged is None else dstaged[a:b]
                self.backward(logits, start + a, start + b, lse, coef[a:b], into, staging)
            if has_leash and section[0] == first_anchor:
                totals.add_scaled(staging, leash)
                staging.fresh = beta == 0

        self._group_loss(g, g + 1, logps)
        w = -torch.sigmoid(-self.margins[g]) / num_prompts
        totals.add_scaled(staging, w)
        if dhidden is not None and dstaged is not None:
            dstaged[:first_anchor].mul_(w)
            dstaged[first_anchor:].mul_((0.0 if unit != beta else w) + leash)
            if dstaged.dtype != dhidden.dtype:
                dhidden[start:end] = dstaged


def split(start: int, end: int, max_rows: int) -> Iterator[tuple[int, int]]:
    """start..end in as few ranges of at most ``max_rows`` as possible, equal to within one row."""
    count = -(-(end - start) // max_rows)
    for i in range(count):
        yield start + (end - start) * i // count, start + (end - start) * (i + 1) // count

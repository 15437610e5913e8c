"""The operations on drawn problems: against the reference in fp64, and against themselves after neutral changes.

Shapes: N response tokens, V vocabulary, H hidden, S responses, G prompts, K anchors of one prompt. *Rows*: tokens
whose logits the workspace holds. The draws are the same on every run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from d2o_fast import ResponseLayout, fused_d2o_loss, linear_logprob
from d2o_fast.loss.reference import naive_d2o_loss, naive_linear_logprob
from ops_cases import RESULTS, Problem, problem, run

Results = dict[str, torch.Tensor]


def examples(count: int) -> settings:
    slow = [HealthCheck.too_slow]  # which a busy machine is
    return settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=slow)


# --------------------------------------------------------------------------------------------------------- the draws


@dataclass(frozen=True)
class Case:
    """Small numbers that a failing run prints and shrinks; ``build`` makes the tensors."""

    lengths: list[list[int]]
    V: int
    H: int
    rows: int  #: in the workspace; at most N
    options: dict[str, Any]
    bias: bool = False
    frozen: tuple[str, ...] = ()
    seed: int = 0

    def build(self) -> Problem:
        return problem(self.lengths, self.V, self.H, bias=self.bias, seed=self.seed, **self.options)

    def workspace(self, dtype: torch.dtype = torch.float32) -> int:
        return self.rows * self.V * (8 if dtype == torch.float64 else 4)


# At least one pair of one token; K up to 13, mixed within a batch.
groups = st.lists(st.integers(1, 9), min_size=2, max_size=14)
batches = st.lists(groups, min_size=1, max_size=4)
coefficients = st.sampled_from([0.1, 0.0, 1.0, 0.7])


@st.composite
def cases(draw: st.DrawFn, *, plain: bool = False) -> Case:
    """A drawn case. ``plain``: neither scale nor cap, everything trained."""
    lengths = draw(batches)
    options: dict[str, Any] = {
        "alpha": draw(coefficients),
        "beta": draw(coefficients),
        "anchor_weight": draw(st.sampled_from([0.0, 0.2])),
        "num_prompts": draw(st.sampled_from([None, 1, 9])),
    }
    if not plain:
        options |= {"softcap": draw(st.sampled_from([None, 2.0, 50.0]))}
        options |= {"logit_scale": draw(st.sampled_from([1.0, 0.3, -1.5]))}
    bias = draw(st.booleans())
    frozen = () if plain else draw(st.sampled_from([(), ("weight",), ("hidden",), ("weight", "bias")]))
    return Case(
        lengths,
        V=draw(st.integers(1, 70)),
        H=draw(st.integers(1, 20)),
        rows=draw(st.integers(1, sum(map(sum, lengths)))),
        options=options,
        bias=bias,
        frozen=frozen,
        seed=draw(st.integers(0, 3)),
    )


# ------------------------------------------------------------------------------------------------------ their bounds


def terms(p: Problem, exact: Results) -> dict[str, tuple[float, float]]:
    """(largest, RMS) of each result's summands: relative to a smaller result, an error means nothing.

    A margin is a difference of rewards, and a reward is one of log-probabilities. A gradient that the softmax cancels
    (a vocabulary of one) is a difference of numbers as large as a token's coefficient times a weight or a state.
    """
    options = {"alpha": 0.1, "beta": 0.1, "anchor_weight": 0.0, "logit_scale": 1.0} | p.options
    prompts = options.get("num_prompts") or p.layout.num_prompts
    logp = max(1.0, float(exact["logps"].abs().max()), float(p.ref_logps.abs().max()))
    loss = 1.0 + (options["alpha"] + options["beta"] + options["anchor_weight"]) * logp
    gate = torch.sigmoid(-exact["margins"].double()).max().item()
    coef = gate * max(options["alpha"], options["beta"]) + options["anchor_weight"]
    coef = max(coef, 1e-30) * abs(options["logit_scale"]) / prompts
    spread = p.weight.shape[0] ** -0.5  # the RMS of one token's row, most of which is near 0
    weight, hidden = float(p.weight.abs().max()), float(p.hidden.abs().max())
    return {
        "loss": (loss, loss),
        "logps": (logp, logp),
        "chosen_rewards": (loss, loss),
        "rejected_rewards": (loss, loss),
        "margins": (loss, loss),
        "dhidden": (coef * weight, coef * weight * spread),
        "dweight": (coef * hidden, coef * hidden * spread),
        "dbias": (coef, coef * spread),
    }


def assert_near(found: Results, exact: Results, p: Problem, bound: float, gradients: float | None = None) -> None:
    """Results must be complete and finite, with (max, RMS) errors within ``bound`` (or ``gradients``) of the terms."""
    assert found.keys() == exact.keys()
    sizes = terms(p, exact)
    for name, expected in exact.items():
        expected, value = expected.double(), found[name].double()
        assert value.isfinite().all(), f"{name} is not finite"
        error, allowed = value - expected, bound if name in RESULTS or gradients is None else gradients
        for kind, measure, size in zip(("max", "RMS"), (largest, rms), sizes[name], strict=True):
            ratio = measure(error) / max(measure(expected), size)
            assert ratio <= allowed, f"{name}: {kind} error {ratio:.2e}, allowed {allowed:.2e}"


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max())


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


# ------------------------------------------------------------------------------------------- against the reference


@examples(120)
@given(cases(), st.sampled_from([1.0, -0.7]))
def test_fp64_is_the_reference(case: Case, upstream: float) -> None:
    """Checks the formulas to the last digits: staging and the order of summation must not show."""
    p = case.build()
    exact = run(naive_d2o_loss, p, torch.float64, frozen=case.frozen, upstream=upstream)
    found = run(
        fused_d2o_loss,
        p,
        torch.float64,
        frozen=case.frozen,
        upstream=upstream,
        workspace_bytes=case.workspace(torch.float64),
    )
    assert_near(found, exact, p, 1e-12)


@examples(80)
@given(cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_every_dtype_is_near_the_reference_and_repeats_its_bits(case: Case, dtype: torch.dtype) -> None:
    p = case.build()
    exact = run(naive_d2o_loss, p, torch.float64, through=dtype, frozen=case.frozen)
    found, again = (
        run(fused_d2o_loss, p, dtype, frozen=case.frozen, workspace_bytes=case.workspace()) for _ in range(2)
    )
    # 16-bit gradients are rounded once for the products, once between two stages, and once when they are returned.
    assert_near(found, exact, p, 3e-6, {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}[dtype])
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.slow
@examples(12)
@given(cases(), st.sampled_from([torch.float32, torch.float16]))
def test_the_triton_path_is_near_the_reference(device: torch.device, case: Case, dtype: torch.dtype) -> None:
    """The problems are few and small, since the kernels are interpreted without a GPU."""
    case = replace(case, lengths=[group[:4] for group in case.lengths[:2]])
    case = replace(case, rows=min(case.rows, sum(map(sum, case.lengths))))
    p = case.build()
    exact = run(naive_d2o_loss, p, torch.float64, through=dtype, frozen=case.frozen)
    p = replace(
        p,
        **{name: getattr(p, name).to(device) for name in ("hidden", "weight", "targets", "ref_logps")},
        bias=None if p.bias is None else p.bias.to(device),
    )
    found = run(fused_d2o_loss, p, dtype, frozen=case.frozen, backend="triton", workspace_bytes=case.workspace())
    found = {name: value.cpu() for name, value in found.items()}
    assert_near(found, exact, p, 3e-6, 3e-6 if dtype == torch.float32 else 1.5e-3)


@examples(60)
@given(cases(plain=True), st.data())
def test_linear_logprob_is_the_reference(case: Case, data: st.DataObject) -> None:
    """Upstream gradients are arbitrary, including zeros and both signs."""
    p = case.build()
    N = p.layout.num_tokens
    scale, cap = data.draw(st.sampled_from([1.0, 0.3])), data.draw(st.sampled_from([None, 2.0]))
    upstream = torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=N, max_size=N)), dtype=torch.float64)

    def gradients(function: Any, **extra: Any) -> Results:
        leaves = {"dhidden": p.hidden, "dweight": p.weight} | ({} if p.bias is None else {"dbias": p.bias})
        leaves = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
        logps = function(
            leaves["dhidden"],
            leaves["dweight"],
            p.targets,
            bias=leaves.get("dbias"),
            softcap=cap,
            logit_scale=scale,
            **extra,
        )
        logps.backward(upstream)
        return {"logps": logps.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    exact = gradients(naive_linear_logprob)
    found = gradients(linear_logprob, workspace_bytes=case.workspace(torch.float64))
    assert (found["logps"] <= 1e-12).all()
    for name, expected in exact.items():
        size = max(largest(expected), 1.0 if name == "logps" else largest(p.hidden) + largest(p.weight))
        assert largest(found[name] - expected) <= 1e-12 * size, name


# --------------------------------------------------------------------------------------- changes without an effect


@examples(50)
@given(cases(), st.data())
def test_any_workspace_gives_the_same_within_rounding(case: Case, data: st.DataObject) -> None:
    p = case.build()
    other = replace(case, rows=data.draw(st.integers(1, p.layout.num_tokens), label="other rows"))
    first, second = (
        run(fused_d2o_loss, p, torch.float32, frozen=c.frozen, workspace_bytes=c.workspace()) for c in (case, other)
    )
    assert_near(first, second, p, 4e-6)


def reordered(p: Problem, order: list[list[int]]) -> tuple[Problem, torch.Tensor]:
    """The problem whose prompt ``g`` has the responses ``order[g]`` (repetitions allowed), and the tokens it uses."""
    lengths, tokens, responses = [], [], []
    for g, picked in enumerate(order):
        first = p.layout.cu_groups[g]
        spans = [(p.layout.cu_seqlens[first + s], p.layout.cu_seqlens[first + s + 1]) for s in picked]
        lengths.append([b - a for a, b in spans])
        tokens += [torch.arange(a, b) for a, b in spans]
        responses += [first + s for s in picked]
    index = torch.cat(tokens)
    layout = ResponseLayout.from_lengths(lengths)
    refs = p.ref_logps[torch.tensor(responses)]
    moved = replace(p, hidden=p.hidden[index], targets=p.targets[index], layout=layout, ref_logps=refs)
    return moved, index


@examples(50)
@given(cases(), st.data())
def test_the_order_of_anchors_does_not_matter(case: Case, data: st.DataObject) -> None:
    p = case.build()
    order = [[0, *data.draw(st.permutations(range(1, len(group))))] for group in case.lengths]
    moved, index = reordered(p, order)
    workspace = case.workspace(torch.float64)
    first = run(fused_d2o_loss, p, torch.float64, frozen=case.frozen, workspace_bytes=workspace)
    second = run(fused_d2o_loss, moved, torch.float64, frozen=case.frozen, workspace_bytes=workspace)
    if "dhidden" in first:
        first["dhidden"] = first["dhidden"][index]
    del first["logps"], second["logps"]  # per response, in another order
    assert_same(second, first, p)


def assert_same(found: Results, expected: Results, p: Problem, bound: float = 1e-12) -> None:
    """``assert_near`` for results without ``logps``."""
    logps = p.ref_logps.double()
    assert_near(found | {"logps": logps}, expected | {"logps": logps}, p, bound)


@examples(50)
@given(cases(), st.integers(2, 3))
def test_duplicated_anchors_change_nothing(case: Case, times: int) -> None:
    """The anchors are averaged: K anchors repeated ``times`` count as K, and K identical ones as one."""
    p = case.build()
    order = [[0, *list(range(1, len(group))) * times] for group in case.lengths]
    more, index = reordered(p, order)
    workspace = case.workspace(torch.float64)
    expected = run(fused_d2o_loss, p, torch.float64, frozen=case.frozen, workspace_bytes=workspace)
    found = run(fused_d2o_loss, more, torch.float64, frozen=case.frozen, workspace_bytes=workspace)
    if "dhidden" in found:  # the copies share the gradient of the token that they copy
        found["dhidden"] = torch.zeros_like(expected["dhidden"]).index_add_(0, index, found["dhidden"])
    del found["logps"], expected["logps"]
    assert_same(found, expected, p)


@examples(40)
@given(cases(plain=True), st.sampled_from([1.0, -30.0, 1000.0]))
def test_a_shift_of_all_logits_changes_nothing(case: Case, shift: float) -> None:
    """The bias makes the shift; since nothing depends on it, dBias sums to zero."""
    p = replace(case, bias=True).build()
    workspace = case.workspace(torch.float64)
    expected = run(fused_d2o_loss, p, torch.float64, workspace_bytes=workspace)
    assert p.bias is not None
    found = run(fused_d2o_loss, replace(p, bias=p.bias.double() + shift), torch.float64, workspace_bytes=workspace)
    assert_near(found, expected, p, 1e-10)  # fp64 numbers near 1000 are 1e-13 apart
    assert abs(found["dbias"].sum()) <= 1e-10 * terms(p, expected)["dbias"][0] * p.layout.num_tokens


@examples(40)
@given(cases(), st.data())
def test_an_accumulated_batch_is_the_whole_batch(case: Case, data: st.DataObject) -> None:
    """Several calls, each with the number of all prompts, give losses and gradients that add up to one call's."""
    G = len(case.lengths)
    assume(G > 1)
    p = case.build()
    prompts = p.options["num_prompts"] or G
    p.options["num_prompts"] = prompts
    cut = data.draw(st.integers(1, G - 1), label="prompts in the first call")
    workspace = case.workspace(torch.float64)
    whole = run(fused_d2o_loss, p, torch.float64, frozen=case.frozen, workspace_bytes=workspace)
    parts = []
    for first, last in ((0, cut), (cut, G)):
        a, b = p.layout.token_range(first)[0], p.layout.token_range(last - 1)[1]
        s0, s1 = p.layout.cu_groups[first], p.layout.cu_groups[last]
        part = replace(
            p,
            hidden=p.hidden[a:b],
            targets=p.targets[a:b],
            ref_logps=p.ref_logps[s0:s1],
            layout=ResponseLayout.from_lengths(case.lengths[first:last]),
        )
        parts.append(run(fused_d2o_loss, part, torch.float64, frozen=case.frozen, workspace_bytes=workspace))
    summed = {}
    for name in whole:
        per_prompt = name in ("logps", "chosen_rewards", "rejected_rewards", "margins", "dhidden")
        values = [part[name] for part in parts]
        summed[name] = torch.cat(values) if per_prompt else sum(values)
    assert_near(summed, whole, p, 1e-12)


# ------------------------------------------------------------------------------------------------- extreme logits

KINDS = ("+1e4", "-1e4", "target dominates", "another dominates", "all equal", "spread")


@st.composite
def extremes(draw: st.DrawFn) -> tuple[list[str], int, int, int, int]:
    """(kind of each of the 2 or more rows, V, target, tokens masked at the end of the vocabulary, rows)."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=2, max_size=6))
    V = draw(st.integers(2, 40))
    masked = draw(st.integers(0, V - 2))
    return kinds, V, draw(st.integers(0, V - masked - 1)), masked, draw(st.integers(1, len(kinds)))


def extreme_row(kind: str, V: int, target: int, masked: int) -> torch.Tensor:
    row = torch.zeros(V)
    other = (target + 1) % (V - masked)
    if kind in ("+1e4", "-1e4"):
        row += float(kind)
    elif kind == "target dominates":
        row[target] = 1e4
    elif kind == "another dominates":
        row[other] = 1e4
    elif kind == "spread":
        row = torch.linspace(-1e4, 1e4, V).round()
    return row


@pytest.mark.slow
@examples(100)
@given(extremes(), st.sampled_from(["torch", "triton"]), st.sampled_from([torch.float32, torch.bfloat16]))
@example((["+1e4", "another dominates"], 40, 0, 38, 1), "triton", torch.float32)  # one token left beside the target
def test_extreme_logits(
    device: torch.device, drawn: tuple[list[str], int, int, int, int], backend: str, dtype: torch.dtype
) -> None:
    """Results are finite and right: every logit is exact in fp32, and a bias of -inf masks the vocabulary."""
    kinds, V, target, masked, rows = drawn
    N = len(kinds)
    logits = torch.stack([extreme_row(kind, V, target, masked) for kind in kinds]).to(dtype).float()
    bias = torch.zeros(V)
    bias[V - masked :] = float("-inf")
    targets, layout = torch.full((N,), target), ResponseLayout.from_lengths([[1, N - 1]])
    exact_logps = (logits + bias).double().log_softmax(1)[:, target]
    refs = torch.stack([exact_logps[0], exact_logps[1:].sum()]).float() + torch.tensor([1.0, -1.0])
    p = Problem(torch.eye(N), logits.T.contiguous(), bias, targets, layout, refs)
    exact = run(naive_d2o_loss, p, torch.float64)
    p = Problem(*(x.to(device) for x in (p.hidden, p.weight, p.bias, targets)), layout, refs.to(device))
    found = run(fused_d2o_loss, p, dtype, backend=backend, workspace_bytes=4 * V * rows)
    found = {name: value.cpu().double() for name, value in found.items()}
    assert all(value.isfinite().all() for value in found.values())
    assert torch.allclose(found["logps"], exact["logps"], rtol=1e-6, atol=1e-6)
    # fp32 holds 1e4, and a log-sum-exp near it, to 1e-3.
    slack = 1e-3 + (0.0 if dtype == torch.float32 else 2**-7)
    coef = 0.1
    for name, unit in (("dweight", coef), ("dbias", coef * N)):
        assert largest(found[name] - exact[name]) <= slack * unit, name
        assert (found[name][V - masked :] == 0).all(), f"{name} of masked tokens"
    assert largest(found["dhidden"] - exact["dhidden"]) <= slack * coef * 2e4


# ------------------------------------------------------------------------------------------------------- refusals


@examples(40)
@given(batches, st.data())
def test_a_response_without_tokens_is_refused_by_number(lengths: list[list[int]], data: st.DataObject) -> None:
    g = data.draw(st.integers(0, len(lengths) - 1))
    s = data.draw(st.integers(0, len(lengths[g]) - 1))
    lengths = [list(group) for group in lengths]
    lengths[g][s] = 0
    number = sum(map(len, lengths[:g])) + s
    with pytest.raises(ValueError, match=rf"response {number} has 0 tokens .* every response needs at least one"):
        ResponseLayout.from_lengths(lengths)


@examples(40)
@given(batches, st.data())
def test_a_prompt_without_anchors_or_responses_is_refused_by_number(
    lengths: list[list[int]], data: st.DataObject
) -> None:
    g = data.draw(st.integers(0, len(lengths) - 1))
    left = data.draw(st.integers(0, 1))
    lengths = [group[: left if i == g else None] for i, group in enumerate(lengths)]
    message = rf"prompt {g} has {left} response\(s\); it needs its negative and at least one anchor"
    if lengths == [[]]:
        message = "cu_seqlens must start at 0 and describe at least one entry"
    with pytest.raises(ValueError, match=message):
        ResponseLayout.from_lengths(lengths)


@pytest.mark.parametrize(
    ("cu_seqlens", "cu_groups", "message"),
    [
        ([0, 2, 5], [0], "cu_groups must start at 0 and describe at least one entry"),  # no prompt
        ([], [], "cu_seqlens must start at 0"),
        ([1, 2, 5], [0, 2], "cu_seqlens must start at 0"),  # probably lengths instead of offsets
        ([0, 5, 2], [0, 2], "response 1 has -3 tokens"),
        ([0, 2, 5, 6], [0, 2], "cu_groups ends at 2 but cu_seqlens describes 3 responses"),
        ([0, 2, 5], [0, 3], "cu_groups ends at 3 but cu_seqlens describes 2 responses"),
        (torch.tensor([[0, 2, 5]]), [0, 2], "one-dimensional"),
        (torch.tensor([0.0, 2.0, 5.0]), [0, 2], "integer type"),
        (torch.tensor([False, True, True]), [0, 2], "integer type"),
    ],
)
def test_offsets_that_describe_no_batch_are_refused(cu_seqlens: Any, cu_groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResponseLayout(cu_seqlens, cu_groups)


def test_offsets_on_a_device_are_refused() -> None:
    with pytest.raises(TypeError, match="cu_seqlens is on meta: pass it as a list or a CPU tensor"):
        ResponseLayout(torch.tensor([0, 2, 5], device="meta"), [0, 2])

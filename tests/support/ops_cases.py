"""Random problems for the operations, and their results by any function in any dtype.

Shapes: N response tokens, V vocabulary, H hidden, S responses, G prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from d2o_fast import D2OOutput, ResponseLayout
from helpers import relative_errors


@dataclass
class Problem:
    """Inputs of ``fused_d2o_loss``; ``options`` are its keyword arguments."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    layout: ResponseLayout
    ref_logps: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)


def problem(
    lengths: list[list[int]], V: int = 103, H: int = 17, *, bias: bool = False, seed: int = 0, **options: Any
) -> Problem:
    """An fp32 problem: logits of spread about 1.5, and references so near that sigmoid(-z) is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    layout = ResponseLayout.from_lengths(lengths)
    hidden = torch.randn(layout.num_tokens, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * (1.5 / H**0.5)
    targets = torch.randint(V, (layout.num_tokens,), generator=generator)
    sizes = torch.tensor(layout.cu_seqlens).diff()
    ref_logps = -sizes * (torch.log(torch.tensor(V)) + 1) + torch.randn(layout.num_responses, generator=generator)
    return Problem(
        hidden,
        weight,
        torch.randn(V, generator=generator) if bias else None,
        targets,
        layout,
        ref_logps,
        options,
    )


def run(
    function: Any,
    p: Problem,
    dtype: torch.dtype = torch.float32,
    *,
    through: torch.dtype | None = None,
    frozen: tuple[str, ...] = (),
    upstream: float = 1.0,
    **extra: Any,
) -> dict[str, torch.Tensor]:
    """Results and gradients of a D2O function on ``p`` in ``dtype``.

    ``through``: the inputs are first rounded to this dtype, so that fp64 and bf16 get the same numbers.
    """
    inputs = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias}
    leaves = {}
    for name, tensor in inputs.items():
        if tensor is not None:
            rounded = tensor.detach().to(through or dtype).to(dtype)
            leaves[name] = rounded.clone().requires_grad_(name not in frozen)
    bias = {"bias": leaves["bias"]} if "bias" in leaves else {}
    ref_logps = p.ref_logps.to(torch.promote_types(dtype, torch.float32))
    out: D2OOutput = function(
        leaves["hidden"], leaves["weight"], p.targets, p.layout, ref_logps, **bias, **{**p.options, **extra}
    )
    (out.loss * upstream).backward()
    results = {name: getattr(out, name).detach() for name in RESULTS}
    return results | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


RESULTS = ("loss", "logps", "chosen_rewards", "rejected_rewards", "margins")


def assert_all_close(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], bound: float) -> None:
    """Every result must be within ``bound`` of ``exact`` in both measures, and none may be missing."""
    assert found.keys() == exact.keys()
    for name in exact:
        worst = max(relative_errors(found[name], exact[name]))
        assert worst <= bound, f"{name}: {worst:.2e}, allowed {bound:.2e}"

"""Probes of what training and scoring assume of a model, on a few tokens of a real row.

Nothing in a model of transformers says reliably whether it is causal, whether it draws at random in evaluation mode or
changes itself in its forward. So two short forwards show it.

Shapes: R rows, T tokens of a row, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2o_fast.errors import D2OError
from d2o_fast.loss.matmul import exact_products
from d2o_fast.model.dropout import own_modules
from d2o_fast.model.parts import evaluating, head_of, vocabulary_size

TOKENS = 32  #: most tokens of a probe
#: Probes on other tokens before a model is refused. A rounding error may send a token to another expert of a
#: mixture-of-experts model and so look like a fault, but hardly three times.
TRIES = 3


@contextlib.contextmanager
def exact(model: Any) -> Iterator[None]:
    """Evaluation mode and full fp32 inside, without gradients; the generators keep their states.

    Attention with "flash" in its name takes no fp32, and runs under bf16 autocast.
    """
    device = next(model.parameters()).device
    flash = "flash" in str(model.config._attn_implementation)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        exact_products(device, torch.float32),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=flash),
        torch.no_grad(),
        evaluating(model),
    ):
        yield


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest RMS difference of two rows (of the last dimension), in units of the RMS of ``wanted``. 0 if empty."""
    if not found.numel():
        return 0.0
    difference = (found.double() - wanted.double()).square().mean(-1).sqrt().max()
    return (difference / wanted.double().square().mean().sqrt().clamp_min(1e-30)).item()


def rounding(model: nn.Module, found: Tensor) -> float:
    """The largest ``distance`` that rounding may cause."""
    half = found.dtype.itemsize < 4 or torch.is_autocast_enabled(found.device.type)
    return 3e-2 if half or any(p.dtype.itemsize < 4 for p in model.parameters()) else 1e-3


def refuse_non_finite(model: nn.Module) -> None:
    """Refuses weights that are NaN or infinite, before comparisons blame something else for them.

    Raises:
        D2OError: a parameter holds such a value.
    """
    named = [(name, p.detach()) for name, p in model.named_parameters() if p.numel() and p.is_floating_point()]
    # aminmax keeps NaN, and needs a tenth of the time of isfinite and no memory. One copy from the device.
    finite = torch.stack([torch.stack(torch.aminmax(p)).isfinite().all() for _, p in named]).tolist()
    bad = [name for (name, _), good in zip(named, finite, strict=True) if not good]
    if bad:
        raise D2OError(
            f"{_name(model)}: {len(bad)} of its {len(named)} parameters hold values that are NaN or infinite (the "
            f"first: {bad[0]}). Its file is damaged or its training went wrong: take other weights"
        )


def refuse_unfit(model: nn.Module, decoder: nn.Module, ids: Sequence[int], pad: int, quiet: bool = False) -> None:
    """Refuses a model whose hidden states depend on more than the tokens up to their position.

    Args:
        ids: tokens of a real row, at least two.
        pad: the token that fills rows on the right.
        quiet: whether training mode must also give these hidden states, and leave the weights alone.

    Raises:
        D2OError: the model is not causal, draws at random, mixes the rows of a batch or keeps a state between calls;
            its training mode differs; its weights or hidden states are not finite; its forward fails.
    """
    refuse_non_finite(model)
    faults: list[str] = []
    for start in range(max(1, min(TRIES, len(ids) - 1))):
        row = list(ids[start : start + TOKENS])
        try:
            with exact(model):
                fault = _fault(model, decoder, row, pad) or (_fault_in_training(model, decoder, row) if quiet else None)
        except Exception as error:  # a model may raise anything
            raise D2OError(f"{_name(model)} fails on a few tokens ({type(error).__name__}: {error})") from error
        if fault is None:
            return
        faults.append(fault)
    raise D2OError(f"{_name(model)} {faults[0]}")


def _fault(model: nn.Module, decoder: nn.Module, row: list[int], pad: int) -> str | None:
    """The fault that a row shows in evaluation mode, in words that follow the model's name."""
    half, size = max(1, len(row) // 2), vocabulary_size(model)
    places = sorted({1, half, max(1, len(row) - 2), len(row) - 1})  # 1: a prefix of any length that is read whole
    changed = [row[:at] + [_other(row, token, size) for token in row[at:]] for at in places]
    first, second, *others, filled = _hidden(model, decoder, row, row, *changed, row[:half] + [pad] * (len(row) - half))
    limit = rounding(model, first)
    if not first.isfinite().all():
        return "has hidden states that are NaN or infinite, though its weights are finite: they are too large"
    apart = distance(second, first)
    if not apart <= limit:
        return f"gives two equal rows other hidden states (by {apart:.1e} of their size): it draws at random"
    for at, other in zip(places, others, strict=True):
        apart = distance(other[:at], first[:at])
        if not apart <= limit:
            return (
                f"is not causal: hidden states change by {apart:.1e} of their size if a later token changes, so it "
                "would read the tokens that it is scored on. Use a causal language model, or another "
                "attn_implementation"
            )
    (alone,) = _hidden(model, decoder, row[:half])
    apart = max(distance(found, first[:half]) for found in (filled[:half], alone))
    if not apart <= limit:
        return (
            f"gives a row other hidden states (by {apart:.1e} of their size) if padding follows it, if other rows are "
            "beside it or if the model read others before. Rows must be independent for their scores to be right"
        )
    return None


def _fault_in_training(model: nn.Module, decoder: nn.Module, row: list[int]) -> str | None:
    """The same in training mode, with an adapter in evaluation mode."""
    (expected,) = _hidden(model, decoder, row)
    before = {name: p._version for name, p in model.named_parameters()}
    try:
        for _, module in own_modules(model):
            module.training = True
        (found,) = _hidden(model, decoder, row)
    finally:
        model.eval()
    written = {name: p.clone() for name, p in model.named_parameters() if p._version != before[name]}
    _hidden(model, decoder, row)
    for name, parameter in model.named_parameters():
        if name in written and not parameter.equal(written[name]):
            return (
                f"changes its own weights ({name}) in a forward of evaluation mode, so the saved ones would depend on "
                "the mode (RWKV: set rescale_every to 0 in its config.json)"
            )
    apart = distance(found, expected)
    if not apart <= rounding(model, expected):
        return (
            f"gives other hidden states (by {apart:.1e} of their size) in training mode than in evaluation mode, where "
            "its references are scored. Set the dropout or noise in its config.json to 0, or disable_dropout to false"
        )
    return None


def _name(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def _hidden(model: nn.Module, decoder: nn.Module, *rows: list[int]) -> Tensor:
    ids = torch.tensor(rows, device=head_of(model).weight.device)
    return decoder(input_ids=ids, use_cache=False).last_hidden_state


def _other(row: Sequence[int], token: int, size: int) -> int:
    """Another token of the row; the next id if there is no other."""
    return next((other for other in reversed(row) if other != token), (token + 1) % size)

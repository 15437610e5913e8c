"""Comparisons with a reference in higher precision, and how long a child process may take."""

from __future__ import annotations

import pytest
import torch

DEADLINE = 1800.0  #: seconds; no test waits for it: a child that is not done by then hangs, however busy the machine


def relative_errors(actual: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(max, RMS) of ``actual - reference``, relative to the largest and to the RMS of ``reference``.

    Infinities must be equal and in the same places. The errors leave them out.

    Raises:
        AssertionError: another shape, a NaN, or an infinity on one side only.
    """
    actual, reference = actual.detach().double().cpu(), reference.detach().double().cpu()
    assert actual.shape == reference.shape, f"shape {tuple(actual.shape)} instead of {tuple(reference.shape)}"
    assert not actual.isnan().any(), f"{int(actual.isnan().sum())} of {actual.numel()} values are NaN"
    finite = reference.isfinite()
    assert torch.equal(actual[~finite], reference[~finite]), "other values where the reference is infinite"
    assert actual[finite].isfinite().all(), "infinite where the reference is finite"
    if not finite.any():
        return 0.0, 0.0
    error, scale = (actual - reference)[finite], reference[finite]
    tiny = torch.finfo(torch.float64).tiny
    largest = error.abs().max() / scale.abs().max().clamp_min(tiny)
    rms = error.square().mean().sqrt() / scale.square().mean().sqrt().clamp_min(tiny)
    return float(largest), float(rms)


def assert_close(actual: torch.Tensor, reference: torch.Tensor, largest: float, rms: float | None = None) -> None:
    """Both errors of ``relative_errors`` must be within their bounds; ``rms`` defaults to the bound of ``largest``."""
    found = relative_errors(actual, reference)
    bounds = (largest, largest if rms is None else rms)
    assert all(error <= bound for error, bound in zip(found, bounds, strict=True)), (
        f"relative error (max, RMS) = ({found[0]:.2e}, {found[1]:.2e}), allowed ({bounds[0]:.2e}, {bounds[1]:.2e})"
    )


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``torch.empty`` and ``torch.empty_like`` return NaN in floating point, so that unwritten elements show."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            result = _original(*args, **kwargs)
            return result.fill_(float("nan")) if result.is_floating_point() else result

        monkeypatch.setattr(torch, name, poisoned)

"""The positions of prompts and responses in a packed batch.

Shapes: N response tokens in the batch, S responses, G prompts (groups), K anchors of one prompt.
Responses are packed back to back without padding. Prompt ``g`` owns the responses from ``cu_groups[g]`` up to, not
including, ``cu_groups[g+1]``: the negative first, then its anchors.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class ResponseLayout:
    """Host-side description of a packed batch of G prompts, each with one negative and its K anchors.

    Args:
        cu_seqlens: S + 1 offsets into the N packed tokens, starting at 0 and strictly increasing (as in
            FlashAttention's varlen calls). A sequence of ints or an integer tensor on the CPU.
        cu_groups: G + 1 offsets into the S responses, starting at 0.
        min_anchors: fewest anchors of a prompt: 1 for D2O; 0 for NPO and gradient ascent, which use negatives alone.

    Raises:
        TypeError: offsets on a device; reading them would force a synchronisation.
        ValueError: offsets that are not increasing from 0, an empty response, a prompt without an anchor, no prompt.
    """

    cu_seqlens: tuple[int, ...]
    cu_groups: tuple[int, ...]
    _cache: dict[tuple[str, torch.device], torch.Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __init__(
        self,
        cu_seqlens: Sequence[int] | torch.Tensor,
        cu_groups: Sequence[int] | torch.Tensor,
        *,
        min_anchors: int = 1,
    ) -> None:
        object.__setattr__(self, "cu_seqlens", _host_offsets(cu_seqlens, "cu_seqlens"))
        object.__setattr__(self, "cu_groups", _host_offsets(cu_groups, "cu_groups"))
        object.__setattr__(self, "_cache", {})
        if self.cu_seqlens[-1] >= 2**31:
            raise ValueError(f"cu_seqlens: {self.cu_seqlens[-1]} tokens; a batch can hold at most 2**31 - 1")
        for s, (start, end) in enumerate(zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)):
            if end <= start:
                raise ValueError(
                    f"cu_seqlens: response {s} has {end - start} tokens ({start} to {end}); "
                    "every response needs at least one"
                )
        for g, (start, end) in enumerate(zip(self.cu_groups, self.cu_groups[1:], strict=False)):
            if end - start < 1 + min_anchors:
                raise ValueError(
                    f"cu_groups: prompt {g} has {end - start} response(s); "
                    f"it needs its negative and at least {'one anchor' if min_anchors == 1 else min_anchors}"
                )
        if self.cu_groups[-1] != len(self.cu_seqlens) - 1:
            raise ValueError(
                f"cu_groups ends at {self.cu_groups[-1]} but cu_seqlens describes {len(self.cu_seqlens) - 1} responses"
            )

    @classmethod
    def from_lengths(cls, lengths: Sequence[Sequence[int]], *, min_anchors: int = 1) -> ResponseLayout:
        """The layout for ``lengths[g] = [negative, anchor_1, .. anchor_K]``, the tokens of prompt ``g``'s responses."""
        cu_seqlens, cu_groups = [0], [0]
        for group in lengths:
            for length in group:
                cu_seqlens.append(cu_seqlens[-1] + operator.index(length))
            cu_groups.append(cu_groups[-1] + len(group))
        return cls(cu_seqlens, cu_groups, min_anchors=min_anchors)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.cu_seqlens[-1]

    @property
    def num_responses(self) -> int:
        """S."""
        return len(self.cu_seqlens) - 1

    @property
    def num_prompts(self) -> int:
        """G."""
        return len(self.cu_groups) - 1

    @property
    def num_anchors(self) -> tuple[int, ...]:
        """K of each prompt, (G,)."""
        return tuple(b - a - 1 for a, b in zip(self.cu_groups, self.cu_groups[1:], strict=False))

    def token_range(self, g: int) -> tuple[int, int]:
        """(first packed token of prompt ``g``, one past its last)."""
        return self.cu_seqlens[self.cu_groups[g]], self.cu_seqlens[self.cu_groups[g + 1]]

    def tensor(self, name: str, device: torch.device | str) -> torch.Tensor:
        """An index tensor on ``device``, made once per device and copied without a synchronisation.

        ``cu_seqlens`` (S+1,) int32; ``cu_groups`` (G+1,) int32; ``token_response`` (N,) int64: the response of each
        token; ``response_group`` (S,) int64: the prompt of each response; ``is_negative`` (S,) bool;
        ``num_anchors`` (G,) fp32.
        """
        device = torch.device(device)
        key = (name, device)
        if key not in self._cache:
            self._cache[key] = on_device(self._host_tensor(name), device)
        return self._cache[key]

    def _host_tensor(self, name: str) -> torch.Tensor:
        cu_seqlens, cu_groups = torch.tensor(self.cu_seqlens), torch.tensor(self.cu_groups)
        if name == "cu_seqlens":
            return cu_seqlens.int()
        if name == "cu_groups":
            return cu_groups.int()
        if name == "token_response":
            return torch.repeat_interleave(torch.arange(self.num_responses), cu_seqlens.diff())
        if name == "response_group":
            return torch.repeat_interleave(torch.arange(self.num_prompts), cu_groups.diff())
        if name == "is_negative":
            negative = torch.zeros(self.num_responses, dtype=torch.bool)
            negative[cu_groups[:-1]] = True
            return negative
        if name == "num_anchors":
            return torch.tensor(self.num_anchors, dtype=torch.float32)
        raise KeyError(name)


def on_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``host`` on ``device``. The copy to CUDA starts from pinned memory and is not waited for."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _host_offsets(offsets: Sequence[int] | torch.Tensor, name: str) -> tuple[int, ...]:
    if isinstance(offsets, torch.Tensor):
        if offsets.device.type != "cpu":
            raise TypeError(
                f"{name} is on {offsets.device}: pass it as a list or a CPU tensor. The lengths are known on the host "
                "when the batch is built, and reading them back from a device would stall the step"
            )
        if offsets.dim() != 1 or offsets.is_floating_point() or offsets.is_complex() or offsets.dtype == torch.bool:
            raise ValueError(
                f"{name} must be one-dimensional and of an integer type, not {offsets.dtype} {tuple(offsets.shape)}"
            )
        offsets = offsets.tolist()
    values = tuple(int(v) for v in offsets)
    if len(values) < 2 or values[0] != 0:
        raise ValueError(f"{name} must start at 0 and describe at least one entry, got {list(values[:4])}")
    return values

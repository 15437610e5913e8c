"""Decides whether one pass over a prompt can serve all its responses, and proves that the result is exact.

``forward/hook.py`` puts the attention of a shared row into unmodified models of transformers. Some models ignore it,
some carry a state from token to token outside it, and some drop its arguments. None of them reports this, so
``verify`` runs before the first use.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Example
from d2o_fast.errors import D2OError
from d2o_fast.forward.batch import PackedBatch, pack, pack_shared, response_hidden, shared_arguments
from d2o_fast.forward.hook import Call, SharingRefused, install
from d2o_fast.forward.shared_sequence import SharedSequence
from d2o_fast.loss.ops import linear_logprob
from d2o_fast.model.parts import autocast, base_of, evaluating, head_of
from d2o_fast.model.probes import refuse_unfit

logger = logging.getLogger("d2o_fast")

_said: set[str] = set()


class Sharing(NamedTuple):
    """Whether prompts are shared, and the name of the attention that runs or the reason against sharing."""

    on: bool
    text: str


def choose_sharing(
    model: nn.Module,
    decoder: nn.Module,
    examples: Sequence[Example],
    config: D2OConfig,
    pad: int,
    training: bool = False,
) -> Sharing:
    """Decides whether each prompt is read once for all its responses. Logs the result, the same text only once.

    Args:
        examples: the first one is used for the comparison, and for the probes of ``model/probes.py``.
        training: whether the model runs in training mode, where responses would share their dropout.

    Raises:
        D2OError: sharing is not exact, but ``config.shared_prefix`` is true; the model fails a probe.
    """
    for example in examples[:1]:
        row = [*example.prompt_ids, *example.rejected_ids]
        refuse_unfit(model, decoder, row, pad, quiet=training and config.disable_dropout)
    base = base_of(model)
    plain = f"one row per response ({base.config._attn_implementation})"
    if config.shared_prefix is False:
        return _say(Sharing(False, f"{plain}, as shared_prefix is false"))
    previous = base.config._attn_implementation
    try:
        kernels = verify(model, decoder, examples[:1], config, pad, training)
    except SharingRefused as refusal:
        if previous == "eager":
            base.set_attn_implementation(previous)
        reason = f"prompts cannot be shared by {type(base).__name__}: {refusal}"
        if config.shared_prefix is True:
            raise D2OError(f"shared_prefix is true, but {reason}. Set it to auto or false") from refusal
        return _say(Sharing(False, f"{plain}; {reason}"))
    return _say(Sharing(True, f"one pass per prompt ({', '.join(kernels)})"))


def _say(sharing: Sharing) -> Sharing:
    if sharing.text not in _said:
        _said.add(sharing.text)
        logger.log(logging.INFO if sharing.on else logging.WARNING, "attention: %s", sharing.text)
    return sharing


# --- The proof -----------------------------------------------------------------------------------------------------


def verify(
    model: nn.Module, decoder: nn.Module, examples: Sequence[Example], config: D2OConfig, pad: int, training: bool
) -> list[str]:
    """Checks that sharing is exact for this model and these examples. Returns the names of the attention paths.

    Raises:
        SharingRefused: sharing is not exact.
    """
    if training:
        for name, module in decoder.named_modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                raise SharingRefused(f"{name} has a dropout of {module.p:g}, which its responses would share")
    install(model)
    device = head_of(model).weight.device
    mode = _training(model) if training else evaluating(model)
    with mode, torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _probe(model, decoder, device, config)
    with evaluating(model), torch.no_grad():
        return _compare(model, decoder, examples, config, pad)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode inside; afterwards every submodule is back in its previous mode."""
    with evaluating(model):
        model.train()
        try:
            yield
        finally:
            model.eval()


def _probe(model: nn.Module, decoder: nn.Module, device: torch.device, config: D2OConfig) -> None:
    """Checks that every layer makes one attention call with its configured window, and that responses do not mix."""
    settings = base_of(model).config.get_text_config()
    sequence = SharedSequence((3, 2), ((4, 3), (2, 5)), seen=[])
    tokens = torch.arange(sum(sequence.prompts) + 14) * 7 % (head_of(model).weight.shape[0] - 1) + 1
    changed = tokens.clone()
    changed[5:9] = tokens[5:9].roll(1)  # the first response of the first prompt
    try:
        with autocast(config, device):
            first, second = (_forward(decoder, ids.to(device), sequence) for ids in (tokens, changed))
    except SharingRefused:
        raise
    except Exception as error:  # a model may raise anything on an unexpected call
        raise SharingRefused(f"its forward failed on a shared row ({type(error).__name__}: {error})") from error
    calls: list[Call] = sequence.seen or []
    modules = {id(call.module) for call in calls}
    layers = settings.num_hidden_layers
    if len(modules) != layers or len(calls) != 2 * layers:
        raise SharingRefused(
            f"{len(modules)} of its {layers} layers attend through transformers' AttentionInterface with the arguments "
            "of the call; the others would mix the responses"
        )
    others = torch.cat([torch.arange(5), torch.arange(9, len(tokens))]).to(device)
    difference = (first - second).index_select(1, others).abs().max().item()
    limit = 1e-5 if first.dtype == torch.float32 and config.dtype == "float32" else 1e-3
    if not difference <= limit * max(1.0, first.abs().max().item()):
        raise SharingRefused(
            f"a change in one response changes others (by {difference:.1e}): something besides attention carries "
            "over, or its forward draws at random (dropout)"
        )
    _check_windows(calls[:layers], settings)


def _forward(decoder: nn.Module, ids: torch.Tensor, sequence: SharedSequence) -> torch.Tensor:
    batch = {"input_ids": ids[None], "position_ids": sequence.position_ids()[None].to(ids.device)}
    return decoder(**batch, **shared_arguments(sequence, ids.device)).last_hidden_state


def _check_windows(calls: Sequence[Call], settings: Any) -> None:
    kinds = getattr(settings, "layer_types", None) or [None] * len(calls)
    window = getattr(settings, "sliding_window", None)
    for i, (kind, call) in enumerate(zip(kinds, calls, strict=False)):
        if kind not in (None, "full_attention", "sliding_attention"):
            raise SharingRefused(f"layer {i} is of the type '{kind}'")
        expected = window if kind != "full_attention" else None
        if call.window != expected:
            raise SharingRefused(f"layer {i} has a window of {expected}, but its attention call says {call.window}")


def _compare(
    model: nn.Module, decoder: nn.Module, examples: Sequence[Example], config: D2OConfig, pad: int
) -> list[str]:
    """Compares the log-probabilities from a shared row and from one row per response. Returns the attention paths."""
    head = head_of(model)
    device = head.weight.device

    def logps(batch: PackedBatch) -> torch.Tensor:
        hidden = response_hidden(decoder, batch)
        return linear_logprob(hidden, head.weight, batch.targets, **head.options()).double()

    def rms(found: torch.Tensor) -> float:
        return (found - exact).square().mean().sqrt().item()

    separate, shared = pack(examples, pad).to(device), pack_shared(examples, watch=True).to(device)
    exact = logps(separate)
    if not exact.isfinite().all():
        raise D2OError(
            f"{type(base_of(model)).__name__}: log-probabilities of the first prompt's tokens are not finite"
        )
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    error, limit = rms(logps(shared)), 2e-2 if tf32 else 1e-3
    if config.dtype == "bfloat16" and error <= limit:
        # bf16 moves both results. By chance the shared one may be somewhat further from fp32.
        with autocast(config, device):
            shared.shared.seen.clear()  # type: ignore[union-attr]
            error, limit = rms(logps(shared)), 2 * rms(logps(separate)) + 1e-3
    if math.isnan(error):
        raise D2OError("the log-probabilities of the first prompt's responses are not finite: the weights are damaged")
    if not error <= limit:
        raise SharingRefused(
            f"the log-probabilities of the first prompt's response tokens differ by {error:.1e} nats (RMS; at most "
            f"{limit:.1e} may come from rounding) between one pass per prompt and one row per response"
        )
    return list(dict.fromkeys(call.how for call in shared.shared.seen))  # type: ignore[union-attr]

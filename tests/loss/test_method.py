"""Consequences of the paper's equation for the reference and the fused loss, and a comparison with TRL's DPO trainer.

Shapes: N response tokens, S responses, G prompts, K anchors of one prompt.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from d2o_fast import ResponseLayout, d2o_loss, fused_d2o_loss
from d2o_fast.data.row import Example
from d2o_fast.forward.batch import pack, response_hidden
from d2o_fast.loss.reference import D2OOutput, naive_d2o_loss
from d2o_fast.model.parts import decoder_of, head_of
from helpers import DEADLINE
from ops_cases import problem
from paths import ROOT, SUPPORT
from tiny import tiny_model, tiny_rows, tiny_tokenizer

LOSSES = pytest.mark.parametrize("loss", [naive_d2o_loss, fused_d2o_loss], ids=["reference", "fused"])


def sequences(K: int, G: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, ResponseLayout]:
    """(logps (S,) with a gradient, ref_logps (S,), layout) of G prompts with K anchors, fp64."""
    draw = torch.Generator().manual_seed(seed)
    S = G * (K + 1)
    logps = -30 * torch.rand(S, generator=draw, dtype=torch.float64)
    refs = logps + 5 * torch.randn(S, generator=draw, dtype=torch.float64)
    return logps.requires_grad_(), refs, ResponseLayout.from_lengths([[1] * (K + 1)] * G)


@LOSSES
@pytest.mark.parametrize("K", [1, 11])
def test_at_the_references(loss: Any, K: int) -> None:
    """z is 0, the loss ln 2, and the gradient not zero; it would be zero if the reference followed the policy."""
    p = problem([[3] + [2, 4, 5][: 1 + K % 3] * (K // 2 + 1)] * 2)
    with torch.no_grad():
        start: D2OOutput = loss(p.hidden, p.weight, p.targets, p.layout, p.ref_logps)
    hidden = p.hidden.requires_grad_()
    out: D2OOutput = loss(hidden, p.weight, p.targets, p.layout, start.logps)
    out.loss.backward()
    assert out.margins.abs().max() < 1e-5
    assert abs(out.loss.item() - math.log(2)) < 1e-6
    assert hidden.grad is not None
    assert hidden.grad.abs().max() > 1e-3


def test_derivatives_by_a_response() -> None:
    """-(beta/K) sigmoid(-z) for an anchor and +alpha sigmoid(-z) for the negative: one unknown number per prompt."""
    for K in (1, 5, 11):
        logps, refs, layout = sequences(K)
        out = d2o_loss(logps, refs, layout, alpha=0.3, beta=0.2)
        out.loss.backward()
        w = torch.sigmoid(-out.margins) / 3
        assert logps.grad is not None
        grad = logps.grad.view(3, K + 1)
        assert torch.allclose(grad[:, 0], 0.3 * w)
        assert torch.allclose(grad[:, 1:], (-0.2 / K * w)[:, None].expand(-1, K))


def test_one_anchor_and_equal_weights_are_dpo() -> None:
    logps, refs, layout = sequences(1)
    D = logps - refs
    dpo = -F.logsigmoid(0.1 * (D[1::2] - D[::2])).mean()
    assert torch.allclose(d2o_loss(logps, refs, layout).loss, dpo, rtol=1e-12)


@LOSSES
def test_identical_anchors_count_as_one(loss: Any) -> None:
    """Averaging over K and also dividing beta by K would give eleven anchors an eleventh of one anchor's weight."""
    one = problem([[4, 3]])
    rejected, anchor = one.hidden.split([4, 3])
    targets = one.targets.split([4, 3])
    alone = loss(one.hidden, one.weight, one.targets, one.layout, one.ref_logps)
    many = loss(
        torch.cat([rejected, *[anchor] * 11]),
        one.weight,
        torch.cat([targets[0], *[targets[1]] * 11]),
        ResponseLayout.from_lengths([[4] + [3] * 11]),
        torch.cat([one.ref_logps[:1], one.ref_logps[1:].expand(11)]),
    )
    assert torch.allclose(alone.loss, many.loss, rtol=1e-6)
    assert torch.allclose(alone.margins, many.margins, rtol=1e-4)


def test_anchors_may_be_permuted() -> None:
    logps, refs, layout = sequences(5, G=1)
    order = torch.tensor([0, 3, 1, 5, 2, 4])
    assert torch.allclose(
        d2o_loss(logps, refs, layout).loss, d2o_loss(logps[order], refs[order], layout).loss, rtol=1e-12
    )


def test_without_anchors_weight_it_is_npo() -> None:
    """beta = 0 gives NPO with beta_NPO = alpha, without its factor 2 / beta_NPO."""
    logps, refs, layout = sequences(4)
    D = (logps - refs)[::5]
    npo = -(2 / 0.3) * F.logsigmoid(-0.3 * D).mean()
    assert torch.allclose(d2o_loss(logps, refs, layout, alpha=0.3, beta=0.0).loss * (2 / 0.3), npo, rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_no_more_than_the_mean_of_pairwise_dpo(seed: int) -> None:
    """Jensen: -log sigmoid is convex and z the mean of the pairs' margins."""
    logps, refs, layout = sequences(7, G=1, seed=seed)
    D = logps - refs
    pairs = -F.logsigmoid(0.1 * (D[1:] - D[0])).mean()
    assert d2o_loss(logps, refs, layout).loss < pairs


def test_log_probabilities_are_summed_not_averaged() -> None:
    p = problem([[6, 2]])
    out = naive_d2o_loss(p.hidden, p.weight, p.targets, p.layout, p.ref_logps)
    token = (p.hidden @ p.weight.T).log_softmax(-1).gather(1, p.targets[:, None]).squeeze(1)
    assert torch.allclose(out.logps, torch.stack([token[:6].sum(), token[6:].sum()]))


@pytest.mark.slow
def test_trl_dpo_trainer_computes_the_same_loss(tmp_path: Path) -> None:
    """TRL's DPOTrainer on the same model, reference and tokens: D2O at K = 1 and alpha = beta.

    It runs in a separate process: TRL sets up accelerate, which keeps global state.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(SUPPORT)}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr


def compare_with_trl(folder: str) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{**row, "chosen": f" {row['prompt']} with care"} for row in tiny_rows(6)]
    tokenizer = tiny_tokenizer()
    model, reference = tiny_model(seed=0), tiny_model(seed=1)
    args = DPOConfig(
        output_dir=folder, beta=0.3, per_device_train_batch_size=6, report_to="none", use_cpu=True, bf16=False
    )
    trainer = DPOTrainer(model, reference, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    theirs = trainer.compute_loss(model, batch)
    gradient = torch.autograd.grad(theirs, model.lm_head.weight)[0]

    # The tokens are TRL's own: chosen responses first, then the rejected ones.
    parts = []
    names = ("input_ids", "attention_mask", "completion_mask")
    for ids, attention, completion in zip(*(batch[name] for name in names), strict=True):
        prompt = int((completion.cumsum(0) == 0).sum())
        parts.append((ids[:prompt].tolist(), ids[prompt : int(attention.sum())].tolist()))
    pairs = zip(parts[:6], parts[6:], strict=True)
    examples = [Example(prompt, rejected, [chosen], []) for (prompt, chosen), (_, rejected) in pairs]
    packed = pack(examples, tokenizer.pad_token_id)

    def ours(model: Any, ref_logps: torch.Tensor) -> D2OOutput:
        hidden = response_hidden(decoder_of(model), packed)
        head = head_of(model).weight
        return fused_d2o_loss(hidden, head, packed.targets, packed.layout, ref_logps, alpha=0.3, beta=0.3)

    with torch.no_grad():
        ref_logps = ours(reference, torch.zeros(12)).logps
    out = ours(model, ref_logps)
    assert abs(out.loss.item() - math.log(2)) > 1e-3, "the two models must differ for this to say anything"
    torch.testing.assert_close(out.loss, theirs, rtol=1e-5, atol=0)
    mine = torch.autograd.grad(out.loss, model.lm_head.weight)[0]
    torch.testing.assert_close(mine, gradient, rtol=1e-3, atol=1e-6)
    print(f"TRL {theirs.item():.8f}, ours {out.loss.item():.8f}")


if __name__ == "__main__":
    compare_with_trl(sys.argv[1])

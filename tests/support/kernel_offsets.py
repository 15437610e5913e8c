"""Rows so far apart that row x stride passes 2^31 elements, in sparse files.

The kernels are interpreted, because on a GPU the memory would be real: tests/kernels/test_kernel_offsets.py runs this
file in a process that sees no GPU. tests/kernels/test_kernels_gpu.py has real sizes.
"""

from __future__ import annotations

import mmap
import tempfile

import pytest
import torch

from d2o_fast.kernels.filtered_products import filtered_products
from d2o_fast.kernels.linear_logprob import linear_logprob_forward
from d2o_fast.kernels.logit_grad import logit_grad_, logit_stats
from d2o_fast.loss.reference import naive_linear_logprob
from helpers import assert_close

FAR = 2**30 + 8  # elements between rows: the third row is beyond 2^31, and rows stay multiples of 16 bytes apart


def far_apart(values: torch.Tensor) -> torch.Tensor:
    """The same rows, FAR elements apart."""
    rows, columns = values.shape
    size = ((rows - 1) * FAR + columns) * values.element_size()
    with tempfile.TemporaryFile() as sparse:
        sparse.truncate(size)
        memory = mmap.mmap(sparse.fileno(), size)
    view = torch.frombuffer(memory, dtype=values.dtype).as_strided((rows, columns), (FAR, 1))
    view.copy_(values)
    return view


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_forward(which, dtype) -> None:
    hidden, weight, targets = normal(3, 8, dtype=dtype), normal(3, 8, seed=1, dtype=dtype), torch.tensor([2, 1, 0])
    expected = naive_linear_logprob(hidden.double(), weight.double(), targets)
    hidden, weight = (far_apart(t) if which == name else t for name, t in (("hidden", hidden), ("weight", weight)))
    assert_close(linear_logprob_forward(hidden, weight, targets)[0], expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_rows_of_logits(dtype) -> None:
    raw, targets, coef = normal(3, 40), torch.tensor([39, 1, 20]), normal(3, seed=1)
    logits = far_apart(raw)
    logps, stats = logit_stats(logits, targets)
    assert_close(stats.sum(0), raw.double().logsumexp(1), 1e-6)
    assert_close(logps, raw.double().log_softmax(1).gather(1, targets[:, None])[:, 0], 1e-6)
    onehot = torch.nn.functional.one_hot(targets, 40).double()
    grad = logit_grad_(logits, targets, stats, coef, out_dtype=dtype)
    assert_close(grad, coef.double()[:, None] * (onehot - raw.double().softmax(1)), 1e-6 + 2**-11)


@pytest.mark.parametrize("which", ["grad", "weight", "hidden", "dhidden", "dweight"])
def test_filtered_products(which) -> None:
    tensors = {
        "grad": normal(3, 3),
        "weight": normal(3, 8, seed=1),
        "hidden": normal(3, 8, seed=2),
        "dhidden": torch.zeros(3, 8),
        "dweight": torch.zeros(3, 8),
    }
    tensors["grad"][:, 1] = 0.0  # the filter drops one column, so that the others move
    exact = tensors["grad"].double()
    expected = exact @ tensors["weight"].double(), exact.T @ tensors["hidden"].double()
    tensors[which] = far_apart(tensors[which])
    # Not fresh: this would test torch's dweight.zero_(), not our kernel.
    filtered_products(coef=torch.ones(3), eps=0.0, fresh=False, **tensors)
    assert_close(tensors["dhidden"], expected[0], 1e-6)
    assert_close(tensors["dweight"], expected[1], 1e-6)

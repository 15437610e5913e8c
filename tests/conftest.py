"""Where the tests run: the kernels on CUDA if there is a device, otherwise interpreted on the CPU.

The variable must be set before anything imports Triton, which reads it while the kernels are being defined.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # here and in child processes: the number of threads decides the order of sums

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

torch.set_num_threads(1)  # a worker's torch may have been imported before


@pytest.fixture(scope="session")
def device() -> torch.device:
    """``cuda`` where there is one; otherwise ``cpu``, with the kernels interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped for want of CUDA, and for no other reason."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

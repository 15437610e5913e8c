"""Where the tests run: the kernels on CUDA if there is a device, otherwise interpreted on the CPU.

The variable must be set before anything imports Triton, which reads it while the kernels are being defined.
"""

import os
from collections.abc import Iterator

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores among them


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the child processes of a test: the number of threads decides the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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

"""Where the tests run: in one thread; the kernels on CUDA if there is a device, otherwise interpreted on the CPU.

The variables are for this process and for all that the tests start. Torch reads the number of threads when it is
imported, Triton whether to interpret while the kernels are being defined.
"""

import logging
import os
import signal

# The number of threads decides the order of sums, and processes are compared by their bits.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

for name in ("SIGINT", "SIGHUP", "SIGTERM"):  # a shell's background jobs and nohup ignore some of them
    if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)

SLOW = {"served", "demo", "after_the_demo"}  #: fixtures that start a real server or run the demo


@pytest.fixture(autouse=True)
def _the_logger_is_as_at_the_start() -> None:
    """A command that a test or a fixture calls sets the package's logger up for good; later tests would not hear it."""
    logger = logging.getLogger("d2o_fast")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture(scope="session")
def device() -> torch.device:
    """``cuda`` where there is one; otherwise ``cpu``, with the kernels interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.hookimpl(tryfirst=True)  # before what is not asked for is left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips ``gpu`` tests if there is no CUDA device, and marks tests that start a server or the demo as slow."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if SLOW & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)

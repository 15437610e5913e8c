"""Real servers on loopback, each in its own process."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 600.0  #: seconds that a server may take for anything: nobody waits for them but where it hangs


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody else is given meanwhile; a server that is told of it can listen there (SO_REUSEADDR)."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def transformers_serve(log: Path, threads: int = 1) -> contextlib.AbstractContextManager[str]:
    """The address of a server that loads any model by its folder, without a network. The context stops it at its end.

    Args:
        log: the file for its output.

    Raises:
        RuntimeError: it is not installed (the extra ``test``), ends, or does not answer within ten minutes.
    """
    program = Path(sys.executable).parent / "transformers"
    return _served([str(program), "serve", "--device", "cpu"], log, threads)


def vllm_serve(program: str, model: Path, log: Path, threads: int = 1) -> contextlib.AbstractContextManager[str]:
    """The address of a vLLM (a build for CPUs) that serves ``model`` in fp32 under the name of its folder.

    Args:
        program: its ``vllm`` command, from any environment.
        log: the file for its output.

    Raises:
        RuntimeError: it cannot be started, ends, or does not answer within ten minutes.
    """
    command = [program, "serve", str(model), "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    # On a CPU vLLM 0.32 crashes if it reads a prompt in two parts and the request has a seed: it must read all at once.
    return _served([*command, "--max-num-batched-tokens", "32768"], log, threads)


@contextlib.contextmanager
def _served(command: list[str], log: Path, threads: int) -> Iterator[str]:
    with reserved_port() as port:
        yield from _on_port(port, command, log, threads)


def _on_port(port: int, command: list[str], log: Path, threads: int) -> Iterator[str]:
    name = " ".join([Path(command[0]).name, command[1]])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}  # the latter in GiB
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    try:
        with open(log, "wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    except OSError as error:
        raise RuntimeError(f"{name} cannot be started: {error}") from error
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}: {log.read_text()[-400:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not answer: {log.read_text()[-400:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(PATIENCE)

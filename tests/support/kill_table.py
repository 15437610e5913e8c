"""Kills training runs at random moments, continues them, and compares their bits with a run that nothing stopped.

    python tests/support/kill_table.py --runs 150 --seed 0

Each run is killed one to three times, by SIGKILL, SIGTERM or SIGINT, and continued with ``resume_from_checkpoint:
auto``. In training SIGTERM and SIGINT must write a checkpoint and exit with 143 and 130: "saved". Every run is a
fork of this process, which has the modules in memory. The exit code is 1 if any run differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from d2o_fast.cli import main as d2o  # noqa: E402
from d2o_fast.training.checkpoint import checkpoints, fault_of  # noqa: E402
from d2o_fast.training.metrics import read_log  # noqa: E402
from tiny import save_tiny_run  # noqa: E402

STEPS = "60"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CLOCKS = ("tokens_per_second", "refresh/seconds")
VARIANTS: dict[str, list[str]] = {
    "all weights": [],
    "few checkpoints": ["--save_total_limit", "1", "--save_steps", "3"],
    "LoRA with dropout": ["--use_peft", "true", "--lora_r", "2", "--lora_dropout", "0.2", "--learning_rate", "0.01"],
    "online": ["--refresh_every", "3", "--save_steps", "2"],
    "accumulation": ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "3"],
    "skip": ["--on_bad_step", "skip", "--logging_steps", "4"],
}


def start(command: list[str], log: Path) -> int:
    """``d2o`` in a fork of this process; returns its process number."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    code = 70
    try:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = d2o(command)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finished(process: int) -> int:
    """Waits for the process; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(out: Path) -> dict[str, Any]:
    """Everything that must be equal: weights, metrics without clocks, and the tensors of all checkpoints."""
    log = [{k: v for k, v in record.items() if k not in CLOCKS} for record in read_log(out / "metrics.jsonl")]
    found: dict[str, Any] = {"log": log, "checkpoints": [path.name for path in checkpoints(out)]}
    for folder in (out, *checkpoints(out)[-1:]):
        for file in sorted(folder.glob("*.safetensors")):
            tensors = load_file(file)
            found[f"{folder.name if folder != out else ''}/{file.name}"] = {
                name: tensor.numpy().tobytes() for name, tensor in tensors.items()
            }
    last = checkpoints(out)[-1]
    assert fault_of(last) is None
    for name in ("optimizer.pt", "rng_state.pth"):
        found[name] = flat(torch.load(last / name, weights_only=True))
    return found


def flat(value: Any) -> Any:
    """Tensors as bytes, at any depth."""
    if isinstance(value, dict):
        return {key: flat(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [flat(part) for part in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def killed_run(
    command: list[str], out: Path, seconds: float, chance: random.Random, counts: Counter[str]
) -> str | None:
    """Kills and continues one run until it ends by itself; returns what went wrong."""
    log = out.parent / f"{out.name}.log"
    for _ in range(chance.randint(1, 3)):
        number = chance.choice(SIGNALS)
        process = start(command, log)
        time.sleep(chance.random() * seconds)
        os.kill(process, number)
        code = finished(process)
        if code == 0:
            break
        counts[number.name] += 1
        counts["saved"] += code == 128 + number
        if code not in (-number, 128 + number):
            return f"{number.name}: exit code {code}"
    code = finished(start(command, log))
    if code:
        return f"continued: exit code {code}"
    left = [path.name for path in out.glob(".*")]
    return f"left behind: {left}" if left else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, failed = random.Random(options.seed), 0
    rows: list[tuple[str, int, int, Counter[str]]] = []
    with tempfile.TemporaryDirectory() as name:
        for place, (variant, flags) in enumerate(VARIANTS.items()):
            folder = Path(name) / str(place)
            folder.mkdir()
            command = [
                *save_tiny_run(folder),
                "--max_steps",
                STEPS,
                *flags,
                "--resume_from_checkpoint",
                "auto",
                "--output_dir",
            ]
            expected, began = folder / "never", time.perf_counter()
            assert finished(start([*command, str(expected)], folder / "never.log")) == 0, (
                folder / "never.log"
            ).read_text()
            seconds, wanted = time.perf_counter() - began, content(expected)
            counts, same = Counter[str](), 0
            runs = options.runs // len(VARIANTS) + (place < options.runs % len(VARIANTS))
            for i in range(runs):
                out = folder / f"run-{i}"
                fault = killed_run([*command, str(out)], out, seconds, chance, counts)
                if fault is None:
                    found = content(out)
                    wrong = [key for key in wanted if key != "checkpoints" and found.get(key) != wanted[key]]
                    fault = f"other bits: {', '.join(wrong)}" if wrong else None
                if fault is not None:
                    print(f"{variant}, run {i}: {fault}\n{(folder / f'{out.name}.log').read_text()[-2000:]}")
                same += fault is None
            failed += runs - same
            rows.append((variant, same, runs, counts))
    print("| run | equal / runs | SIGKILL | SIGTERM | SIGINT | saved |\n|---|---|---|---|---|---|")
    total = sum((counts for *_, counts in rows), Counter[str]())
    for variant, same, runs, counts in (*rows, ("all", options.runs - failed, options.runs, total)):
        numbers = " | ".join(str(counts[name]) for name in (*(number.name for number in SIGNALS), "saved"))
        print(f"| {variant} | {same} / {runs} | {numbers} |")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether memory grows with the data: a dry run over a file, and a store read through a shuffled epoch.

    python -m benchmarks.data                     # 20 000 and 200 000 rows; about 15 minutes and 1 GB in TMPDIR
    python -m benchmarks.data --rows 200 400      # everything once, in seconds; not a measurement

Every measurement is a process of its own, with its own time (start-up included) and its own peak resident set. The
rows are made up, and so are the store's reference scores: no model is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS = (20_000, 200_000)
K = 11  #: anchors of a row
SHARD = 64  #: rows of a shard: with the default of 16, 200 000 rows are 12 500 files and as many digests
STEP = 8  #: prompts that are packed at once
VOCABULARY = 4096  #: tokens of the tokenizer


# --- What is measured, each in a process of its own --------------------------------------------------------------


def dry_run(folder: str) -> dict[str, float]:
    """``d2o sample --dry-run`` over ``rows.jsonl``."""
    from d2o_fast.cli import main

    names = {"model_name_or_path": f"{folder}/tokenizer", "dataset_name": f"{folder}/rows.jsonl"}
    code = main(["sample", "--dry-run", *(f"--{name}={value}" for name, value in names.items())])
    if code != 0:
        raise RuntimeError(f"d2o sample --dry-run ended with {code}")
    return {}


def epoch(folder: str) -> dict[str, float]:
    """The store opened, and all its rows packed in a shuffled order, ``STEP`` at a time."""
    import torch

    from d2o_fast.anchors.store import AnchorStore
    from d2o_fast.forward.batch import pack_shared

    started = time.perf_counter()
    examples = AnchorStore.open(f"{folder}/store").examples()
    opened = time.perf_counter()
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    for start in range(0, len(examples), STEP):
        pack_shared([examples[i] for i in order[start : start + STEP].tolist()])
    return {"open_seconds": opened - started, "epoch_seconds": time.perf_counter() - opened}


def child(name: str, folder: str) -> None:
    """Runs ``dry_run`` or ``epoch`` and says in its last line what it took."""
    found = {"dry_run": dry_run, "epoch": epoch}[name](folder)
    status = Path("/proc/self/status").read_text().splitlines()
    # Not ru_maxrss, which begins with what the parent process held.
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    print("\n" + json.dumps({**found, "peak_bytes": peak}))


def measured(name: str, folder: Path, rows: int) -> dict[str, Any]:
    """What ``child`` found, and its seconds from start to end."""
    started = time.perf_counter()
    code = f"from benchmarks.data import child; child({name!r}, {str(folder)!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if result.returncode != 0:
        raise RuntimeError(f"{name} with {rows} rows ended with {result.returncode}:\n{result.stderr[-3000:]}")
    return {"what": name, "rows": rows, "seconds": seconds, **json.loads(result.stdout.splitlines()[-1])}


# --- The data, the same on every run -------------------------------------------------------------------------------


class Texts:
    """Texts of made-up words, some of them far more frequent than others."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        letters = random.Random(0)
        self.words = ["".join(letters.choices("aeioubdklmnrst", k=letters.randint(2, 9))) for _ in range(5000)]
        self.weights = [sum(1 / rank for rank in range(1, n + 1)) for n in range(1, 5001)]  # cumulative

    def text(self, low: int, high: int) -> str:
        """``low`` to ``high`` words."""
        return " ".join(self.chance.choices(self.words, cum_weights=self.weights, k=self.chance.randint(low, high)))


def write_rows(path: Path, count: int) -> None:
    """Prompts and negatives of 50 to 100 words; one row in a thousand repeats the one before it."""
    texts, line = Texts(1), ""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            if i % 1000 != 999:
                line = json.dumps({"prompt": texts.text(50, 100), "rejected": " " + texts.text(50, 100)}) + "\n"
            file.write(line)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE learned from such texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = Texts(2)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator((texts.text(50, 100) for _ in range(2000)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def write_store(folder: Path, count: int) -> None:
    """A store of ``count`` rows with given anchors of 8 to 20 words and scores of -1 nat a token."""
    import pyarrow as pa

    from d2o_fast.anchors.shards import FORMAT, SCHEMA, begin, write_shard
    from d2o_fast.config import D2OConfig

    folder.mkdir()
    settings = D2OConfig(sampling_batch_size=SHARD, num_generations=K)
    fingerprint = {"format": FORMAT, "stop_token_ids": [0], **dataclasses.asdict(settings)}
    begin(folder, {"fingerprint": fingerprint, "num_rows": count, "num_shards": -(-count // SHARD)})
    pool = pa.Table.from_pylist(list(_records(min(count, 64 * SHARD))), schema=SCHEMA)  # the same rows again and again
    for shard, first in enumerate(range(0, count, SHARD)):
        size = min(SHARD, count - first)
        table = pool.slice(first % pool.num_rows, size)
        for name, start in (("row", first), ("source_row", first + 1)):
            column = SCHEMA.get_field_index(name)
            table = table.set_column(column, SCHEMA.field(column), pa.array(range(start, start + size), pa.int64()))
        write_shard(folder, shard, table)


def _records(count: int) -> Iterator[dict[str, Any]]:
    texts = Texts(3)

    def ids(text: str) -> list[int]:  # about as many as the tokenizer makes of it
        return [texts.chance.randrange(VOCABULARY) for _ in range(1 + len(text) // 4)]

    for i in range(count):
        prompt, rejected = texts.text(50, 100), texts.text(50, 100)
        anchors = [texts.text(8, 20) for _ in range(K)]
        prompt_ids, rejected_ids, *anchors_ids = [ids(text) for text in (prompt, rejected, *anchors)]
        yield {
            "row": i,
            "source": "rows.jsonl",
            "source_row": i + 1,
            "chat": False,
            "sampled": False,
            "prompt": prompt,
            "rejected": rejected,
            "anchors": anchors,
            "prompt_ids": prompt_ids,
            "rejected_ids": rejected_ids,
            "anchors_ids": anchors_ids,
            "rejected_ref_logp": -float(len(rejected_ids)),
            "anchors_ref_logps": [-float(len(each)) for each in anchors_ids],
            "prompt_tokens": len(prompt_ids),
            "rejected_tokens": len(rejected_ids),
            "anchors_tokens": [len(each) for each in anchors_ids],
            "dropped": [],
        }


# --- The report -----------------------------------------------------------------------------------------------------

TITLES = {"dry_run": "`d2o sample --dry-run`", "epoch": "a store opened, then packed through a shuffled epoch"}


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """As Markdown; growth is the peak's over the row before, for each row of data more."""
    lines = ["| what | rows | seconds | rows/s | opening, s | packing, rows/s | peak RSS, MiB | growth, bytes a row |"]
    lines.append("|---" * 8 + "|")
    before: dict[str, Any] = {}
    for result in results:
        rows, peak = result["rows"], result["peak_bytes"]
        cells = [TITLES[result["what"]], f"{rows:,}", f"{result['seconds']:.1f}", f"{rows / result['seconds']:,.0f}"]
        opened = "epoch_seconds" in result
        cells.append(f"{result['open_seconds']:.1f}" if opened else "")
        cells.append(f"{rows / result['epoch_seconds']:,.0f}" if opened else "")
        cells.append(f"{peak / 2**20:.0f}")
        smaller = before.get("what") == result["what"] and before["rows"] < rows
        cells.append(f"{(peak - before['peak_bytes']) / (rows - before['rows']):.0f}" if smaller else "")
        lines.append(f"| {' | '.join(cells)} |")
        before = result
    return lines


def main(argv: list[str] | None = None) -> int:
    from benchmarks.report import heading, write
    from benchmarks.runner import RESULTS, about_this_run

    parser = argparse.ArgumentParser("python -m benchmarks.data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="how many rows, smallest first")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="folder for data-cpu.md")
    args = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        write_tokenizer(Path(name) / "tokenizer")
        for rows in args.rows:
            folder = Path(name) / str(rows)
            folder.mkdir()
            (folder / "tokenizer").symlink_to(Path(name) / "tokenizer")
            write_rows(folder / "rows.jsonl", rows)
            write_store(folder / "store", rows)
            results += [measured(what, folder, rows) for what in TITLES]
            print(results[-2:], flush=True)
    about = about_this_run("cpu")
    about["versions"] |= {name: importlib.metadata.version(name) for name in ("tokenizers", "pyarrow", "numpy")}
    text = [
        *heading("Memory and the number of rows", about),
        f"Prompts and negatives of 50 to 100 words; K = {K} anchors of 8 to 20 words, {SHARD} rows in a shard, {STEP} "
        "prompts packed at once. Each line is one run of a process of its own, its start-up included.",
        "",
        *table(sorted(results, key=lambda result: list(TITLES).index(result["what"]))),
    ]
    write(args.output_dir / "data-cpu.md", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

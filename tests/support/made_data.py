"""Made-up data of any size, the same on every run, and the memory held while they are read.

    python tests/support/made_data.py dry_run 20000 200000     # some minutes, 1 GB in TMPDIR
    python tests/support/made_data.py epoch 20000 200000

The first number of rows warms up. The growth of the peak from the first to the second is the cost of the extra rows.
The store's reference scores are made up too: no model is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from d2o_fast.anchors.shards import FORMAT, SCHEMA, begin, write_shard
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.cli import main as d2o
from d2o_fast.config import D2OConfig
from d2o_fast.forward.batch import pack_shared

K = 11  #: anchors of a row
SHARD = 64  #: rows of a shard: at the default of 16, 200 000 rows would be 12 500 files and as many digests
STEP = 8  #: prompts that are packed at once
VOCABULARY = 4096  #: tokens of the tokenizer


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
    """Writes prompts and negatives of 50 to 100 words; one row in a thousand repeats the one before it."""
    texts, line = Texts(1), ""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            if i % 1000 != 999:
                line = json.dumps({"prompt": texts.text(50, 100), "rejected": " " + texts.text(50, 100)}) + "\n"
            file.write(line)


def write_tokenizer(folder: Path) -> None:
    """Writes a byte-level BPE learned from such texts."""
    texts = Texts(2)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator((texts.text(50, 100) for _ in range(2000)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def write_store(folder: Path, count: int) -> None:
    """Writes a store of ``count`` rows with given anchors of 8 to 20 words and scores of -1 nat a token."""
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

    def ids(text: str) -> list[int]:  # about as many as the tokenizer's
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


def dry_run(folder: Path) -> None:
    """Runs ``d2o sample --dry-run`` over ``rows.jsonl``."""
    names = {"model_name_or_path": folder.parent / "tokenizer", "dataset_name": folder / "rows.jsonl"}
    if (code := d2o(["sample", "--dry-run", *(f"--{name}={value}" for name, value in names.items())])) != 0:
        raise RuntimeError(f"d2o sample --dry-run ended with {code}")


def epoch(folder: Path) -> None:
    """Opens the store and packs all its rows in a shuffled order, ``STEP`` at a time."""
    examples = AnchorStore.open(folder / "store").examples()
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    for start in range(0, len(examples), STEP):
        pack_shared([examples[i] for i in order[start : start + STEP].tolist()])


def peak_bytes() -> int:
    """The peak resident bytes of this process. ru_maxrss would start from its parent's peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def make(folder: Path, counts: list[int]) -> None:
    write_tokenizer(folder / "tokenizer")
    for rows in counts:
        (folder / str(rows)).mkdir()
        write_rows(folder / str(rows) / "rows.jsonl", rows)
        write_store(folder / str(rows) / "store", rows)


def measure(what: str, counts: list[int]) -> list[dict[str, Any]]:
    """Seconds and peak of ``dry_run`` or ``epoch`` with each number of rows, in this process, smallest first."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        child = multiprocessing.get_context("fork").Process(target=make, args=(Path(name), counts))
        child.start()  # in a separate process, so that making the data leaves nothing in this one
        child.join()
        for rows in counts:
            started = time.perf_counter()
            {"dry_run": dry_run, "epoch": epoch}[what](Path(name) / str(rows))
            seconds = time.perf_counter() - started
            found.append({"what": what, "rows": rows, "seconds": round(seconds, 1), "peak_bytes": peak_bytes()})
            if len(found) > 1:
                more = found[-1]["peak_bytes"] - found[-2]["peak_bytes"]
                found[-1]["bytes_per_row_more"] = round(more / (rows - found[-2]["rows"]))
    return found


if __name__ == "__main__":
    for line in measure(sys.argv[1], sorted(map(int, sys.argv[2:]))):
        print(json.dumps(line))

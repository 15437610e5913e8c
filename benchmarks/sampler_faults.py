"""What becomes of anchors when the server or the way to it fails: each fault injected, the store compared.

    python -m benchmarks.sampler_faults             # under two minutes
    python -m benchmarks.sampler_faults --quick     # three of the faults
    python -m benchmarks.sampler_faults --vllm /elsewhere/bin/vllm      # a real vLLM (a build for CPUs) instead

A real server (``transformers serve``, or vLLM) answers through a proxy that goes wrong at chosen requests;
``build_store`` makes a store through it, one request at a time. Every text that the proxy sent whole is noted, so that
it can be said of a store whether it lost one, holds one twice, or holds one that the server never said.

Writes ``sampler-faults.md``, or ``sampler-faults-vllm.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from benchmarks.report import heading, write
from benchmarks.runner import RESULTS, about_this_run
from benchmarks.samplers import random_model, word_tokenizer
from benchmarks.serving import Proxy, transformers_serve, vllm_serve
from d2o_fast.anchors.build import build_store
from d2o_fast.anchors.store import AnchorStore
from d2o_fast.config import D2OConfig
from d2o_fast.data.reading import rows_from
from d2o_fast.errors import D2OError
from d2o_fast.sampling import server as server_module

ROWS, K, LONGEST, SHARD = 5, 3, 12, 3
WANTED = ROWS * K
FIRST_DELAY = 0.01  #: seconds, in place of ``server.FIRST_DELAY``, so that this takes no ten minutes


@dataclass(frozen=True)
class Fault:
    """``kind``: what the proxy does, at the requests ``at`` (from 0; the first is the probe, the shards' follow)."""

    name: str
    kind: str
    at: tuple[int, ...] = (0, 2, 3, 5)
    timeout: float = 30.0  #: server_timeout, seconds
    honours_n: bool = True  #: false: transformers serve as it is, which ignores n


FAULTS = (
    Fault("no server yet: connection refused", "refused"),
    Fault("no answer within server_timeout", "slow", (2, 5), 2.0),
    Fault("an answer that drips in, byte by byte", "drip", (2, 5), 2.0),
    Fault("connection closed without an answer", "closed"),
    Fault("connection reset in the middle of an answer", "reset"),
    Fault("half an answer, then the end", "half"),
    Fault("429 with Retry-After: 1", "429", (2, 5)),
    Fault("500", "500"),
    Fault("truncated JSON", "truncated JSON"),
    Fault("an HTML page instead of JSON", "HTML"),
    Fault("no choices", "no choices"),
    Fault("a choice without a text", "no text"),
    Fault("fewer choices than asked for", "fewer", tuple(range(1000))),
    Fault("n ignored (transformers serve as it is)", "none", (), honours_n=False),
    Fault("500 for good from the sixth request on", "500", tuple(range(5, 1000))),
)
QUICK = ("500", "refused")


class Told(logging.Handler):
    """The warnings of the package, as they come."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def listening() -> Iterator[Told]:
    """What the package warns of goes here, and nowhere else; its delays are short."""
    logger, told, delay = logging.getLogger("d2o_fast"), Told(), server_module.FIRST_DELAY
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(told)
    server_module.FIRST_DELAY = FIRST_DELAY
    try:
        yield told
    finally:
        logger.removeHandler(told)
        logger.propagate, server_module.FIRST_DELAY = propagate, delay


class Stores:
    """Makes stores through proxies in front of one server, which serves ``folder / "model"``.

    Args:
        vllm: it is a vLLM; ``transformers serve`` is made to look like an early one.
    """

    def __init__(self, url: str, folder: Path, vllm: bool) -> None:
        self.url, self.folder, self.vllm = url, folder, vllm
        self.model, self.tokenizer = random_model(), word_tokenizer()
        self.rows = rows_from([{"prompt": f"w{i} w{i + 9}", "rejected": " w5 w6"} for i in range(1, ROWS + 1)], "rows")

    def proxy(self, faults: dict[int, str], honours_n: bool = True) -> Proxy:
        return Proxy(self.url, faults, like_vllm=honours_n and not self.vllm)

    def make(self, name: str, proxy: Proxy, timeout: float = 30.0) -> AnchorStore:
        """The store in ``folder / name``, made or completed."""
        config = D2OConfig(
            max_length=64,
            max_completion_length=LONGEST,
            num_generations=K,
            sampling_batch_size=SHARD,
            server_url=proxy.url,
            server_model=str(self.folder / "model"),
            server_concurrency=1,
            server_timeout=timeout,
        )
        return build_store(self.model, self.tokenizer, self.rows, config, self.folder / name)

    def texts(self, store: AnchorStore) -> list[str]:
        """Of all anchors, in order."""
        drawn = [ids for example in store.examples() for ids in example.anchor_ids]
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in drawn]


def try_fault(stores: Stores, fault: Fault, undisturbed: Sequence[str]) -> dict[str, Any]:
    """A row of the table. ``undisturbed``: the texts of a store that was made without a fault."""
    proxy = stores.proxy(dict.fromkeys(fault.at, fault.kind), fault.honours_n)
    name = re.sub(r"\W+", "-", fault.name)
    error = None
    with listening() as told:
        if fault.kind == "refused":
            proxy.faults = {}
            threading.Thread(target=_come_up_late, args=(proxy, told), daemon=True).start()
        else:
            proxy.__enter__()
        try:
            try:
                store = stores.make(name, proxy, fault.timeout)
            except D2OError as lasting:
                error = str(lasting)
                kept = sorted(path.name for path in (stores.folder / name).glob("*.parquet"))
                proxy.faults = {}  # the server is well again, and the command is given again
                store = stores.make(name, proxy, fault.timeout)
                if kept != ["shard-00000.parquet"]:
                    raise RuntimeError(f"{fault.name}: finished shards {kept} instead of the first one") from lasting
        finally:
            proxy.__exit__()
    held = stores.texts(store)
    # A shard that was not finished is asked for again with its own seeds; such an answer counts once.
    answers = {e["body"]["seed"]: e["texts"] for e in proxy.log if e["body"]["max_tokens"] == LONGEST and e["texts"]}
    said = Counter(" ".join(text.split()) for texts in answers.values() for text in texts)  # vLLM's begin with a blank
    return {
        "fault": fault.name,
        "injected": "at first" if fault.kind == "refused" else sum(e["fault"] is not None for e in proxy.log),
        "again": len(told.texts),
        "error": error,
        "held": len(held),
        "lost": (said - Counter(held)).total(),
        "added": (Counter(held) - said).total(),
        "same": held == list(undisturbed),
    }


def _come_up_late(proxy: Proxy, told: Told) -> None:
    while not told.texts:  # until it was asked for and was not there
        time.sleep(0.002)
    proxy.__enter__()


def whole(row: dict[str, Any]) -> bool:
    """Nothing lost, nothing twice, nothing that the server never said."""
    return row["held"] == WANTED and row["lost"] == row["added"] == 0


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """As Markdown."""
    lines = [
        f"| fault | times injected | what happened | anchors, of {WANTED} | said and lost | held twice or never said | "
        "texts as without a fault |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        happened = f"asked again {row['again']} times, same seed" if row["again"] else "the rest asked for one by one"
        if row["error"] is not None:
            happened = "8 attempts, then an error that names row and fault; started again, the finished shard stayed"
        same = "yes" if row["same"] else "no: other seeds"
        cells = [row["fault"], row["injected"] or "all along", happened, row["held"], row["lost"], row["added"], same]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.sampler_faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"only the faults {', '.join(QUICK)}")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="where sampler-faults.md goes")
    parser.add_argument("--vllm", metavar="COMMAND", help="the vllm command of a build for CPUs")
    args = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        random_model().save_pretrained(folder / "model")
        word_tokenizer().save_pretrained(folder / "model")
        log = folder / "log.txt"
        server = transformers_serve(log) if args.vllm is None else vllm_serve(args.vllm, folder / "model", log)
        try:
            url = stack.enter_context(server)
        except RuntimeError as error:
            parser.error(str(error))
        stores = Stores(url, folder, vllm=args.vllm is not None)
        with listening(), stores.proxy({}) as proxy:
            undisturbed = stores.texts(stores.make("undisturbed", proxy))
        faults = [fault for fault in FAULTS if not args.quick or fault.kind in QUICK]
        faults = [fault for fault in faults if fault.honours_n or args.vllm is None]
        rows = [try_fault(stores, fault, undisturbed) for fault in faults]
    what = "`transformers serve`" if args.vllm is None else "vLLM"
    like = " The proxy answers `n` as vLLM does, but for one line." if args.vllm is None else ""
    text = [
        *heading("Faults between sampler and server", about_this_run("cpu"), args.quick),
        f"{what} behind a proxy that goes wrong at the requests injected; {ROWS} prompts, K = {K}, two shards, "
        f"`server_concurrency: 1`.{like} Waiting starts at {FIRST_DELAY} s here and at {server_module.FIRST_DELAY} s "
        "in use. Everything that the server said whole is compared with what the store holds.",
        "",
        *table(rows),
    ]
    write(args.output_dir / ("sampler-faults.md" if args.vllm is None else "sampler-faults-vllm.md"), text)
    return 0 if all(map(whole, rows)) else 1


if __name__ == "__main__":
    raise SystemExit(main())

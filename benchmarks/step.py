"""A whole training step (forward, loss, backward, optimizer): prompts shared, not shared, and padded.

    python -m benchmarks.step                  # on this CPU
    python -m benchmarks.step --device cuda    # a model of 1B parameters with random weights, bf16 compute
    python -m benchmarks.step --dry-run        # everything once, in seconds; not a measurement

All providers run the same model on the same prompts, interleaved. The learning rate is 0, so that they keep computing
the same thing. A step counts only if its loss and gradient norm equal those of the padded step. For all providers only
response rows reach the head, and the references are known.

Shapes: P tokens of a prompt, R tokens of a response, K anchors of one prompt, G prompts in a step, T tokens read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from benchmarks.report import about_this_run, heading, milliseconds, options, place, save, table
from benchmarks.timing import interleaved, memory_growth, quartiles, timed
from d2o_fast.config import D2OConfig
from d2o_fast.data.row import Example
from d2o_fast.forward.attention import VarlenAttention
from d2o_fast.forward.batch import PackedBatch, pack, pack_shared, response_hidden, row_tokens
from d2o_fast.forward.flash import choose_kernel
from d2o_fast.forward.shared_sequence import Spans
from d2o_fast.forward.sharing import choose_sharing
from d2o_fast.loss.engine import Head
from d2o_fast.loss.layout import ResponseLayout
from d2o_fast.loss.ops import fused_d2o_loss
from d2o_fast.model.parts import autocast, decoder_of, head_of
from d2o_fast.training.step import adamw

PROVIDERS = ("shared", "unshared", "padded")
SEPARATE = "benchmark_separate"
MODELS: dict[str, dict[str, Any]] = {
    # The head has a fifth of the weights, as in Llama 3.2 1B: sharing prompts does not change its work.
    "cpu": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "vocab_size": 4096}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "cuda": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
}


@dataclass(frozen=True)
class Shape:
    """G prompts of P tokens with K + 1 responses each: R tokens, or R / 4 to 7 R / 4 of them if ragged."""

    P: int
    R: int
    K: int
    G: int
    ragged: bool

    def examples(self, vocab: int) -> list[Example]:
        chance = random.Random(f"{self}")

        def tokens(n: int) -> list[int]:
            return [chance.randrange(vocab) for _ in range(n)]

        def length(n: int) -> int:
            return chance.randint(n // 4, 2 * n - n // 4) if self.ragged else n

        responses = [[tokens(length(self.R)) for _ in range(self.K + 1)] for _ in range(self.G)]
        return [Example(tokens(length(self.P)), first, rest, [-1.0] * (self.K + 1)) for first, *rest in responses]


def shapes(device: str, tiny: bool) -> list[Shape]:
    """P / R of 1, 4 and 1/4, K = 11 and 3, even and ragged."""
    if tiny:
        return [Shape(16, 8, 3, 2, False), Shape(16, 8, 2, 2, True)]
    short, long, groups = (128, 512, 2) if device == "cuda" else (64, 256, 1)
    sizes = ((short, short), (long, short), (short, long))
    return [Shape(P, R, K, groups, ragged) for K in (11, 3) for P, R in sizes for ragged in (False, True)]


# --- The providers -------------------------------------------------------------------------------------------------


def separate_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, spans: Any, **kwargs: Any) -> Any:
    """Attention of each prompt + response to itself, without sharing or padding, by the kernels that sharing uses."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    kernel = choose_kernel(q, v, "sdpa")
    if kernel is None:
        raise RuntimeError(f"no flash attention for {q.dtype} on {q.device}")
    return VarlenAttention.apply(q, k, v, spans, kwargs["scaling"], None, None, kernel).unsqueeze(0), None


def separate_batch(padded: PackedBatch, examples: Sequence[Example]) -> tuple[dict[str, Any], torch.Tensor]:
    """The padded rows as one row without padding: the decoder's arguments, and the indices that predict responses."""
    lengths = [len(e.prompt_ids) + len(response) for e in examples for response in e.responses()]
    kept = torch.arange(padded.input_ids.shape[1]) < torch.tensor(lengths)[:, None]
    place = kept.flatten().cumsum(0) - 1
    arguments = {
        "input_ids": padded.input_ids[kept][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "attention_mask": torch.zeros(1, 1, 1, 1),
    }
    return {**arguments, "spans": Spans(lengths, lengths)}, place[padded.predict_index]


class Workload:
    """One model, one optimizer, and the step of each provider on the same prompts."""

    def __init__(self, shape: Shape, device: str, tiny: bool) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        sizes = MODELS["tiny" if tiny else device]
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=4096))
        self.model = model.to(self.device).train()
        self.config = D2OConfig(dtype="bfloat16" if device == "cuda" else "float32", learning_rate=0.0)
        self.head, self.decoder = head_of(self.model), decoder_of(self.model)
        self.optimizer = adamw(self.model, self.config)
        self.examples = shape.examples(sizes["vocab_size"])
        sharing = choose_sharing(self.model, self.decoder, self.examples, self.config, 0, training=True)
        if not sharing.on:
            raise RuntimeError(sharing.text)
        AttentionInterface.register(SEPARATE, separate_attention)
        self.own = self.model.config._attn_implementation

    def tokens(self, provider: str) -> int:
        """T, the tokens that the provider reads in a step."""
        if provider == "unshared":
            return sum(example.num_tokens() for example in self.examples)
        return row_tokens(self.examples, shared=provider == "shared")

    def step(self, provider: str) -> tuple[float, float]:
        """Runs one step from token lists to updated weights; returns its loss and gradient norm."""
        hidden, batch = self._hidden(provider)
        options = {"alpha": self.config.alpha, "beta": self.config.beta, **self.head.options()}
        layout: ResponseLayout = batch.layout
        head: Head = self.head
        out = fused_d2o_loss(hidden, head.weight, batch.targets, layout, batch.ref_logps, **options)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out.loss.item(), norm.item()

    def _hidden(self, provider: str) -> tuple[torch.Tensor, PackedBatch]:
        with autocast(self.config, self.device):
            if provider != "unshared":
                batch = pack_shared(self.examples) if provider == "shared" else pack(self.examples, 0)
                batch = batch.to(self.device)
                return response_hidden(self.decoder, batch), batch
            padded = pack(self.examples, 0)
            arguments, index = separate_batch(padded, self.examples)
            arguments = {n: x.to(self.device) if torch.is_tensor(x) else x for n, x in arguments.items()}
            self.model.config._attn_implementation = SEPARATE
            try:
                hidden = self.decoder(use_cache=False, **arguments).last_hidden_state[0]
            finally:
                self.model.config._attn_implementation = self.own
            hidden = hidden.index_select(0, index.to(self.device))
            if torch.is_autocast_enabled(self.device.type):
                hidden = hidden.to(torch.get_autocast_dtype(self.device.type))
            return hidden, padded.to(self.device)


# --- Measuring ------------------------------------------------------------------------------------------------------


def measure(shape: Shape, device: str, tiny: bool, rounds: int) -> list[dict[str, Any]]:
    """A row per provider: first a comparison with the padded step, then memory, then time in shuffled rounds of all."""
    work = Workload(shape, device, tiny)
    rows: dict[str, dict[str, Any]] = {}
    ready: list[str] = []
    expected: tuple[float, float] | None = None
    bound = 1e-3 if device == "cpu" else 3e-2
    for name in reversed(PROVIDERS):  # padded first
        row = rows[name] = {"provider": name, **asdict(shape), "device": device, "status": "ok", "T": work.tokens(name)}
        try:
            work.step(name)  # the optimizer's state, compiled kernels
            row["loss"], row["grad_norm"] = found = work.step(name)
            expected = expected or found
            if any(not abs(mine - true) <= bound * abs(true) for mine, true in zip(found, expected, strict=True)):
                row["status"] = f"out of bound: loss and norm {found} instead of {expected}"
                continue
            row["memory_bytes"] = memory_growth(partial(work.step, name), work.device)
            ready.append(name)
        except torch.cuda.OutOfMemoryError:
            row["status"] = "out of memory"
            work.model.zero_grad()
            torch.cuda.empty_cache()
    calls = {name: partial(timed, partial(work.step, name), work.device) for name in ready}
    for name, seconds in interleaved(calls, rounds).items():
        rows[name].update(quartiles(seconds))
        rows[name]["tokens_per_second"] = work.tokens("unshared") / rows[name]["ms"] * 1e3
    return [rows[name] for name in PROVIDERS]


# --- The report -----------------------------------------------------------------------------------------------------


def step_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table as Markdown; a ratio is the padded step's number over the provider's."""
    columns = "P | R | K | G | lengths | provider | ms (quartiles) | faster than padded | fewer tokens | data tokens/s"
    cells = []
    for row in rows:
        padded = next(r for r in rows if r["provider"] == "padded" and all(r[n] == row[n] for n in (*"PRKG", "ragged")))
        faster = f"{padded['ms'] / row['ms']:.2f}" if "ms" in padded and "ms" in row else ""
        rate = f"{row['tokens_per_second']:,.0f}" if "ms" in row else ""
        memory, most = row.get("memory_bytes"), padded.get("memory_bytes")
        growth = ["", ""] if memory is None else [f"{memory / 2**20:.0f}", f"{most / memory:.2f}" if most else ""]
        shape = [*(row[name] for name in "PRKG"), "ragged" if row["ragged"] else "even", row["provider"]]
        time_taken = milliseconds(row) or f"**{row['status']}**"
        cells.append([*shape, time_taken, faster, f"{padded['T'] / row['T']:.2f}", rate, *growth])
    return table(f"{columns} | peak growth, MiB | less memory", cells)


def main(argv: list[str] | None = None) -> int:
    parser = options("benchmarks.step", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each provider")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run tries everything on the CPU")
    rounds = 2 if args.dry_run else args.rounds
    rows = list[dict[str, Any]]()
    for shape in shapes(args.device, args.dry_run):
        print(shape, flush=True)
        rows += measure(shape, args.device, args.dry_run, rounds)
    about = about_this_run(args.device)
    sizes = MODELS["tiny" if args.dry_run else args.device]
    model = ", ".join(f"{name} {value}" for name, value in sizes.items())
    lines = heading("A training step with shared prompts", about, args.dry_run)
    lines += [f"Llama with random weights: {model}.", "", *step_table(rows)]
    print(save(place(args.out, "step", args.device, args.dry_run), lines, about, rows=rows))
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

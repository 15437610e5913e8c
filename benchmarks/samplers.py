"""Anchors per second: this package's samplers beside plain loops over ``generate``, on this CPU.

    python -m benchmarks.samplers             # three minutes on two idle cores
    python -m benchmarks.samplers --dry-run   # everything once, in seconds; not a measurement
    python -m benchmarks.samplers --vllm /elsewhere/bin/vllm    # vLLM too, in its own environment

All draw the same number of responses from one Llama with random weights, with the same number of threads. Each runs
once per round, in a new order every time. Before it is timed, each must pass a check that it draws from the softmax:
the counts are right, EOS or the length ends each response, and first tokens are as frequent as their probabilities.

Writes samplers-cpu.json and .md. K is the number of responses of one prompt.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from benchmarks.report import about_this_run, heading, options, place, save, table
from benchmarks.serving import transformers_serve, vllm_serve
from benchmarks.timing import interleaved, quartiles
from d2o_fast.config import D2OConfig
from d2o_fast.data.reading import rows_from
from d2o_fast.sampling.generate import sample_responses
from d2o_fast.sampling.protocol import Sampling, ServerPrompt, tokenize_drawn
from d2o_fast.sampling.server import ServerSampler

V, EOS = 64, 0
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
CONCURRENCY = 8  #: prompts that a server samples at a time
BOUND = 5.0  #: in standard deviations of the statistic; first tokens within it count as drawn from the softmax

Draws = list[list[list[int]]]
Sampler = Callable[[Sequence[Sequence[int]], int, int, int], Draws]  #: prompts, K, most tokens, seed


@dataclass(frozen=True)
class Work:
    """G prompts of P tokens, K responses of at most R tokens to each."""

    G: int
    P: int
    K: int
    R: int

    def prompts(self) -> list[list[int]]:
        chance = random.Random(0)
        return [[chance.randrange(1, V) for _ in range(self.P)] for _ in range(self.G)]


FULL, QUICK = Work(G=8, P=24, K=11, R=32), Work(G=2, P=6, K=3, R=4)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the words w1 to w63, and EOS: text and tokens determine each other."""
    words = {"</s>": EOS, **{f"w{i}": i for i in range(1, V)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", clean_up_tokenization_spaces=False
    )


def random_model(seed: int = 0) -> Any:
    """A Llama with random weights and uneven next-token probabilities: about 1 in 60 tokens is EOS."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=V, **SIZES, pad_token_id=EOS, bos_token_id=None, eos_token_id=EOS)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


# --- The samplers ------------------------------------------------------------------------------------------------


def generate_loop(model: Any, together: bool) -> Sampler:
    """The plain loop: ``generate`` on each prompt, for K responses at once or for one at a time."""

    def sample(prompts: Sequence[Sequence[int]], num: int, longest: int, seed: int) -> Draws:
        torch.manual_seed(seed)
        draws = []
        for prompt in prompts:
            ids, of_prompt = torch.tensor([prompt]), list[list[int]]()
            while len(of_prompt) < num:
                count = num if together else 1
                with torch.no_grad():
                    out = model.generate(
                        ids, do_sample=True, top_k=0, max_new_tokens=longest, num_return_sequences=count
                    )
                of_prompt += [_until_eos(response) for response in out[:, len(prompt) :].tolist()]
            draws.append(of_prompt)
        return draws

    return sample


def ours(model: Any) -> Sampler:
    """``sample_responses``, which ``d2o sample`` calls."""

    def sample(prompts: Sequence[Sequence[int]], num: int, longest: int, seed: int) -> Draws:
        options: dict[str, Any] = {"eos_token_ids": [EOS], "pad_token_id": EOS, "seed": seed}
        return sample_responses(model, prompts, num, max_new_tokens=longest, **options)

    return sample


def over_http(url: str, name: str, tokenizer: Any) -> Sampler:
    """``sampling/server.py``; its texts are tokenized again."""
    server = ServerSampler(url, name, CONCURRENCY, 120.0)

    def sample(prompts: Sequence[Sequence[int]], num: int, longest: int, seed: int) -> Draws:
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        asked = [ServerPrompt(t, list(p), f"prompt {i}") for i, (t, p) in enumerate(zip(texts, prompts, strict=True))]
        draws = server.sample(asked, num, Sampling(longest, 1.0, 1.0, (EOS,), (seed,)))
        rows = rows_from([{"prompt": text, "rejected": " w1"} for text in texts])
        # A text that begins with a word lacks the space that separates words.
        drawn = [[replace(draw, text=f" {draw.text}" if draw.text else "") for draw in d] for d in draws]
        longest_config = D2OConfig(max_length=4096, max_completion_length=longest)
        return tokenize_drawn(rows, drawn, tokenizer, longest_config, [EOS])

    return sample


def _until_eos(response: list[int]) -> list[int]:
    return response[: response.index(EOS) + 1] if EOS in response else response


@contextlib.contextmanager
def samplers(model: Any, tokenizer: Any, vllm: str | None) -> Iterator[dict[str, Sampler | str]]:
    """Every sampler by name, or the reason why it cannot run here. ``vllm``: its command, if it is installed."""
    found: dict[str, Sampler | str] = {
        "generate, one response at a time": generate_loop(model, together=False),
        "generate, one prompt at a time (num_return_sequences = K)": generate_loop(model, together=True),
        "d2o-fast in process": ours(model),
    }
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        threads = torch.get_num_threads()
        servers = {"transformers serve": transformers_serve(folder / "transformers.txt", threads)}
        if vllm is not None:
            servers["vLLM"] = vllm_serve(vllm, folder / "model", folder / "vllm.txt", threads)
        for name, server in servers.items():
            row = f"d2o-fast over HTTP ({name}, {CONCURRENCY} prompts at a time)"
            try:
                found[row] = over_http(stack.enter_context(server), str(folder / "model"), tokenizer)
            except RuntimeError as error:
                found[row] = str(error)
        yield found


# --- The gate ----------------------------------------------------------------------------------------------------


def chi_square_excess(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic above its mean, in standard deviations; outcomes expected fewer than 5 times are pooled."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    degrees = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected.clamp_min(1e-9)).sum()
    return float((statistic - degrees) / math.sqrt(2 * degrees))


def gate(sampler: Sampler, model: Any, work: Work, num: int) -> str | None:
    """The fault in the sampler's draws, or None.

    A response may be one token short of its length without EOS: if EOS is the last token of the full length,
    ``transformers serve`` reports that the length ended it.
    """
    prompts = work.prompts()
    for i, of_prompt in enumerate(draws := sampler(prompts, work.K, work.R, 1)):
        if len(of_prompt) != work.K:
            return f"{len(of_prompt)} responses to prompt {i} instead of {work.K}"
        for response in of_prompt:
            inside, last = response[:-1], response[-1]
            if EOS in inside or not (last == EOS or work.R - 1 <= len(response) <= work.R):
                return f"a response of {len(response)} tokens that neither EOS nor its length ended"
    if len(draws) != work.G:
        return f"responses to {len(draws)} prompts instead of {work.G}"
    (firsts,) = sampler(prompts[:1], num, 2, 2)
    counts = torch.bincount(torch.tensor([response[0] for response in firsts]), minlength=V).double()
    with torch.no_grad():
        probabilities = model(torch.tensor(prompts[:1])).logits[0, -1].double().softmax(-1)
    found = chi_square_excess(counts, probabilities)
    if not abs(found) < BOUND:
        return f"first tokens {found:.1f} standard deviations off the softmax ({num} draws)"
    return None


# --- Measuring ---------------------------------------------------------------------------------------------------


def measure(model: Any, found: dict[str, Sampler | str], work: Work, rounds: int, num: int) -> list[dict[str, Any]]:
    """A row for each sampler: the reason why it is not timed, or seconds and tokens of each round."""
    rows, calls = dict[str, dict[str, Any]](), dict[str, Callable[[], float]]()

    def call(row: dict[str, Any], sampler: Sampler) -> float:
        begin = time.perf_counter()
        draws = sampler(work.prompts(), work.K, work.R, 100 + len(row["tokens"]))
        seconds = time.perf_counter() - begin
        row["tokens"].append(sum(len(response) for of_prompt in draws for response in of_prompt))
        return seconds

    for name, sampler in found.items():
        reason = sampler if isinstance(sampler, str) else gate(sampler, model, work, num)
        rows[name] = {"sampler": name, "reason": reason, "seconds": [], "tokens": []}
        if reason is None and not isinstance(sampler, str):
            calls[name] = partial(call, rows[name], sampler)
    for name, seconds in interleaved(calls, rounds).items():
        rows[name]["seconds"] = seconds
    return list(rows.values())


def rates(rows: Sequence[dict[str, Any]], work: Work) -> list[str]:
    """The table as Markdown; a sampler that was not timed has its reason."""
    cells = []
    medians = {row["sampler"]: statistics.median(row["seconds"]) for row in rows if row["seconds"]}
    base = next((median for name, median in medians.items() if "one prompt at a time" in name), None)
    for row in rows:
        if not row["seconds"]:
            cells.append([row["sampler"], f"**not measured**: {row['reason']}", "", ""])
            continue
        seconds = quartiles(row["seconds"])
        median, slow, fast = (1e3 * work.G * work.K / seconds[name] for name in ("ms", "ms_q3", "ms_q1"))
        tokens = statistics.median(t / s for t, s in zip(row["tokens"], row["seconds"], strict=True))
        over = f"{base / medians[row['sampler']]:.2f}" if base else ""
        cells.append([row["sampler"], f"{median:.1f} ({slow:.1f} - {fast:.1f})", f"{tokens:.0f}", over])
    return table("sampler | anchors/s (quartiles) | tokens/s | over one prompt at a time", cells)


def main(argv: list[str] | None = None) -> int:
    parser = options("benchmarks.samplers", __doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds, each with every sampler once")
    parser.add_argument("--vllm", metavar="COMMAND", help="the vllm command of a build for CPUs")
    args = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    work, rounds, num = (QUICK, 2, 100) if args.dry_run else (FULL, args.rounds, 500)
    model, tokenizer = random_model(), word_tokenizer()
    with samplers(model, tokenizer, args.vllm) as found:
        rows = measure(model, found, work, rounds, num)
    about, sizes = about_this_run("cpu"), ", ".join(f"{name} {value}" for name, value in SIZES.items())
    lines = [
        *heading("Samplers on a CPU", about, args.dry_run),
        f"Llama with random weights, fp32: vocab_size {V}, {sizes}. {work.G} prompts of {work.P} tokens, K = {work.K} "
        f"responses of at most {work.R} tokens each; {rounds} rounds. A server is a process of its own with as many "
        "threads; `transformers serve` ignores `n`, so each response is a request there.",
        f"Each sampler first drew the right number of responses, each ended by EOS or its length, and {num} first "
        f"tokens within {BOUND:g} standard deviations of the softmax. The machine's load average at the end, this work "
        f"included: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.",
        "",
        *rates(rows, work),
    ]
    print(save(place(args.out, "samplers", "cpu", args.dry_run), lines, about, rows=rows))
    return 0 if all(row["seconds"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

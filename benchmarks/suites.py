"""The cases of each suite."""

from __future__ import annotations

import itertools
from dataclasses import replace

from benchmarks.shapes import HEADS, Case, equal_lengths, mixed_lengths

OURS = ("ours", "ours-two-pass", "ours-filtered")
LIGER = ("liger-flce", "liger-scaled-ce", "liger-chunked", "liger-dpo")
SUMS = ("torch-lce-sum", "liger-flce-sum", "quack-sum")
EVERYONE = (*OURS, "naive", "naive-compiled", "torch-lce", *LIGER, "trl-chunked", "cce", "cce-exact", "quack", *SUMS)
#: On a CPU, compiling for another head takes longer than measuring it.
UNCOMPILED = tuple(name for name in EVERYONE if name != "naive-compiled")
#: A CPU needs 8 s for a step of torch's own loss in bf16 at GPT-2's head, and so half a minute at larger ones.
LARGE = tuple(name for name in UNCOMPILED if not name.startswith("torch-lce"))
SECONDS = {"errors": 60.0, "cpu-loss": 90.0, "memory": 110.0, "peers": 480.0, "gpu": 300.0}


def errors(device: str = "cpu", tiny: bool = False) -> list[Case]:
    """Odd N, H and V; 13 prompts with K = 1 to 13 and responses of unequal length; several draws of each."""
    providers = ("ours", "ours-staged", "ours-two-pass", "naive")
    sizes = [(5, 33, 257)] if tiny else [(9, 77, 1009), (5, 127, 50257)]
    found = itertools.product(("fp32", "bf16"), ("train", "frozen", "score"), ("random", "peaked"), sizes)
    return [
        Case(
            *("errors", "odd", mixed_lengths(longest, seed), H, V, dtype, mode, inputs, None, device, seed, providers),
            measure=("errors",),
        )
        for dtype, mode, inputs, (longest, H, V) in found
        for seed in range(1 if tiny or V > 10000 else 3)
    ]


def cpu_loss(device: str = "cpu", tiny: bool = False) -> list[Case]:
    """GPT-2's head at N = 1536: time and memory beside naive."""
    lengths, H, V = (equal_lengths(2, 2), 32, 503) if tiny else (equal_lengths(2, 64), *HEADS["gpt2"][:2])
    one = Case("cpu-loss", "gpt2", lengths, H, V, device=device, providers=("ours", "naive"))
    return [replace(one, dtype=dtype) for dtype in ("fp32", "bf16")]


def memory(device: str = "cpu", tiny: bool = False) -> list[Case]:
    """Temporary memory at N = 3072 and N = 12288; naive at the smaller one, since the larger would need about 30 GB."""
    H, V, tokens, few, many = (32, 1003, 4, 1, 4) if tiny else (512, 128256, 128, 2, 8)
    lengths = equal_lengths(few, tokens)
    small = Case("memory", "llama-vocabulary", lengths, H, V, device=device, measure=("memory",))
    large = replace(small, lengths=equal_lengths(many, tokens), providers=("ours",))
    return [replace(small, providers=("ours", "naive")), large]


def peers(device: str = "cpu", tiny: bool = False) -> list[Case]:
    """Every provider on a CPU: GPT-2's head in full, larger vocabularies with fewer rows and mostly a smaller H."""
    if tiny:
        one = Case("peers", "gpt2", equal_lengths(2, 2), 32, 503, device=device, providers=UNCOMPILED)
        plan = (("fp32", "train"), ("bf16", "frozen"), ("fp32", "score"))
        return [*(replace(one, dtype=d, mode=m) for d, m in plan), replace(one, lengths=equal_lengths(2, 3, K=1))]
    gpt2 = HEADS["gpt2"]
    ranked = tuple(name for name in EVERYONE if name not in SUMS)
    one = Case("peers", "gpt2", equal_lengths(2, 16), gpt2.H, gpt2.V, device=device, providers=ranked)
    cases = [replace(one, dtype=dtype, mode=mode) for dtype in ("fp32", "bf16") for mode in ("train", "frozen")]
    # D2O's smallest case is DPO, which more of the peers have.
    cases.append(replace(one, lengths=equal_lengths(8, 24, K=1), providers=LARGE))
    for name, tokens, H, mode, inputs in (
        ("qwen2.5-0.5b", 8, 896, "train", "random"),
        ("qwen2.5-0.5b", 32, 896, "train", "random"),
        ("llama-3.2-1b", 16, 512, "train", "peaked"),
        ("llama-3.1-8b", 16, 512, "frozen", "peaked"),
        ("llama-3.1-8b", 16, 512, "score", "peaked"),
        ("gemma-2-2b", 16, 512, "train", "random"),
    ):
        V, softcap = HEADS[name].V, HEADS[name].softcap
        lengths = equal_lengths(1, tokens)
        cases.append(Case("peers", name, lengths, H, V, "bf16", mode, inputs, softcap, device, 0, LARGE))
    return cases


def gpu(device: str = "cuda", tiny: bool = False) -> list[Case]:
    """Real heads at real sizes on a GPU, the most telling first."""
    plan = (
        ("llama-3.1-8b", 8, "bf16", "train", "random"),
        ("llama-3.1-8b", 8, "bf16", "frozen", "random"),
        ("llama-3.1-8b", 8, "bf16", "score", "random"),
        ("llama-3.1-8b", 8, "bf16", "train", "peaked"),
        ("llama-3.2-1b", 8, "bf16", "train", "peaked"),
        ("qwen2.5-0.5b", 8, "bf16", "train", "random"),
        ("gemma-2-2b", 8, "bf16", "train", "random"),
        ("llama-3.1-8b", 2, "bf16", "train", "random"),
        ("gpt2", 8, "bf16", "train", "random"),
        ("llama-3.2-1b", 8, "bf16", "frozen", "peaked"),
        ("qwen2.5-0.5b", 8, "bf16", "score", "random"),
        ("gpt2", 2, "fp32", "train", "random"),
    )
    cases = []
    for name, prompts, dtype, mode, inputs in plan:
        H, V, softcap = (32, 503, HEADS[name].softcap) if tiny else HEADS[name]
        lengths = equal_lengths(prompts // 2, 2) if tiny else equal_lengths(prompts, 128)
        providers = UNCOMPILED if tiny else EVERYONE
        cases.append(Case("gpu", name, lengths, H, V, dtype, mode, inputs, softcap, device, 0, providers))
    return cases


SUITES = {"errors": errors, "cpu-loss": cpu_loss, "memory": memory, "peers": peers, "gpu": gpu}


def cases_of(suite: str, device: str, tiny: bool = False) -> list[Case]:
    """The cases of a suite. ``tiny``: shapes that show whether everything runs, not how fast."""
    return [replace(case, rounds=3) if tiny else case for case in SUITES[suite](device, tiny)]

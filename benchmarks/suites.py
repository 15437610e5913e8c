"""Which cases each suite measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.shapes import HEADS, Case, equal_lengths, mixed_lengths

EVERYONE = (
    "ours",
    "ours-two-pass",
    "ours-filtered",
    "naive",
    "naive-compiled",
    "torch-lce",
    "liger-flce",
    "liger-scaled-ce",
    "liger-chunked",
    "liger-dpo",
    "trl-chunked",
    "cce",
    "cce-exact",
    "quack",
    "torch-lce-sum",
    "liger-flce-sum",
    "quack-sum",
)
#: Compiling a head of another size takes a CPU longer than measuring it.
UNCOMPILED = tuple(name for name in EVERYONE if name != "naive-compiled")
#: A step of torch's own takes a CPU 8 s in bf16 at GPT-2's head, hence half a minute at these.
LARGE = tuple(name for name in UNCOMPILED if not name.startswith("torch-lce"))
SECONDS = {"errors": 60.0, "cpu-loss": 90.0, "memory": 110.0, "peers": 480.0, "gpu": 300.0}


def errors(device: str = "cpu", tiny: bool = False) -> list[Case]:
    """Odd N, H and V; 13 prompts with K = 1 to 13 and responses of unequal length; several draws of each."""
    cases = []
    sizes = [(5, 33, 257)] if tiny else [(9, 77, 1009), (5, 127, 50257)]
    for dtype in ("fp32", "bf16"):
        for mode in ("train", "frozen", "score"):
            for inputs in ("random", "peaked"):
                for longest, H, V in sizes:
                    for seed in range(1 if tiny or V > 10000 else 3):
                        cases.append(
                            Case(
                                "errors",
                                "odd",
                                mixed_lengths(longest, seed),
                                H,
                                V,
                                dtype,
                                mode,
                                inputs,
                                seed=seed,
                                device=device,
                                providers=("ours", "ours-staged", "ours-two-pass", "naive"),
                                measure=("errors",),
                            )
                        )
    return cases


def cpu_loss(device: str = "cpu", tiny: bool = False) -> list[Case]:
    """GPT-2's head at N = 1536: time and memory beside naive."""
    lengths, H, V = (equal_lengths(2, 2), 32, 503) if tiny else (equal_lengths(2, 64), *HEADS["gpt2"][:2])
    providers = ("ours", "naive")
    return [
        Case("cpu-loss", "gpt2", lengths, H, V, dtype, providers=providers, device=device) for dtype in ("fp32", "bf16")
    ]


def memory(device: str = "cpu", tiny: bool = False) -> list[Case]:
    """Temporary memory at N = 3072 and N = 12288; naive at the smaller one, since the larger would need about 30 GB."""
    H, V = (32, 1003) if tiny else (512, 128256)
    prompts = (1, 4) if tiny else (2, 8)
    return [
        Case(
            "memory",
            "llama-vocabulary",
            equal_lengths(count, 4 if tiny else 128),
            H,
            V,
            "bf16",
            providers=("ours", "naive") if count == prompts[0] else ("ours",),
            measure=("memory",),
            device=device,
        )
        for count in prompts
    ]


def peers(device: str = "cpu", tiny: bool = False) -> list[Case]:
    """Everybody on a CPU: GPT-2's head in full, the larger vocabularies with fewer rows and mostly a smaller H."""
    if tiny:
        lengths = equal_lengths(2, 2)
        return [
            Case("peers", "gpt2", lengths, 32, 503, dtype, mode, providers=UNCOMPILED, device=device)
            for dtype, mode in (("fp32", "train"), ("bf16", "frozen"), ("fp32", "score"))
        ] + [Case("peers", "gpt2", equal_lengths(2, 3, K=1), 32, 503, providers=UNCOMPILED, device=device)]
    gpt2 = HEADS["gpt2"]
    ranked = tuple(name for name in EVERYONE if not name.endswith("-sum"))
    cases = [
        Case("peers", "gpt2", equal_lengths(2, 16), gpt2.H, gpt2.V, dtype, mode, providers=ranked, device=device)
        for dtype in ("fp32", "bf16")
        for mode in ("train", "frozen")
    ]
    pairs = equal_lengths(8, 24, K=1)  # D2O's smallest case is DPO, which more of the peers have
    cases.append(Case("peers", "gpt2", pairs, gpt2.H, gpt2.V, "bf16", "train", device=device, providers=LARGE))
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
    plan: list[tuple[str, int, str, str, str]] = [
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
    ]
    cases = []
    for name, prompts, dtype, mode, inputs in plan:
        head = HEADS[name]
        H, V = (32, 503) if tiny else (head.H, head.V)
        lengths: Sequence[Sequence[int]] = equal_lengths(prompts // 2, 2) if tiny else equal_lengths(prompts, 128)
        providers = UNCOMPILED if tiny else EVERYONE
        cases.append(
            Case("gpu", name, tuple(map(tuple, lengths)), H, V, dtype, mode, inputs, head.softcap, device, 0, providers)
        )
    return cases


SUITES = {"errors": errors, "cpu-loss": cpu_loss, "memory": memory, "peers": peers, "gpu": gpu}


def cases_of(suite: str, device: str, tiny: bool = False) -> list[Case]:
    """``tiny``: shapes that show whether everything runs, not how fast."""
    return [replace(case, rounds=3) if tiny else case for case in SUITES[suite](device, tiny)]

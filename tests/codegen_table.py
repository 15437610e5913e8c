"""Compile every kernel in every configuration that the launchers choose, for every architecture, without a GPU.

    python tests/codegen_table.py            prints the table
    python tests/codegen_table.py --json     one JSON object per line, for tests/test_codegen.py

Registers, stack and spills of NVIDIA code are what ``ptxas -v`` from Triton's wheel says of the kernel's PTX; those of
AMD code are in the text of the assembly. Nothing is read from Triton's cache. It cannot run where TRITON_INTERPRET is
set, since the kernels are then Python functions: the tests start it in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

KIB = 1024
#: architecture -> (Triton's target, shared memory of one block in bytes)
ARCHITECTURES: dict[str, tuple[tuple[str, int | str, int], int]] = {
    "sm_80": (("cuda", 80, 32), 163 * KIB),
    "sm_86": (("cuda", 86, 32), 99 * KIB),
    "sm_90": (("cuda", 90, 32), 227 * KIB),
    "sm_100": (("cuda", 100, 32), 227 * KIB),
    "gfx942": (("hip", "gfx942", 64), 64 * KIB),
}
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Case:
    """One compilation: the arguments' Triton types, which of them are multiples of 16, and the compile-time values."""

    kernel: str  # module.function
    arch: str
    label: str  # dtype and variant
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int = 3


@dataclass
class Row:
    kernel: str
    arch: str
    label: str
    registers: int = 0
    shared: int = 0
    shared_limit: int = 0
    stack: int = 0
    spills: int = 0
    wgmma: bool = False
    tma: bool = False
    tf32: bool = False
    seconds: float = 0.0
    error: str = field(default="")


def cases() -> list[Case]:
    return [case for arch in ARCHITECTURES for case in (*_matrix_cases(arch), *_row_cases(arch))]


def _matrix_cases(arch: str) -> list[Case]:
    """The forward: plain as in Llama; with bias, scale and a tail of H; softcap too; all that in rows that no vector
    load fits; and with columns apart. And the combination of its splits."""
    from d2o_fast.kernels.linear_logprob import BLOCK_COMBINE, TILES

    found = []
    pairs = [(dtype, dtype) for dtype in DTYPES] + [("bf16", "fp32")]
    for hidden, weight in pairs:
        for variant in ("plain", "biased", "capped", "odd", "strided"):
            if (hidden == "fp16" or arch == "sm_86") and variant in ("biased", "odd", "strided"):
                continue  # the same code as for bf16, and as for sm_80 with the same tile
            full, aligned_rows = variant != "plain", variant in ("plain", "biased", "capped")
            softcap = 0.0 if variant in ("plain", "biased") else 30.0
            kind = "fp32" if hidden == "fp32" else "16-bit" if hidden == weight else "mixed"
            if not aligned_rows and kind != "fp32":
                kind = "16-bit odd"
            elif kind == "16-bit" and softcap:
                kind = "16-bit capped"
            tile = TILES[arch, kind]
            signature = {
                "hidden_ptr": f"*{hidden}",
                "weight_ptr": f"*{weight}",
                "bias_ptr": "*fp32",
                "targets_ptr": "*i64",
                "partial_ptr": "*fp32",
                **dict.fromkeys(("N", "V", "H", "num_splits", "tiles_per_split"), "i32"),
                **dict.fromkeys(("stride_hn", "stride_hh", "stride_wv", "stride_wh", "stride_b"), "i32"),
            }
            constants: dict[str, Any] = {
                "LOGIT_SCALE": 0.5 if full else 1.0,
                "SOFTCAP": softcap,
                "HAS_BIAS": full,
                "EVEN_H": not full,
                "UPCAST": False,
                "BLOCK_N": tile.block_n,
                "BLOCK_V": tile.block_v,
                "BLOCK_H": tile.block_h,
                "GROUP_N": tile.group_n,
                **({} if variant == "strided" else {"stride_hh": 1, "stride_wh": 1}),
                **({"stride_b": 1} if full else {"bias_ptr": None}),
            }
            aligned = ("hidden_ptr", "weight_ptr", "targets_ptr", "partial_ptr")
            if aligned_rows:
                aligned += ("V", "H", "stride_hn", "stride_wv")
            label = hidden if hidden == weight else f"{hidden}, weight {weight}"
            found.append(
                Case(
                    "linear_logprob.linear_logprob_kernel",
                    arch,
                    f"{label}, {variant}",
                    signature,
                    constants,
                    aligned,
                    tile.num_warps,
                    tile.num_stages,
                )
            )
    signature = {
        "partial_ptr": "*fp32",
        "targets_ptr": "*i64",
        "logps_ptr": "*fp32",
        "lse_ptr": "*fp32",
        **dict.fromkeys(("N", "V", "num_splits"), "i32"),
    }
    pointers = tuple(name for name, kind in signature.items() if kind[0] == "*")
    constants = {"BLOCK_N": BLOCK_COMBINE}
    found.append(Case("linear_logprob.combine_splits_kernel", arch, "fp32", signature, constants, pointers, 4))
    return found


def _row_cases(arch: str) -> list[Case]:
    """Kernels over rows of logits and over prompts."""
    from d2o_fast.kernels.group_loss import BLOCK_TOKENS
    from d2o_fast.kernels.logit_grad import BLOCK_V, NUM_WARPS

    found = []
    for variant in ("plain", "full"):
        full = variant == "full"
        constants = {
            "LOGIT_SCALE": 0.5 if full else 1.0,
            "SOFTCAP": 30.0 if full else 0.0,
            "HAS_BIAS": full,
            "BLOCK_V": BLOCK_V,
            **({"stride_b": 1} if full else {"bias_ptr": None}),
        }
        stats = {
            "logits_ptr": "*fp32",
            "targets_ptr": "*i64",
            "bias_ptr": "*fp32",
            "logps_ptr": "*fp32",
            "lse_ptr": "*fp32",
            **dict.fromkeys(("V", "stride_n", "stride_b"), "i32"),
        }
        even = () if full else ("V", "stride_n")
        aligned = tuple(name for name in stats if name.endswith("_ptr"))
        found.append(
            Case("logit_grad.logit_stats_kernel", arch, f"fp32, {variant}", stats, constants, aligned + even, NUM_WARPS)
        )
        for out in DTYPES:
            grad = {
                "logits_ptr": "*fp32",
                "out_ptr": f"*{out}",
                "targets_ptr": "*i64",
                "lse_ptr": "*fp32",
                "coef_ptr": "*fp32",
                "bias_ptr": "*fp32",
                **dict.fromkeys(("V", "stride_n", "stride_on", "stride_b"), "i32"),
            }
            even = () if full else ("V", "stride_n", "stride_on")
            aligned = tuple(name for name in grad if name.endswith("_ptr"))
            found.append(
                Case(
                    "logit_grad.logit_grad_kernel",
                    arch,
                    f"{out}, {variant}",
                    grad,
                    constants,
                    aligned + even,
                    NUM_WARPS,
                )
            )
    loss = {
        "token_logps_ptr": "*fp32",
        "cu_seqlens_ptr": "*i32",
        "cu_groups_ptr": "*i32",
        **dict.fromkeys(
            ("ref_logps_ptr", "logps_ptr", "chosen_ptr", "rejected_ptr", "margins_ptr", "losses_ptr", "coef_ptr"),
            "*fp32",
        ),
        **dict.fromkeys(("alpha", "beta", "anchor_weight"), "fp32"),
        "num_prompts": "i32",
    }
    aligned = ("token_logps_ptr", "cu_seqlens_ptr", "cu_groups_ptr", "ref_logps_ptr", "logps_ptr", "coef_ptr")
    constants = {"BLOCK_TOKENS": BLOCK_TOKENS}
    found.append(Case("group_loss.group_loss_kernel", arch, "fp32", loss, constants, aligned, 4))
    return found


def compile_case(case: Case) -> Row:
    """Compile and inspect one case; an error of the compiler becomes the row's ``error``, which the tests refuse."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target, limit = ARCHITECTURES[case.arch]
    row = Row(case.kernel, case.arch, case.label, shared_limit=limit)
    started = time.perf_counter()
    module, function = case.kernel.split(".")
    kernel = getattr(importlib.import_module(f"d2o_fast.kernels.{module}"), function)
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            constants[(index,)] = case.constants[name]
        else:
            signature[name] = case.signature[name]
            if name in case.aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    try:
        compiled = triton.compile(source, target=GPUTarget(*target), options=options)
    except Exception as error:
        row.error = f"{type(error).__name__}: {str(error)[:500]}"
        return row
    row.shared = compiled.metadata.shared
    if target[0] == "cuda":
        _read_ptx(row, compiled.asm["ptx"])
    else:
        _read_amdgcn(row, compiled.asm["amdgcn"])
    row.seconds = round(time.perf_counter() - started, 2)
    return row


def _read_ptx(row: Row, ptx: str) -> None:
    import triton

    name = "ptxas-blackwell" if row.arch == "sm_100" else "ptxas"
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [str(ptxas), "-v", f"-arch={found[1]}", str(path), "-o", str(Path(folder, "kernel.cubin"))]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    row.registers = int(_only(r"Used (\d+) registers", report))
    row.stack = int(_only(r"(\d+) bytes stack frame", report))
    row.spills = int(_only(r"(\d+) bytes spill stores", report)) + int(_only(r"(\d+) bytes spill loads", report))
    row.wgmma = "wgmma.mma_async" in ptx
    row.tma = "cp.async.bulk.tensor" in ptx
    row.tf32 = "tf32" in ptx


def _read_amdgcn(row: Row, text: str) -> None:
    row.registers = int(_only(r"\.vgpr_count:\s+(\d+)", text))
    row.stack = int(_only(r"\.private_segment_fixed_size:\s+(\d+)", text))
    row.spills = int(_only(r"\.vgpr_spill_count:\s+(\d+)", text)) + int(_only(r"\.sgpr_spill_count:\s+(\d+)", text))
    row.tf32 = "xf32" in text


def _only(pattern: str, text: str) -> str:
    found = re.findall(pattern, text)
    assert len(found) == 1, f"{pattern!r} occurs {len(found)} times"
    return found[0]


def compile_all(selected: list[Case], processes: int = 2) -> list[Row]:
    """All rows, in the order of the cases, from fresh compilations."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            return pool.map(compile_case, selected, chunksize=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="compile the cases whose 'kernel arch label' contains this text")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    selected = [case for case in cases() if arguments.only in f"{case.kernel} {case.arch} {case.label}"]
    rows = compile_all(selected)
    if arguments.json:
        for row in rows:
            print(json.dumps(asdict(row)))
        return
    numbers = f"{'regs':>5}{'shared':>8}{'stack':>6}{'spills':>7}"
    print(f"{'kernel':24}{'arch':8}{'operands':27}{numbers}  wgmma tma tf32  seconds")
    for row in rows:
        name = row.kernel.split(".")[1].removesuffix("_kernel")
        wgmma, tma, tf32 = ("yes" if flag else "no" for flag in (row.wgmma, row.tma, row.tf32))
        print(
            f"{name:24}{row.arch:8}{row.label:27}{row.registers:5}{row.shared:8}{row.stack:6}{row.spills:7}  "
            f"{wgmma:6}{tma:4}{tf32:4}{row.seconds:9.1f} {row.error}"
        )


if __name__ == "__main__":
    main()

"""Compiles every kernel in every configuration that the launchers choose, for every architecture, without a GPU.

    python tests/support/codegen_table.py            prints the table
    python tests/support/codegen_table.py --json     one JSON object per line, for tests/kernels/test_codegen.py

For NVIDIA, ``ptxas -v`` from Triton's wheel reports registers, stack and spills of the kernel's PTX. For AMD they are
read from the assembly. Nothing is read from Triton's cache. The script cannot run if TRITON_INTERPRET is set, since the
kernels are then Python functions: the tests start it in a separate process.
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
    """One compilation: the arguments' Triton types, the arguments divisible by 16, and the compile-time values."""

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
    tcgen05: bool = False
    tma: bool = False
    tf32: bool = False
    serialized: bool = False  # ptxas made asynchronous matrix products wait for each other
    seconds: float = 0.0
    error: str = field(default="")


def cases() -> list[Case]:
    groups = (_matrix_cases, _descriptor_cases, _product_cases, _row_cases)
    return [case for arch in ARCHITECTURES for group in groups for case in group(arch)]


def _matrix_cases(arch: str) -> list[Case]:
    """Cases of the forward and of the kernel that combines its splits.

    The forward runs plain as in Llama; with bias, scale and a tail of H; with a softcap too; with all that in rows that
    no vector load fits; and with columns apart.
    """
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
            if not aligned_rows:
                kind = "fp32 odd" if kind == "fp32" else "16-bit odd"
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
                **dict.fromkeys(("stride_hn", "stride_hh", "stride_wv", "stride_wh"), "i32"),
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
                **({} if full else {"bias_ptr": None}),
            }
            aligned = ("bias_ptr", "hidden_ptr", "weight_ptr", "targets_ptr", "partial_ptr")
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
        "stats_ptr": "*fp32",
        **dict.fromkeys(("N", "V", "num_splits"), "i32"),
    }
    pointers = tuple(name for name, kind in signature.items() if kind[0] == "*")
    constants = {"BLOCK_N": BLOCK_COMBINE}
    found.append(Case("linear_logprob.combine_splits_kernel", arch, "fp32", signature, constants, pointers, 4))
    return found


def _descriptor_cases(arch: str) -> list[Case]:
    """The forward through tensor descriptors, if the architecture has them. Reads past H give zero: H needs no tail."""
    from d2o_fast.kernels.linear_logprob import DESCRIPTOR_TILES

    if arch not in DESCRIPTOR_TILES:
        return []
    tile, found = DESCRIPTOR_TILES[arch], []
    for dtype in ("bf16", "fp16"):
        for variant in ("plain", "biased", "scaled", "capped", "capped only"):
            if dtype == "fp16" and variant in ("scaled", "capped only"):
                continue
            biased = variant in ("biased", "capped")
            signature = {
                "hidden_desc": f"tensordesc<{dtype}[{tile.block_n}, {tile.block_h}]>",
                "weight_desc": f"tensordesc<{dtype}[{tile.block_v}, {tile.block_h}]>",
                "bias_ptr": "*fp32",
                "targets_ptr": "*i64",
                "partial_ptr": "*fp32",
                **dict.fromkeys(("N", "V", "H", "num_splits", "tiles_per_split"), "i32"),
            }
            constants: dict[str, Any] = {
                "LOGIT_SCALE": 1.0 if variant in ("plain", "capped only") else 0.5,
                "SOFTCAP": 30.0 if "capped" in variant else 0.0,
                "HAS_BIAS": biased,
                "UPCAST": False,
                "BLOCK_N": tile.block_n,
                "BLOCK_V": tile.block_v,
                "BLOCK_H": tile.block_h,
                "GROUP_N": tile.group_n,
                **({} if biased else {"bias_ptr": None}),
            }
            aligned = ("bias_ptr", "targets_ptr", "partial_ptr") + (("V", "H") if variant == "plain" else ())
            found.append(
                Case(
                    "linear_logprob.linear_logprob_tma_kernel",
                    arch,
                    f"{dtype}, {variant}",
                    signature,
                    constants,
                    aligned,
                    tile.num_warps,
                    tile.num_stages,
                )
            )
    return found


def _product_cases(arch: str) -> list[Case]:
    """Cases of the products over kept columns: rows as in real models; rows that no vector load fits; columns apart."""
    from d2o_fast.kernels.filtered_products import (
        BLOCK_LIST,
        BLOCK_PACK,
        DHIDDEN_TILES,
        DWEIGHT_TILES,
        FLAG_COLUMNS,
        FLAG_ROWS,
        FLAG_STEP,
    )

    found = []
    for dtype in DTYPES:
        for variant in ("plain", "odd", "strided"):
            if (dtype == "fp16" or arch == "sm_86") and variant != "plain":
                continue  # as in _matrix_cases
            odd = variant != "plain"
            kind = ("fp32" if dtype == "fp32" else "16-bit") + (" odd" if odd else "")
            pointers = {"grad_ptr": f"*{dtype}", "columns_ptr": "*i32", "kept_ptr": "*i32"}
            sizes = dict.fromkeys(("n", "V", "H", "stride_gn", "stride_dn"), "i32")
            shared: dict[str, Any] = {"UPCAST": False}
            aligned = (*pointers, "weight_ptr", "hidden_ptr", "dhidden_ptr", "dweight_ptr")
            if not odd:
                aligned += ("V", "H", "stride_gn", "stride_wv", "stride_hn", "stride_dn", "stride_dv")
            for out in ("fp32",) if odd else dict.fromkeys(("fp32", dtype)):
                tile = DHIDDEN_TILES[arch, kind]
                types = {"weight_ptr": f"*{dtype}", "dhidden_ptr": f"*{out}", "stride_wv": "i32", "stride_wh": "i32"}
                blocks = {"BLOCK_N": tile.block_m, "BLOCK_H": tile.block_h, "BLOCK_V": tile.block_k}
                unit = {} if variant == "strided" else {"stride_wh": 1}
                found.append(
                    Case(
                        "filtered_products.dhidden_kernel",
                        arch,
                        f"{dtype} to {out}, {variant}",
                        pointers | sizes | types,
                        shared | blocks | unit,
                        aligned,
                        tile.num_warps,
                        tile.num_stages,
                    )
                )
            every = dict.fromkeys((("fp32", True), ("fp32", False), (dtype, True)))
            for out, fresh in (("fp32", False),) if odd else every:  # it needs the most registers of all
                tile = DWEIGHT_TILES[arch, kind]
                types = {"hidden_ptr": f"*{dtype}", "dweight_ptr": f"*{out}"}
                types |= dict.fromkeys(("stride_hn", "stride_hh", "stride_dv"), "i32")
                blocks = {"BLOCK_V": tile.block_m, "BLOCK_H": tile.block_h, "BLOCK_N": tile.block_k}
                unit = {} if variant == "strided" else {"stride_hh": 1}
                found.append(
                    Case(
                        "filtered_products.dweight_kernel",
                        arch,
                        f"{dtype} to {out}, {variant}, {'fresh' if fresh else 'added'}",
                        pointers | sizes | types,
                        shared | blocks | unit | {"FRESH": fresh},
                        aligned,
                        tile.num_warps,
                        tile.num_stages,
                    )
                )
        for aligned_rows in () if dtype == "fp16" else (True,) if arch == "sm_86" else (True, False):
            even_arguments = ("V", "stride_gn") if aligned_rows else ()
            label = f"{dtype}, {'plain' if aligned_rows else 'odd'}"
            flag = {"grad_ptr": f"*{dtype}", "coef_ptr": "*fp32", "flags_ptr": "*i32", "eps": "fp32"}
            flag |= dict.fromkeys(("n", "V", "stride_gn"), "i32")
            blocks = {"ROWS": FLAG_ROWS, "STEP": FLAG_STEP, "BLOCK_V": FLAG_COLUMNS}
            aligned = ("grad_ptr", "coef_ptr", "flags_ptr", *even_arguments)
            found.append(Case("filtered_products.flag_columns_kernel", arch, label, flag, blocks, aligned, 4))
            pack = {**pointers, "V": "i32", "stride_gn": "i32"}
            blocks = {"BLOCK_V": BLOCK_PACK, "ZEROS": DHIDDEN_TILES[arch, kind].block_k}
            aligned = (*pointers, *even_arguments)
            found.append(Case("filtered_products.pack_rows_kernel", arch, label, pack, blocks, aligned, 8))
    pointers = dict.fromkeys(("flags_ptr", "places_ptr", "columns_ptr"), "*i32")
    signature, aligned = {**pointers, "V": "i32"}, (*pointers, "V")
    blocks = {"BLOCK_V": BLOCK_LIST}
    found.append(Case("filtered_products.list_columns_kernel", arch, "int32", signature, blocks, aligned, 4))
    return found


def _row_cases(arch: str) -> list[Case]:
    """Cases of the kernels over rows of logits and over prompts."""
    from d2o_fast.kernels.group_loss import BLOCK_TOKENS
    from d2o_fast.kernels.logit_grad import ROW_TILES

    found = []
    for variant in ("plain", "full"):
        full = variant == "full"
        constants = {
            "LOGIT_SCALE": 0.5 if full else 1.0,
            "SOFTCAP": 30.0 if full else 0.0,
            "HAS_BIAS": full,
            **({"stride_b": 1} if full else {"bias_ptr": None}),
        }
        stats = {
            "logits_ptr": "*fp32",
            "targets_ptr": "*i64",
            "bias_ptr": "*fp32",
            "logps_ptr": "*fp32",
            "maximum_ptr": "*fp32",
            "log_sum_ptr": "*fp32",
            **dict.fromkeys(("V", "stride_n", "stride_b"), "i32"),
        }
        even = () if full else ("V", "stride_n")
        aligned = tuple(name for name in stats if name.endswith("_ptr"))
        tile = ROW_TILES[arch, "stats"]
        found.append(
            Case(
                "logit_grad.logit_stats_kernel",
                arch,
                f"fp32, {variant}",
                stats,
                constants | {"BLOCK_V": tile.block_v},
                aligned + even,
                tile.num_warps,
            )
        )
        for out in DTYPES:
            grad = {
                "logits_ptr": "*fp32",
                "out_ptr": f"*{out}",
                "targets_ptr": "*i64",
                "maximum_ptr": "*fp32",
                "log_sum_ptr": "*fp32",
                "coef_ptr": "*fp32",
                "bias_ptr": "*fp32",
                **dict.fromkeys(("V", "stride_n", "stride_on", "stride_b"), "i32"),
            }
            even = () if full else ("V", "stride_n", "stride_on")
            aligned = tuple(name for name in grad if name.endswith("_ptr"))
            tile = ROW_TILES[arch, "grad"]
            found.append(
                Case(
                    "logit_grad.logit_grad_kernel",
                    arch,
                    f"{out}, {variant}",
                    grad,
                    constants | {"BLOCK_V": tile.block_v},
                    aligned + even,
                    tile.num_warps,
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
        **dict.fromkeys(("alpha", "beta", "anchor_weight", "negative_weight", "gate"), "fp32"),
        "num_prompts": "i32",
    }
    aligned = ("token_logps_ptr", "cu_seqlens_ptr", "cu_groups_ptr", "ref_logps_ptr", "logps_ptr", "coef_ptr")
    constants = {"BLOCK_TOKENS": BLOCK_TOKENS}
    found.append(Case("group_loss.group_loss_kernel", arch, "fp32", loss, constants, aligned, 4))
    return found


def compile_case(case: Case) -> Row:
    """Compiles and inspects one case; an error of the compiler becomes the row's ``error``, which the tests refuse."""
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
    row.tcgen05 = "tcgen05.mma" in ptx
    row.tma = "cp.async.bulk.tensor" in ptx
    row.tf32 = "tf32" in ptx
    row.serialized = "serialized" in report


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


def columns(row: Row) -> list[str]:
    """The cells of a row, for the printed and the Markdown table."""
    tensor = [name for name in ("wgmma", "tcgen05") if getattr(row, name)]
    numbers = [row.registers, row.shared, row.stack, row.spills]
    name = row.kernel.split(".")[1].removesuffix("_kernel")
    flags = [" ".join(tensor) or "-", "yes" if row.tma else "-", "yes" if row.tf32 else "-"]
    return [name, row.arch, row.label, *map(str, numbers), *flags, row.error]


HEADINGS = ["kernel", "arch", "operands", "regs", "shared", "stack", "spills", "async mma", "tma", "tf32", "error"]


def markdown(rows: list[Row]) -> str:
    """The table with the versions that made it: registers per thread, shared memory, stack and spills in bytes."""
    import torch
    import triton

    lines = [
        "# What the compilers make of the kernels",
        "",
        f"Triton {triton.__version__}, torch {torch.__version__}; every configuration that can be chosen by default. "
        "Registers per thread; shared memory of a block, stack frame and spills in bytes (for gfx942, spilled "
        "registers). Made by `python tests/support/codegen_table.py --markdown FILE`; "
        "`tests/kernels/test_codegen.py` checks it.",
        "",
        f"| {' | '.join(HEADINGS[:-1])} |",
        f"|{'---|' * 3}{'--:|' * 4}{'---|' * 3}",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(columns(row)[:-1])} |" for row in rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--only", default="", help="compile the cases whose 'kernel arch label' contains this text")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    selected = [case for case in cases() if arguments.only in f"{case.kernel} {case.arch} {case.label}"]
    rows = compile_all(selected)
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(rows))
    if arguments.json:
        for row in rows:
            print(json.dumps(asdict(row)))
        return
    widths = [20, 8, 32, 5, 8, 6, 7, 10, 5, 5, 0]
    for line in (HEADINGS, *map(columns, rows)):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()

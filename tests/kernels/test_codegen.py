"""The compilers' code for the kernels, for every architecture, without a GPU (see tests/support/codegen_table.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import triton

from helpers import DEADLINE
from paths import SUPPORT

pytestmark = pytest.mark.slow
TABLE = SUPPORT / "codegen_table.py"
ARCHITECTURES = ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"]
#: (bytes of stack, bytes spilled) that Triton 3.6 needs; none with 3.7
SPILLS_OF_3_6 = {
    "filtered_products.dhidden_kernel sm_80 fp32 to fp32, strided": (8, 8),
    "linear_logprob.linear_logprob_kernel sm_100 bf16, weight fp32, strided": (16, 28),
    "linear_logprob.linear_logprob_kernel sm_100 fp32, capped": (24, 44),
}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Compiled in a separate process: interpreted kernels, which the other tests use, cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(TABLE), "--json"], env=environment, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def name(row: dict) -> str:
    return f"{row['kernel']} {row['arch']} {row['label']}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_everything_compiles(rows, arch) -> None:
    selected = [row for row in rows if row["arch"] == arch]
    assert len(selected) >= 18
    missing = {row["kernel"] for row in rows} - {row["kernel"] for row in selected}
    assert missing == (set() if arch in ("sm_90", "sm_100") else {"linear_logprob.linear_logprob_tma_kernel"})
    assert {name(row): row["error"] for row in selected if row["error"]} == {}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_spills(rows, arch) -> None:
    bad = {name(row): (row["stack"], row["spills"]) for row in rows if row["arch"] == arch}
    known = SPILLS_OF_3_6 if triton.__version__.startswith("3.6.") else {}
    assert {key: value for key, value in bad.items() if value not in ((0, 0), known.get(key))} == {}
    assert all(row["registers"] > 0 for row in rows if row["arch"] == arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shared_memory_fits(rows, arch) -> None:
    selected = [row for row in rows if row["arch"] == arch]
    assert {name(row): row["shared"] for row in selected if row["shared"] > row["shared_limit"]} == {}
    assert any(row["shared"] > 0 for row in selected)


MATRIX_KERNELS = {
    "linear_logprob.linear_logprob_kernel",
    "linear_logprob.linear_logprob_tma_kernel",
    "filtered_products.dhidden_kernel",
    "filtered_products.dweight_kernel",
}


def matrix_rows(rows: list[dict], arch: str) -> list[dict]:
    """The 16-bit matrix kernels of an architecture."""
    selected = [row for row in rows if row["arch"] == arch and row["kernel"] in MATRIX_KERNELS]
    assert {row["kernel"] for row in selected} == MATRIX_KERNELS
    return [row for row in selected if not row["label"].startswith("fp32")]


def test_hopper_multiplies_16_bit_operands_with_wgmma(rows) -> None:
    assert [name(row) for row in matrix_rows(rows, "sm_90") if not row["wgmma"]] == []


def test_blackwell_multiplies_16_bit_operands_with_tcgen05(rows) -> None:
    assert [name(row) for row in matrix_rows(rows, "sm_100") if not row["tcgen05"]] == []


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_the_forward_reads_through_the_tensor_memory_accelerator(rows, arch) -> None:
    selected = [row for row in rows if row["arch"] == arch and row["kernel"].endswith("_tma_kernel")]
    assert {row["label"].split(", ")[1] for row in selected} >= {"plain", "biased", "scaled", "capped"}
    assert [name(row) for row in selected if not row["tma"]] == []


def test_no_asynchronous_product_waits_for_another(rows) -> None:
    assert [name(row) for row in rows if row["serialized"]] == []


def test_nothing_is_multiplied_in_tf32(rows) -> None:
    assert [name(row) for row in rows if row["tf32"]] == []


def test_markdown_has_a_line_for_every_row(rows, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(TABLE.parent))
    from codegen_table import Row, markdown

    table = markdown([Row(**row) for row in rows]).splitlines()
    assert len([line for line in table if line.startswith("| ")]) == len(rows) + 1
    assert any("linear_logprob_tma | sm_90 | bf16, plain" in line and "| wgmma | yes |" in line for line in table)

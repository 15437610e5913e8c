"""What the compilers make of the kernels, for every architecture, without a GPU (see codegen_table.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TABLE = Path(__file__).with_name("codegen_table.py")
ARCHITECTURES = ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Compiled in a process of its own: interpreted kernels, which the other tests use, cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(TABLE), "--json"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def name(row: dict) -> str:
    return f"{row['kernel']} {row['arch']} {row['label']}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_everything_compiles(rows, arch) -> None:
    selected = [row for row in rows if row["arch"] == arch]
    assert len(selected) >= 18
    assert {row["kernel"] for row in selected} == {row["kernel"] for row in rows}
    assert {name(row): row["error"] for row in selected if row["error"]} == {}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_spills(rows, arch) -> None:
    bad = {name(row): (row["stack"], row["spills"]) for row in rows if row["arch"] == arch}
    assert {key: value for key, value in bad.items() if value != (0, 0)} == {}
    assert all(row["registers"] > 0 for row in rows if row["arch"] == arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shared_memory_fits(rows, arch) -> None:
    selected = [row for row in rows if row["arch"] == arch]
    assert {name(row): row["shared"] for row in selected if row["shared"] > row["shared_limit"]} == {}
    assert any(row["shared"] > 0 for row in selected)


def test_hopper_multiplies_16_bit_operands_with_wgmma(rows) -> None:
    selected = [
        row
        for row in rows
        if row["arch"] == "sm_90" and "_logprob_kernel" in row["kernel"] and row["label"][1:4] != "p32"
    ]
    assert len(selected) >= 10
    assert [name(row) for row in selected if not row["wgmma"]] == []


def test_nothing_is_multiplied_in_tf32(rows) -> None:
    assert [name(row) for row in rows if row["tf32"]] == []

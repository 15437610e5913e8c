"""The parts that every benchmark's report shares: options, versions, tables and files."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")


def options(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark: ``--out`` and ``--dry-run``."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m {module}", description=description, formatter_class=form)
    default = Path(os.environ.get("OUT") or RESULTS)
    parser.add_argument("--out", type=Path, default=default, help="folder for the files (default: $OUT, or results/)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU: whether everything runs")
    return parser


def require_cuda(parser: argparse.ArgumentParser, dry_run: bool) -> torch.device:
    """The device of a benchmark for GPUs. A dry run gets the CPU, and kernels imported later are interpreted."""
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run tries everything on a CPU with tiny shapes")
    return torch.device("cpu" if dry_run else "cuda")


def about_this_run(device: str) -> dict[str, Any]:
    """Commit, versions, device and date, for every row and every report."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()} ({torch.get_num_threads()} threads)"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": commit(), "versions": versions, "device_name": name, "date": now}


def commit() -> str:
    """The current commit, and whether code has changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "d2o_fast", "kernels", "benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git history here)"


def heading(title: str, about: dict[str, Any], dry_run: bool = False) -> list[str]:
    """Title, date, commit, machine and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return [
        f"# {title}{': a dry run, not a measurement' if dry_run else ''}",
        "",
        f"{about['date']}, commit {about['commit']}, {about['device_name']}; {versions}.",
        "",
    ]


def table(columns: str, rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table's lines as Markdown. ``columns``: titles between bars."""
    lines = [f"| {columns} |", "|---" * (columns.count("|") + 1) + "|"]
    for row in rows:
        cells = ["" if cell is None else str(cell).replace("|", "/").replace("\n", " ") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def milliseconds(row: dict[str, Any]) -> str:
    """Median and quartiles (``timing.quartiles``) for a cell."""
    return f"{row['ms']:.4g} ({row['ms_q1']:.4g} - {row['ms_q3']:.4g})" if "ms" in row else ""


def place(out: Path, name: str, device: str, dry_run: bool) -> Path:
    """The path for ``save``. A dry run's report does not replace the measured one."""
    return out / f"{name}-{device}{'-tiny' if dry_run else ''}"


def save(path: Path, lines: Sequence[str], about: dict[str, Any], **content: Any) -> str:
    """Writes the report to ``path``.md and its numbers to ``path``.json. Returns the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines).rstrip() + "\n"
    path.with_name(path.name + ".md").write_text(text, encoding="utf-8")
    path.with_name(path.name + ".json").write_text(json.dumps({"about": about, **content}, indent=1) + "\n")
    return text

"""``d2o doctor``: lists this machine's software and devices, the paths that run here, and why others do not."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from typing import Any

import torch

from d2o_fast.checks import world_size
from d2o_fast.errors import D2OError
from d2o_fast.forward.flash import CpuFlash, CudaFlash, FlashAttnPackage
from d2o_fast.loss.ops import choose_engine
from d2o_fast.software import version_of

PACKAGES = ("torch", "triton", "transformers", "datasets", "peft", "flash-attn", "liger-kernel", "tensorboard")


def doctor(as_json: bool = False) -> int:
    """Prints the report as a table, or as one JSON object. Always returns 0."""
    report = examine()
    print(json.dumps(report, indent=1) if as_json else _table(report))
    return 0


def examine() -> dict[str, Any]:
    """The report: versions in ``software`` (None if missing), ``devices``, and the paths of each job in ``paths``."""
    return {
        "software": {"d2o-fast": version_of("d2o-fast"), "python": platform.python_version()}
        | {name: version_of(name) for name in PACKAGES},
        "devices": _devices(),
        "paths": {
            "loss": _loss(),
            "sampler": {"runs": "generate", "not": {"a server": "where server_url names it"}},
            "attention": _attention(),
            "prompts": _prompts(),
            "liger-kernel": _liger(),
            "LoRA": _lora(),
            "processes": _processes(),
        },
    }


def _devices() -> list[dict[str, Any]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.processor() or platform.machine(), "cores": cores, "GiB": _host_memory()}
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"{properties.major}.{properties.minor}"
        memory = round(properties.total_memory / 2**30, 1)
        bf16 = torch.cuda.is_bf16_supported()
        devices.append(
            {"device": f"cuda:{i}", "name": properties.name, "capability": capability, "bf16": bf16, "GiB": memory}
        )
    return devices


def _host_memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not on this platform
        return None


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _loss() -> dict[str, Any]:
    probe = torch.empty(0, device=_device())
    others = {}
    try:
        runs = choose_engine("auto", probe).name
    except (ImportError, ValueError) as error:  # a GPU without Triton: torch runs only on request
        return {"runs": "none", "not": {"triton": str(error), "torch": "only where backend='torch' asks for it"}}
    if runs == "torch":
        try:
            choose_engine("triton", probe)
            others["triton"] = "this is Triton's interpreter (TRITON_INTERPRET=1), for tests only"
        except (ImportError, ValueError) as error:
            others["triton"] = str(error)
    else:
        others["torch"] = "triton is faster here"
    return {"runs": f"{runs} on {probe.device}", "not": others}


def _attention() -> dict[str, Any]:
    if _device().type != "cuda":
        reason = "needs a CUDA device"
    elif version_of("flash-attn") is None:
        reason = "flash-attn is not installed (pip install 'd2o-fast[gpu]')"
    elif importlib.util.find_spec("flash_attn") is None:
        reason = "flash-attn is installed but cannot be imported"
    else:
        return {"runs": "sdpa; flash_attention_2 with attn_implementation", "not": {}}
    return {"runs": "sdpa (or what the model chooses)", "not": {"flash_attention_2": reason}}


def _prompts() -> dict[str, Any]:
    unknown = {"a model that cannot": "found out before its first step, and named with the reason in the log"}
    if _device().type != "cuda":
        return {"runs": f"read once for all responses (shared_prefix), by {CpuFlash.name}", "not": unknown}
    flash = f"read once for all responses (shared_prefix), by {CudaFlash.name} with dtype: bfloat16"
    if version_of("flash-attn") is not None:
        flash += f", or by {FlashAttnPackage.name} with attn_implementation: flash_attention_2"
    return {"runs": flash, "not": {"flash attention in float32": "no kernel: segment by segment, slower", **unknown}}


def _liger() -> dict[str, Any]:
    if _device().type != "cuda":
        return {"runs": "no", "not": {"use_liger_kernel": "needs a CUDA device"}}
    if version_of("liger-kernel") is None:
        reason = "liger-kernel is not installed (pip install 'd2o-fast[gpu]')"
        return {"runs": "no", "not": {"use_liger_kernel": reason}}
    return {"runs": "with use_liger_kernel", "not": {}}


def _lora() -> dict[str, Any]:
    if version_of("peft") is None:
        return {"runs": "no", "not": {"use_peft": "peft is not installed (pip install 'd2o-fast[lora]')"}}
    return {"runs": "with use_peft", "not": {"LoRA on the head": "the fused loss reads the head's weight directly"}}


def _processes() -> dict[str, Any]:
    others = {"more than one process or device": "not built yet; training in several would be refused"}
    try:
        runs = "one process, one device" if world_size() == 1 else "none (WORLD_SIZE > 1)"
    except D2OError as error:
        runs, others = "none", {"any": str(error), **others}
    return {"runs": runs, "not": others}


def _table(report: dict[str, Any]) -> str:
    lines = [f"  {name:<14}{found or 'not installed'}" for name, found in report["software"].items()]
    lines = ["Software", *lines, "", "Devices"]
    for device in report["devices"]:
        details = ", ".join(f"{name} {value}" for name, value in device.items() if name not in ("device", "name"))
        lines.append(f"  {device['device']:<14}{device['name']} ({details})")
    lines += ["", "Paths"]
    for job, path in report["paths"].items():
        lines.append(f"  {job:<14}{path['runs']}")
        lines += [f"  {'':<14}not {name}: {reason}" for name, reason in path["not"].items()]
    return "\n".join(lines)

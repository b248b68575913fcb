"""Singular directions of base weights, kept on the disk: minutes for a 7B model once, seconds with every later run.

A file is named after the SHA-256 of the weight, so it can never belong to another one. It is written under another name
first; one that cannot be read is worked out and written anew.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from pe_rlhf.system.cache import cache_dir
from pe_rlhf.system.files import new_file
from pe_rlhf.system.tensor_files import load_tensors, save_tensors
from reward.errors import InputError

# How many directions at each end of the spectrum are kept, unless more are asked for: all ranks up to this find theirs.
WIDTH = 64
# Part of every name; goes up when decompositions come out otherwise than before.
VERSION = 2
# Below this many rows or columns a decomposition takes no longer than the files would.
SMALLEST = 512


def read(weight_OI: Tensor, kind: str, count: int) -> dict[str, Tensor] | None:
    """What was kept for that weight, on its device; None where there is nothing, or less than `count` directions."""
    if min(weight_OI.shape) < SMALLEST:
        return None
    path = _path(weight_OI, kind)
    try:
        found = load_tensors(path, weight_OI.device) if path.is_file() else None
    except InputError:
        return None
    return found if found is not None and len(found.get("top_S", ())) >= count else None


def write(weight_OI: Tensor, kind: str, directions: dict[str, Tensor]) -> None:
    """Keep directions of a weight. A disk that is full or read-only is no reason to stop."""
    if min(weight_OI.shape) < SMALLEST:
        return
    path = _path(weight_OI, kind)
    # Copies: the two ends of a small matrix are the same memory, which safetensors refuses.
    copies = {name: tensor.cpu().contiguous().clone() for name, tensor in directions.items()}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, shared=True) as scratch:
            save_tensors(copies, scratch)


def _path(weight_OI: Tensor, kind: str) -> Path:
    # A GPU decomposes in fp32 where a CPU takes fp64: the least directions of one are not those of the other.
    kind += "" if weight_OI.device.type == "cpu" else f"-{weight_OI.device.type}"
    data = weight_OI.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{VERSION} {tuple(data.shape)} {data.dtype}".encode())
    digest.update(data.flatten().view(torch.uint8).numpy().data)
    return cache_dir() / "svd" / f"{digest.hexdigest()}-{kind}.safetensors"

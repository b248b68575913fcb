"""Tensors in safetensors files, with the errors that every other file has."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from reward.errors import InputError


def save_tensors(tensors: dict[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with texts `about` it. Raises `OSError` where it cannot, as every other file does."""
    try:
        save_file(tensors, path, about)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(f"{path}: {error}") from error


def load_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `InputError` where it is missing or damaged."""
    try:
        return load_file(path, device=str(device))
    except FileNotFoundError as error:
        raise InputError(f"{path}: is not there", kind="missing", file=path) from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: is damaged: {error}", kind="unreadable", file=path) from error


def about_tensors(path: Path) -> dict[str, str]:
    """What `save_tensors` was given as `about`, in a file that can be read."""
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]  # it has no types
        return file.metadata() or {}

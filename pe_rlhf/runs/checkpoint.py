"""Checkpoints of a stage, and roles as a stage hands them on.

A checkpoint is written whole under another name and then renamed, so a half-written one is never picked up; its tensors
are checked against a checksum when it is read. Only adapters, heads and optimizer state are in it, never the base.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pe_rlhf.adapters.specs import RoleSpec, spec_from_json
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.files import write_json
from pe_rlhf.system.progress import say
from reward.errors import InputError


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    *,
    keep: int = 2,
    score: float | None = None,
) -> None:
    """Write `folder/checkpoints/step-N`; drop all but the newest `keep` and the one of the highest score.

    Rank 0 writes, and no rank goes on before it has: one that ended meanwhile would take rank 0 with it.
    """
    state = {"step": step, **state} | ({} if score is None else {"score": score})
    on_main(lambda: _write_checkpoint(folder, step, tensors, state, keep))


def _write_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> None:
    root = folder / "checkpoints"
    scratch, target = root / f".step-{step:06d}.tmp", root / f"step-{step:06d}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    file = scratch / "state.safetensors"
    save_tensors(tensors, file)
    write_json(scratch / "state.json", {**state, "sha256": _sha256(file, state)})
    for written in (file, scratch / "state.json", scratch):
        _flush(written)
    if target.exists():
        shutil.rmtree(target)
    scratch.rename(target)
    _flush(root)
    there = sorted(root.glob("step-*"))
    # The one just written stays, though damaged ones of later steps may lie there.
    for old in set(there) - {target, _best(there), *there[-keep:]}:
        shutil.rmtree(old)


def _best(there: list[Path]) -> Path | None:
    """The earliest checkpoint of the highest score; None where none has one."""
    best = max(there, key=_score, default=None)
    return best if best is not None and _score(best) > -math.inf else None


def _score(path: Path) -> float:
    """What a checkpoint was worth when it was written; one that cannot be read, or has none, is worth nothing."""
    try:
        score = json.loads((path / "state.json").read_text(encoding="utf-8")).get("score")
    except (OSError, ValueError, AttributeError):
        score = None
    return score if isinstance(score, int | float) and math.isfinite(score) else -math.inf


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest valid checkpoint as `(step, tensors, state)`, or None; a damaged one is named and passed over."""
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        try:
            return _read_checkpoint(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            say(f"{path} is damaged ({error}); trying the one before")
    return None


def role_of_checkpoint(folder: Path, which: str, role: str) -> tuple[int, RoleSpec, dict[str, Tensor]]:
    """A role as it was at the checkpoint `best`, `newest`, or of a step's number: the step, its spec and its state.

    Raises `InputError` where there is none, or where it is damaged.
    """
    there = sorted((folder / "checkpoints").glob("step-*"))
    steps = [int(path.name.removeprefix("step-")) for path in there]
    if not there or (which not in ("best", "newest") and which not in map(str, steps)):
        has = f"there are best, newest, {', '.join(map(str, steps))}" if there else "there are none"
        raise InputError(f"{folder / 'checkpoints'} has no checkpoint {which!r}; {has}")
    if which == "best":
        path = _best(there) or there[-1]
    else:
        path = there[-1] if which == "newest" else there[steps.index(int(which))]
    try:
        step, tensors, state = _read_checkpoint(path)
        return step, spec_from_json(state["specs"][role]), without_prefix(role, tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: the {role} cannot be read here: {error}") from error


def _read_checkpoint(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.pop("sha256") != _sha256(path / "state.safetensors", state):
        raise ValueError("its checksum is wrong")
    return state["step"], load_file(path / "state.safetensors"), state


def roles_in(backbone: Backbone, *roles: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint keeps of roles: their tensors, each under its role's name, and how they are made.

    The tensors are not copied: a fully tuned role has as many as the model.
    """
    states = {role: backbone.role_state(role, copy=False) for role in roles}
    tensors = {key: value for role in roles for key, value in with_prefix(role, states[role]).items()}
    return tensors, {"specs": {role: backbone.specs[role].as_json() for role in roles}}


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `prefix/`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are under `prefix/`, without it."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises `OSError` where it cannot be written, as every other file does."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _sha256(path: Path, state: dict[str, Any]) -> str:
    """One checksum over the tensors' file and the state beside it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

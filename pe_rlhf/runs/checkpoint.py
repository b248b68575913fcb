"""Checkpoints of a stage.

A checkpoint appears whole or not at all, and its tensors are checked against a checksum when it is read. It holds only
adapters, heads and optimizer state, never the base.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from pe_rlhf.adapters.specs import RoleSpec
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.tensors import with_prefix, without_prefix
from pe_rlhf.runs.layout import CheckpointFiles, StageFiles
from pe_rlhf.runs.saved_roles import read_spec
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.files import new_folder, read_json, write_json
from pe_rlhf.system.progress import say
from pe_rlhf.system.tensor_files import load_tensors, save_tensors
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
    """Write `checkpoints/step-N` in a stage's folder; keep only the newest `keep` and the one of the highest score.

    Rank 0 writes, and no rank goes on before it has: one that ended meanwhile would take rank 0 with it.
    """
    state = {"step": step, **state} | ({} if score is None else {"score": score})
    on_main(lambda: _write_checkpoint(StageFiles(folder), step, tensors, state, keep))


def _write_checkpoint(
    files: StageFiles, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int
) -> None:
    with new_folder(files.checkpoint(step).folder) as scratch:
        made = CheckpointFiles(scratch)
        save_tensors(tensors, made.tensors)
        write_json(made.state, {**state, "sha256": _sha256(made.tensors, state)})
    there = files.checkpoints_there()
    # The one just written stays, even where damaged ones of later steps are there, which count as newer.
    kept = {step, _best(there), *(later for later, _ in there[-keep:])}
    for old, checkpoint in there:
        if old not in kept:
            shutil.rmtree(checkpoint.folder)


def _best(there: list[tuple[int, CheckpointFiles]]) -> int | None:
    """The step of the highest score, the first of equal ones; None where no checkpoint has a score."""
    scores = {step: _score(checkpoint) for step, checkpoint in there}
    best = max(scores, key=scores.__getitem__, default=None)
    return best if best is not None and scores[best] > -math.inf else None


def _score(checkpoint: CheckpointFiles) -> float:
    """The score that a checkpoint was saved with; −∞ where it has none or cannot be read."""
    try:
        score = read_json(checkpoint.state).get("score")
    except InputError:
        return -math.inf
    return score if isinstance(score, int | float) and math.isfinite(score) else -math.inf


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest valid checkpoint of a stage's folder as `(step, tensors, state)`, or None.

    A damaged one is reported and passed over.
    """
    for _, checkpoint in reversed(StageFiles(folder).checkpoints_there()):
        try:
            return _read_checkpoint(checkpoint)
        except InputError as error:
            say(f"{checkpoint.folder} is damaged ({error}); trying the one before")
    return None


def newest_step(folder: Path) -> int:
    """The step of the checkpoint that `load_checkpoint` would give; 0 where there is none."""
    for _, checkpoint in reversed(StageFiles(folder).checkpoints_there()):
        try:
            return _checked_state(checkpoint)["step"]
        except InputError:
            continue
    return 0


def role_of_checkpoint(folder: Path, which: str, role: str) -> tuple[int, RoleSpec, dict[str, Tensor]]:
    """A role as it was at a checkpoint: the step, its spec and its state.

    `which` is `best`, `newest` or a step's number. Raises `InputError` where there is no such one, or it is damaged.
    """
    there = dict(StageFiles(folder).checkpoints_there())
    if not there or (which not in ("best", "newest") and which not in map(str, there)):
        has = f"there are best, newest, {', '.join(map(str, there))}" if there else "there are none"
        place = StageFiles(folder).checkpoints
        raise InputError(f"{place} has no checkpoint {which!r}; {has}", kind="missing", key="checkpoint", file=place)
    best = _best(list(there.items())) if which == "best" else None
    step = best or (int(which) if which.isdecimal() else max(there))
    _, tensors, state = _read_checkpoint(there[step])
    return step, read_spec(state["specs"].get(role), there[step].state), without_prefix(f"{role}/", tensors)


def roles_of_checkpoints(folder: Path) -> set[str]:
    """The roles that a stage's checkpoints hold; empty where there are none that can be read."""
    for _, checkpoint in reversed(StageFiles(folder).checkpoints_there()):
        try:
            return set(read_json(checkpoint.state)["specs"])
        except InputError:
            continue
    return set()


def _read_checkpoint(checkpoint: CheckpointFiles) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    state = _checked_state(checkpoint)
    return state["step"], load_tensors(checkpoint.tensors), state


def _checked_state(checkpoint: CheckpointFiles) -> dict[str, Any]:
    """What a checkpoint says besides its tensors. Raises `InputError` where either file is damaged."""
    state = read_json(checkpoint.state)
    checksum = state["sha256"]
    del state["sha256"]
    if not checkpoint.tensors.is_file() or checksum != _sha256(checkpoint.tensors, state):
        raise InputError(f"{checkpoint.folder}: its checksum is wrong", kind="unreadable", file=checkpoint.folder)
    return state


def roles_in(backbone: Backbone, *roles: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint keeps of roles: their tensors, each under its role's name, and how they are made.

    The tensors are not copied: a fully tuned role has as many as the model.
    """
    tensors: dict[str, Tensor] = {}
    for role in roles:
        tensors |= with_prefix(f"{role}/", backbone.role_state(role, copy=False))
    return tensors, {"specs": {role: backbone.specs[role].as_json() for role in roles}}


def _sha256(path: Path, state: dict[str, Any]) -> str:
    """One checksum over the tensors' file and the state beside it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()

"""Where a command may write: nothing of another kind is overwritten or mixed with, and no answer to another question.

One rule for the results of all commands: what was `asked` is in the result's JSON. Where a result is there, it is
written again only for the same question; for another one the command is refused before it computes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pe_rlhf.config.load import flat
from pe_rlhf.runs.layout import STAGE_INFO, ComparisonFiles, EvaluationFiles, RoleFiles, RunFiles, StageFiles
from pe_rlhf.system.files import read_json
from reward.errors import InputError


def claim_place(path: Path, key: str) -> None:
    """Raise `InputError` for a place, there or not yet, that has a file above it or where nothing may be written."""
    # Not by `Path.exists`: below a folder that may not be read it raises.
    above = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if not os.path.isdir(above):
        raise _taken(above, "a file", key)
    folder = path if os.path.isdir(path) else above
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        message = f"{key} {path}: nothing may be written into {folder}"
        raise InputError(message, kind="disk", key=key, file=folder, fix="name another place")


def claim_evaluation(folder: Path, key: str = "--out") -> None:
    """Raise `InputError` unless a folder is empty, not there, or one that `pe-rlhf evaluate` has written."""
    files, judged = EvaluationFiles(folder), StageFiles(folder)
    own = {files.responses(side) for side in ("candidate", "baseline", "best_of")}
    own |= {files.verdicts, files.best_of_verdicts, files.summary, files.report}
    own |= {judged.judged_rewards, judged.anchor_responses, judged.open_questions}  # of a reward that is a judge
    own |= {*folder.glob("candidate-turn-*.jsonl"), *folder.glob("baseline-turn-*.jsonl")} if folder.is_dir() else set()
    _claim(folder, {path.name for path in own}, "an evaluation", key)
    if files.summary.exists() and not files.verdicts.exists():
        raise _taken(folder, "results of something else than pe-rlhf evaluate", key)


def claim_reward_evaluation(folder: Path, key: str = "--out") -> None:
    """Raise `InputError` unless a folder is empty, not there, or one that `pe-rlhf evaluate-reward` has written."""
    files = EvaluationFiles(folder)
    _claim(folder, {files.summary.name, files.report.name}, "an evaluation of a reward model", key)
    if files.summary.exists() and "accuracy" not in read_json(files.summary):
        raise _taken(folder, "results of something else than pe-rlhf evaluate-reward", key)


def claim_run(folder: Path, key: str = "--run-dir") -> None:
    """Raise `InputError` for a folder that is a comparison's, an evaluation's, a stage's or a role's.

    Files of the user's may be beside a run: its data, for example.
    """
    claim_place(folder, key)
    folder = folder.resolve()
    if folder.is_file():
        raise _taken(folder, "a file", key)
    run, role = RunFiles(folder), RoleFiles(folder)
    others = [ComparisonFiles(folder).recipe, StageFiles(folder).metrics, EvaluationFiles(folder).verdicts]
    others += [role.description, role.adapter_config]
    if not run.recipe.exists() and not run.failure.exists():
        others += [run.summary, run.report]
    elif not (run.failure.exists() or any(run.stage(stage).folder.exists() for stage in STAGE_INFO)):
        others += [] if run.tasks.exists() or (folder / ".lock").exists() else [run.recipe]  # one of the user's
    if there := next((path for path in others if path.exists()), None):
        raise _taken(folder, f"{there.name}, and is not a run's", key)


def claim_comparison(folder: Path, key: str = "--dir") -> None:
    """Raise `InputError` unless a folder is empty, not there, or a comparison's."""
    if ComparisonFiles(folder).recipe.is_file():
        claim_place(folder, key)
    else:
        _claim(folder, (), "a comparison", key)


def claim_page(page: Path, key: str = "--to") -> None:
    """Raise `InputError` for a file that is there and is no page of `pe-rlhf inspect`, or the JSON beside it."""
    if page.suffix != ".html":
        raise InputError(f"{key} {page}: a page is a file that ends with .html", kind="invalid", key=key, file=page)
    claim_place(page, key)
    numbers = page.with_suffix(".json")
    if numbers.exists() and not (numbers.is_file() and {"inits", "kernel"} <= read_json(numbers).keys()):
        raise _taken(numbers, "something else than the numbers of such a page", key)
    if page.is_dir() or (page.exists() and not numbers.exists()):
        raise _taken(page, "something else than a page of pe-rlhf inspect", key)


def refuse_other_question(result: Path, asked: Mapping[str, Any], key: str = "--out") -> None:
    """Raise `InputError` where a result is there that does not answer what is asked now."""
    if not result.exists():
        return
    before, now = flat(read_json(result).get("asked", {})), flat(json.loads(json.dumps(asked)))
    other = next((name for name in (*now, *before) if before.get(name) != now.get(name)), None)
    if other is not None:
        raise InputError(
            f"{result} is there already, with other settings: {other}: {before.get(other)!r} → {now.get(other)!r}",
            kind="changed",
            key=other,
            file=result,
            fix=f"name another place with {key}, or remove what is there",
        )


def content_hash(content: Any) -> str:
    """What tells texts that were asked about from others."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _claim(folder: Path, own: Collection[str], what: str, key: str) -> None:
    claim_place(folder, key)
    folder = folder.resolve()  # `absent/..` is a place that is there, too
    if folder.exists() and not folder.is_dir():
        raise _taken(folder, "a file", key)
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if foreign := [name for name in there if name not in own and not name.startswith(".")]:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise _taken(folder, f"{foreign[0]}{more}, which {what} does not have", key)


def _taken(path: Path, what: str, key: str) -> InputError:
    message = f"{key} {path} holds {what}" if path.is_dir() else f"{key} {path} is {what}"
    return InputError(message, kind="exists", key=key, file=path, fix="name another place")

"""The kinds of judges by name, and how a recipe or the command line names one: `KIND` or `KIND:TARGET`.

A kind is a factory of `JudgeSettings`. A factory may also have two methods that load no model and ask no server:
`check(settings, run_dir)` raises `InputError` for a mistake that can be seen, and `prompt_check(settings)` gives what
raises it for a prompt that the judge could not read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from reward.errors import InputError, look_up
from reward.judges.base import Judge
from reward.judges.functions import FunctionKind
from reward.judges.judge_settings import JudgeSettings
from reward.judges.length import LengthKind
from reward.records import Prompt

JudgeFactory = Callable[[JudgeSettings], Judge]
_KINDS: dict[str, JudgeFactory] = {"function": FunctionKind(), "length": LengthKind()}


def register_judge(kind: str, factory: JudgeFactory) -> None:
    """Add a kind of judge. Raises `InputError` for a name that is taken."""
    if kind in _KINDS:
        raise InputError(f"the judge {kind!r} is registered already", kind="exists", key="judge")
    _KINDS[kind] = factory


def judge_kinds() -> list[str]:
    return sorted(_KINDS)


def judge_settings(judge: str | JudgeSettings) -> JudgeSettings:
    """Settings with kind and target, where the kind is `KIND:TARGET`, or `module:callable` for a `function`."""
    settings = JudgeSettings(kind=judge) if isinstance(judge, str) else judge
    kind, colon, target = settings.kind.partition(":")
    if not colon:
        return settings
    if settings.target is not None:
        raise InputError(
            f"judge: kind {settings.kind!r} names a target, and target another one", kind="conflict", key="judge.target"
        )
    found = (
        {"kind": kind, "target": target or None} if kind in _KINDS else {"kind": "function", "target": settings.kind}
    )
    return settings.model_copy(update=found)


def make_judge(judge: str | JudgeSettings) -> Judge:
    """The judge that is named. Raises `InputError` for an unknown kind, with the nearest one, and for its settings."""
    settings = judge_settings(judge)
    return _factory(settings.kind)(settings)


def check_judge(judge: str | JudgeSettings, run_dir: Path | None = None) -> None:
    """Raise `InputError` for a mistake that can be seen without loading a model or asking a server.

    run_dir: the run that asks; what one of its own stages will make does not have to be there yet.
    """
    settings = judge_settings(judge)
    check = getattr(_factory(settings.kind), "check", None)
    if check is not None:
        check(settings, run_dir)


def judge_prompt_check(judge: str | JudgeSettings) -> Callable[[Prompt], None]:
    """What raises `InputError` for a prompt that the judge could not read, known before anything is sampled."""
    settings = judge_settings(judge)
    make = getattr(_factory(settings.kind), "prompt_check", None)
    return (lambda _: None) if make is None else make(settings)


def _factory(kind: str) -> JudgeFactory:
    return look_up(_KINDS, kind, f"judge: {kind!r} is neither a kind of judge nor module:callable", "judge")

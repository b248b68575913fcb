"""The errors that end a command with one sentence: what was wrong, where, what to do.

Code never reads the sentence. It reads `kind` and the fields, which `failure.json` has as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

T = TypeVar("T")

Kind = Literal[
    # the user's input
    "missing",  # a file, directory, model, column or setting that is needed is not there
    "unreadable",  # a file that is there cannot be parsed or is damaged
    "unknown",  # a name that does not exist: key, stage, role, init, judge, option
    "invalid",  # a value of the wrong type, form or range
    "conflict",  # two settings that exclude each other, or one that the model or machine cannot take
    "empty",  # nothing is left to work on
    "too_long",  # more tokens than the model takes
    "exists",  # it would overwrite what is there
    "in_use",  # another process has it
    "unfinished",  # an earlier stage has not finished
    "changed",  # not what it was when the run, verdict or adapter was made
    "not_installed",  # an optional dependency is missing
    "user_code",  # a function of the user failed or returned something unusable
    # while it runs
    "not_finite",  # a loss, gradient, logit or score is NaN or infinite
    "kl_limit",  # the KL is over `ppo.kl.limit`
    "mismatch",  # the sampler's log-probs are not the trainer's
    "server",  # a server is down, too slow, or answers something else
    "process",  # a process of ours died or does not answer
    "judge",  # too many verdicts are unusable
    "budget",  # the number of requests that was allowed is spent
    "memory",  # out of memory
    "disk",  # a file cannot be written
]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Failure(Exception):
    """A failure that was foreseen.

    Args:
        message: what was wrong and where, for people.
        kind: what it is, for programs.
        key: the recipe key, column or option that it is about.
        file: the file or directory that it is about.
        row: the row or line in the file, counted from 1.
        step: the training step.
        fix: what to do about it; the sentence ends with it.
    """

    exit_code = 1
    kind: Kind

    def __init__(
        self,
        message: str,
        *,
        kind: Kind = "invalid",
        key: str | None = None,
        file: str | Path | None = None,
        row: int | None = None,
        step: int | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(message if fix is None else f"{message}; {fix}")
        self.kind: Kind = kind
        self.key, self.row, self.step, self.fix = key, row, step, fix
        self.file = None if file is None else str(file)

    def at(self, place: str, **known: Any) -> Self:
        """The same failure with the place where it happened, a stage for example, in front of its sentence.

        `known` are fields that the place adds: the function that parses a row does not know its file and number.
        """
        fields: dict[str, Any] = {name: getattr(self, name) for name in ("kind", "key", "file", "row", "step")}
        moved = type(self)(f"{place}: {self}", **fields | known)
        moved.fix = self.fix
        return moved

    def fields(self) -> dict[str, Any]:
        """What `failure.json` says: the message, and those of the fields that are known."""
        known = {name: getattr(self, name) for name in ("kind", "key", "file", "row", "step", "fix")}
        return {"message": str(self)} | {name: value for name, value in known.items() if value is not None}


class InputError(Failure, ValueError):
    """A recipe, file or argument is wrong. Exit code 2."""

    exit_code = 2


class JudgeError(Failure, RuntimeError):
    """A judge cannot go on: its server is down, too many answers are unusable, a budget is spent. Exit code 3.

    The verdicts so far are kept, and the same command goes on from them.
    """

    exit_code = 3


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The nearest of the names that there are, as the `fix` of a failure; None where none is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else None


def look_up(registry: Mapping[str, T], name: str, message: str, key: str, file: str | None = None) -> T:
    """What is registered under a name. Raises `InputError` with the message, the names and the nearest of them."""
    if name not in registry:
        known = ", ".join(sorted(registry))
        raise InputError(
            f"{message}; there are {known}", kind="unknown", key=key, file=file, fix=did_you_mean(name, registry)
        )
    return registry[name]

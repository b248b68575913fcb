"""How a run fails: the errors of training, and the `failure.json` that a failed run leaves behind.

The user's mistakes are `reward.errors.InputError`; every error that was foreseen has a kind and fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pe_rlhf.system.files import write_json
from reward.errors import Failure, InputError, JudgeError

__all__ = [
    "ElsewhereError",
    "Failure",
    "InputError",
    "JudgeError",
    "Stopped",
    "TrainingError",
    "at_step",
    "failure_noted",
]

REFUSALS = ("exists", "changed", "unfinished", "in_use")
IN_USE = 75  # exit code of a command whose folder another process has


class TrainingError(Failure, RuntimeError):
    """Training cannot go on (a NaN, a KL over its limit); the last good checkpoint is in place. Exit code 3."""

    exit_code = 3


class Stopped(Exception):
    """A run that was asked to stop and has saved; `code` is its exit code, 128 + the signal's number."""

    def __init__(self, message: str, number: int, hint: str = "--resume continues from there") -> None:
        super().__init__(f"{message}; {hint}")
        self.code = 128 + number


class ElsewhereError(RuntimeError):
    """Raised on the other ranks when rank 0 has failed; rank 0 prints the error."""


def failure_fields(error: BaseException) -> dict[str, Any]:
    """What `failure.json` says of an error; one that was not foreseen is of kind `bug`."""
    if isinstance(error, Failure):
        return error.fields() | {"exit_code": error.exit_code}
    if isinstance(error, OSError):
        where = {} if error.filename is None else {"file": str(error.filename)}
        return {"message": str(error), "kind": "disk", **where, "exit_code": TrainingError.exit_code}
    return {"message": f"{type(error).__name__}: {error}", "kind": "bug", "exit_code": 1}


@contextmanager
def at_step(step: int) -> Iterator[None]:
    """Give the failures of a training step its number, where they do not name one."""
    try:
        yield
    except Failure as error:
        error.step = step if error.step is None else error.step
        raise


@contextmanager
def failure_noted(path: Path) -> Iterator[None]:
    """Where the block fails, write the failure's fields to a file.

    A command that was refused because of what is there (`REFUSALS`) says nothing of the run: the file stays as it is.
    """
    try:
        yield
    except (Stopped, ElsewhereError):
        raise
    except Exception as error:
        if isinstance(error, Failure) and error.kind in REFUSALS:
            raise
        with suppress(OSError):  # a full disk must not hide the error
            write_json(path, failure_fields(error))
        raise

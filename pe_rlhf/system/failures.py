"""Errors that end a run with one clear sentence. A user's mistake is `reward.errors.InputError`."""


class TrainingError(RuntimeError):
    """Training cannot go on (a NaN, a KL over its limit); the last good checkpoint is in place."""


class Stopped(Exception):
    """A run that was asked to stop and has saved; `code` is its exit code, 128 + the signal's number."""

    def __init__(self, message: str, number: int, hint: str = "--resume continues from there") -> None:
        super().__init__(f"{message}; {hint}")
        self.code = 128 + number


class ElsewhereError(RuntimeError):
    """What a rank raises when rank 0 has failed and tells of it."""

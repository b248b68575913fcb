"""The judge that shows how much of a win rate is length: the longer response wins."""

from pathlib import Path

from reward.errors import InputError
from reward.judges.functions import FunctionJudge
from reward.judges.judge_settings import JudgeSettings
from reward.scores import length


def length_judge() -> FunctionJudge:
    """Longer wins, in characters."""
    return FunctionJudge(length, identity="length")


class LengthKind:
    """Makes the judge `length`."""

    def __call__(self, settings: JudgeSettings) -> FunctionJudge:
        self.check(settings)
        return length_judge()

    def check(self, settings: JudgeSettings, run_dir: Path | None = None) -> None:
        if settings.target:
            raise InputError(
                f"judge: length takes no target, not {settings.target!r}", kind="invalid", key="judge.target"
            )

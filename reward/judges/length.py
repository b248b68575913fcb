"""The judge that shows how much of a win rate is length: the longer response wins."""

from reward.judges.functions import FunctionJudge
from reward.scores import length


def length_judge() -> FunctionJudge:
    """Longer wins, in characters."""
    return FunctionJudge(length, identity="length")

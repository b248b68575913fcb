"""A reward model as a judge: A wins with probability σ(r_A − r_B), the Bradley–Terry model it is trained with."""

import math
from collections.abc import Callable

from reward.judges.functions import FunctionJudge, ScoreFunction
from reward.records import Prompt


def reward_model_judge(
    score: ScoreFunction,
    identity: str,
    rest: Callable[[], None] = lambda: None,
    refusal: Callable[[Prompt], str | None] = lambda _: None,
) -> FunctionJudge:
    """A judge from rewards of (prompts, responses), in nats; `rest` and `refusal` as `FunctionJudge` has them."""
    identity = f"reward_model:{identity}"
    return FunctionJudge(score, identity=identity, probability=_bradley_terry, rest=rest, refusal=refusal)


def _bradley_terry(difference: float) -> float:
    return 1 / (1 + math.exp(-difference)) if difference > -700 else 0.0

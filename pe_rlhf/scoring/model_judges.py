"""All kinds of judges: importing this module adds the kinds that need our models to those of `reward.judges`.

A judge of your own is one file with its factory, and one line here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pe_rlhf.scoring.chat_judge import ChatKind
from pe_rlhf.scoring.reward_judge import RewardModelKind
from pe_rlhf.system.progress import progress
from reward.asking import Pair, judge_pairs
from reward.judges import Judge
from reward.judges.judge_registry import check_judge, judge_settings, make_judge, register_judge
from reward.judges.judge_settings import JudgeSettings
from reward.judges.jury import JuryKind
from reward.judges.rating import RatingJudge
from reward.judges.templates import RatingPrompt
from reward.summary import Outcome

__all__ = ["ask_judge", "check_judge", "check_server", "make_judge"]

register_judge("llm", ChatKind())
register_judge("rating", ChatKind(RatingJudge, RatingPrompt))
register_judge("reward_model", RewardModelKind())
register_judge("jury", JuryKind())


def check_server(judge: str | JudgeSettings) -> None:
    """Raise `InputError` or `JudgeError` where a server that a judge asks does not answer, or refuses the key."""
    settings = judge_settings(judge)
    for member in settings.judges if settings.kind == "jury" else ():
        check_server(member)
    if settings.base_url is not None:
        from reward.judges.endpoint import Endpoint  # the client library takes a second to import

        Endpoint(settings.target or "", settings.base_url, settings).check_server()


def ask_judge(
    judge: Judge | None, pairs: Sequence[Pair], path: Path, *, title: str, names: tuple[str, str], max_invalid: float
) -> list[Outcome]:
    """`judge_pairs` with progress; `names` are those of candidate and baseline.

    `judge` is None on the ranks that do not ask.
    """
    assert judge is not None
    candidate, baseline = names
    with progress(title, len(pairs) * (2 if judge.sees_order else 1), "verdicts") as advance:
        return judge_pairs(
            judge,
            pairs,
            path,
            candidate=candidate,
            baseline=baseline,
            max_invalid_share=max_invalid,
            advance=advance,
        )

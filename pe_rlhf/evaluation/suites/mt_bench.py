"""MT-Bench (arXiv 2306.05685): 80 questions with a follow-up, against GPT-3.5 Turbo's answers, pair by pair.

Each turn is one comparison; at the second one the judge reads both conversations. In the suite's number a verdict that
turns with the order is a tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pe_rlhf.evaluation.suites.suite import Suite
from reward.summary import Outcome


def score(outcomes: Sequence[Outcome], summary: dict[str, Any]) -> dict[str, Any]:
    """Wins plus half the ties, where only a verdict that holds in both orders wins; over all, and by turn.

    Of a judge that rates also the candidate's mean rating, as single-answer grading has it.
    """
    by_turn: dict[int, list[float]] = {}
    ratings = [o.verdict.score_a for o in outcomes if o.is_valid and o.verdict.score_a is not None]
    rated = {"suite_rating": sum(ratings) / len(ratings)} if ratings else {}
    for outcome in outcomes:
        if outcome.is_valid:
            signs = {(v.preference > 0.5) - (v.preference < 0.5) for v in outcome.verdicts}
            result = (1 + signs.pop()) / 2 if len(signs) == 1 else 0.5
            by_turn.setdefault(outcome.verdict.sample + 1, []).append(result)
    every = [result for results in by_turn.values() for result in results]
    turns = {f"suite_score_turn_{turn}": sum(r) / len(r) for turn, r in sorted(by_turn.items())}
    return {"suite_score": sum(every) / len(every) if every else math.nan, **turns, **rated}


SUITE = Suite(
    name="mt_bench",
    hub="lmsys/mt-bench",
    hub_type="space",
    questions="data/mt_bench/question.jsonl",
    answers="data/mt_bench/model_answer/gpt-3.5-turbo.jsonl",
    references="data/mt_bench/reference_answer/gpt-4.jsonl",
    baseline="gpt-3.5-turbo",
    judge={"template": "mt_bench", "verdict": "text"},
    judge_texts=("judge_prompts.jsonl", "data/judge_prompts.jsonl"),
    max_new_tokens=1024,
    score=score,
)

"""Arena-Hard (arXiv 2406.11939), version 2.0's hard prompts, against o3-mini; version 0.1's files are read, too.

The judge writes an answer of its own first and ends with one of five labels. In the suite's number a clear verdict
(`A>>B`) has the weight of three, and both orders are single games.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pe_rlhf.evaluation.suites.suite import Suite
from reward.judges.answers import five_way
from reward.summary import Outcome

CLEAR = 3.0  # the weight of A>>B


def score(outcomes: Sequence[Outcome], summary: dict[str, Any]) -> dict[str, Any]:
    """Mean of all valid games, in which a clear verdict counts three times."""
    games = [verdict for outcome in outcomes if outcome.is_valid for verdict in outcome.verdicts]
    weights = [CLEAR if ">>" in (five_way(game.raw or "") or "") else 1.0 for game in games]
    total = sum(weights)
    won = sum(weight * game.preference for weight, game in zip(weights, games, strict=True))
    return {"suite_score": won / total if total else math.nan}


SUITE = Suite(
    name="arena_hard",
    hub="lmarena-ai/arena-hard-auto",
    questions="data/arena-hard-v2.0/question.jsonl",
    answers="data/arena-hard-v2.0/model_answer/o3-mini-2025-01-31.jsonl",
    baseline="o3-mini-2025-01-31",
    categories=("hard_prompt", "arena-hard-v0.1"),
    judge={"template": "arena_hard", "verdict": "text"},
    judge_texts=("judge_config.yaml", "*arena-hard*.yaml", "config/judge_config.yaml"),
    max_new_tokens=4096,
    score=score,
)

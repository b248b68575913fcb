"""AlpacaEval 2 (arXiv 2404.04475): 805 instructions, against GPT-4 Turbo's answers of November 2023.

Its number is the length-controlled win-rate, from the probabilities of the judge's labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pe_rlhf.evaluation.suites.suite import Suite
from reward.summary import Outcome


def score(outcomes: Sequence[Outcome], summary: dict[str, Any]) -> dict[str, Any]:
    """The length-controlled win-rate; with the instructions' difficulties in the folder it has AlpacaEval's prior."""
    return {"suite_score": summary.get("length_controlled_win_rate")}


SUITE = Suite(
    name="alpaca_eval",
    hub="tatsu-lab/alpaca_eval",
    questions="alpaca_eval_gpt4_baseline.json",
    answers="alpaca_eval_gpt4_baseline.json",
    baseline="gpt4_1106_preview",
    judge={"template": "general", "verdict": "auto"},
    judge_texts=("alpaca_eval_clf.txt", "*clf*.txt"),
    max_new_tokens=2048,
    score=score,
    difficulty=("instruction_difficulty*.csv", "df_gamed.csv"),
)

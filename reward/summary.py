"""From verdicts to results: both orders of a pair become one comparison, and each candidate gets its line."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward.agreement import agreement
from reward.errors import InputError
from reward.length_control import length_controlled_win_rate
from reward.verdicts import FIRST, SECOND, VerdictRow
from reward.winrate import bootstrap_interval, sign_test, win_rate


@dataclass(frozen=True)
class Outcome:
    """One pair after all orders in which it was asked. preference: NaN where it is invalid; `row` has its columns.

    flipped: the verdict turned with the order. first_wins: how often what stood first won, None for one order.
    """

    preference: float
    flipped: bool
    first_wins: float | None
    row: VerdictRow


def combine_orders(candidate_first: float, baseline_first: float) -> tuple[float, bool]:
    """One preference from both orders, and whether they contradict each other.

    Both are the candidate's probability. Where one order says that it wins and the other that it loses, the pair counts
    half; else the mean counts. An invalid (NaN) order makes the pair invalid.
    """
    flipped = (candidate_first - 0.5) * (baseline_first - 0.5) < 0
    return (0.5 if flipped else (candidate_first + baseline_first) / 2), flipped


def pair_up(rows: Iterable[VerdictRow]) -> list[Outcome]:
    """One outcome per pair; rows without an order stand alone, and a pair that still lacks an order is left out.

    Raises `InputError` where a pair has two verdicts in one order, or rows with an order have no position.
    """
    outcomes: list[Outcome] = []
    pairs: dict[Hashable, dict[str, VerdictRow]] = defaultdict(dict)
    for row in rows:
        if row.order is None:
            outcomes.append(Outcome(row.preference, False, None, row))
            continue
        if row.position is None:
            raise InputError("verdicts with an order need the position of their prompt, to find the other order by")
        pair = pairs[row.candidate, row.baseline, row.position, row.sample]
        if row.order in pair:
            raise InputError(f"{row.candidate} has two verdicts on prompt {row.position} in the order {row.order}")
        pair[row.order] = row
    for pair in pairs.values():
        if len(pair) == 2:
            first, second = pair[FIRST].preference, pair[SECOND].preference
            preference, flipped = combine_orders(first, second)
            outcomes.append(Outcome(preference, flipped, (first + 1 - second) / 2, pair[FIRST]))
    return outcomes


def summarise(
    candidate: str, outcomes: Sequence[Outcome], difficulty: Sequence[float] | None = None, level: float = 0.95
) -> dict[str, Any]:
    """The result line of one candidate; shares are in [0, 1]. difficulty: of each instruction, by position.

    n counts the valid comparisons. Length control needs the lengths of every pair. Raises `InputError` where no
    comparison is valid.
    """
    valid = [outcome for outcome in outcomes if not math.isnan(outcome.preference)]
    if not valid:
        raise InputError(f"none of the {len(outcomes)} verdicts on {candidate} is valid")
    clusters = _clusters(valid)
    preferences = np.array([outcome.preference for outcome in valid])
    result = win_rate(preferences, clusters, level)
    low, high = bootstrap_interval(preferences, clusters, level)
    line: dict[str, Any] = {
        "candidate": candidate,
        "win_rate": result.win_rate,
        "standard_error": result.standard_error,
        "ci_low": result.ci_low,
        "ci_high": result.ci_high,
        "n": result.n,
        "wins": result.wins,
        "ties": result.ties,
        "losses": result.losses,
        "invalid": len(outcomes) - len(valid),
        "bootstrap_low": low,
        "bootstrap_high": high,
        "sign_test_p": sign_test(_cluster_means(preferences - 0.5, clusters)),
    }
    line |= _order_metrics(valid) | _length_controlled(outcomes, difficulty, level) | _human_metrics(valid)
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in line.items()}


def group_by_candidate(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes of each candidate, in order of appearance."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.row.candidate, []).append(outcome)
    return groups


def _order_metrics(valid: Sequence[Outcome]) -> dict[str, Any]:
    """Flips, and by how much the response shown first wins more often than half the time."""
    asked_twice = [outcome for outcome in valid if outcome.first_wins is not None]
    if not asked_twice:
        return {}
    flips = sum(outcome.flipped for outcome in asked_twice)
    bias = float(np.mean([o.first_wins for o in asked_twice if o.first_wins is not None])) - 0.5
    return {"flips": flips, "flip_share": flips / len(asked_twice), "position_bias": bias}


def _length_controlled(outcomes: Sequence[Outcome], difficulty: Sequence[float] | None, level: float) -> dict[str, Any]:
    lengths = [(o.row.len_candidate, o.row.len_baseline) for o in outcomes]
    if any(length is None for pair in lengths for length in pair):
        return {}
    len_candidate, len_baseline = zip(*lengths, strict=True)
    known = _difficulties(outcomes, difficulty)
    clusters = _clusters(outcomes)
    controlled = length_controlled_win_rate(
        [o.preference for o in outcomes], len_candidate, len_baseline, known, clusters, level=level
    )
    return {
        "length_controlled_win_rate": controlled.win_rate,
        "length_controlled_standard_error": controlled.standard_error,
        "length_controlled_ci_low": controlled.ci_low,
        "length_controlled_ci_high": controlled.ci_high,
        "length_controlled_for": "length" if known is None else "length, difficulty",
        "mean_len_candidate": float(np.mean(len_candidate)),
        "mean_len_baseline": float(np.mean(len_baseline)),
    }


def _difficulties(outcomes: Sequence[Outcome], table: Sequence[float] | None) -> list[float] | None:
    own = [outcome.row.difficulty for outcome in outcomes]
    if all(value is not None for value in own):
        return [value for value in own if value is not None]
    if table is None:
        return None
    found: list[float] = []
    for outcome in outcomes:
        position = outcome.row.position
        if position is None or position >= len(table):
            raise InputError(f"there is a difficulty for positions 0 to {len(table) - 1}, but not for {position}")
        found.append(table[position])
    return found


def _human_metrics(valid: Sequence[Outcome]) -> dict[str, Any]:
    labelled = [(o.preference, o.row.human) for o in valid if o.row.human is not None]
    if not labelled:
        return {}
    result = agreement([judge for judge, _ in labelled], [human for _, human in labelled if human is not None])
    return {
        "human_accuracy": result.accuracy,
        "human_accuracy_low": result.ci_low,
        "human_accuracy_high": result.ci_high,
        "human_kappa": result.kappa,
        "human_n": result.n,
    }


def _clusters(outcomes: Sequence[Outcome]) -> list[Hashable]:
    """Comparisons of one prompt go together; one without a position stands alone."""
    return [i if o.row.position is None else ("position", o.row.position) for i, o in enumerate(outcomes)]


def _cluster_means(values: np.ndarray, clusters: Sequence[Hashable]) -> list[float]:
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for value, cluster in zip(values.tolist(), clusters, strict=True):
        groups[cluster].append(value)
    return [sum(group) / len(group) for group in groups.values()]

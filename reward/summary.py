"""From verdicts to results: both orders of a pair become one comparison, and each candidate gets its line."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from reward.agreement import Agreement, agreement
from reward.errors import InputError
from reward.length_control import length_controlled_win_rate
from reward.verdicts import FIRST, SECOND, Verdict
from reward.winrate import bootstrap_interval, sign_test, win_rate


@dataclass(frozen=True)
class Outcome:
    """One pair after all orders in which the judge was asked: one verdict, or two with `candidate_first` in front."""

    verdicts: tuple[Verdict, ...]

    @property
    def verdict(self) -> Verdict:
        """The first verdict: the columns of the pair, and scores, do not depend on the order."""
        return self.verdicts[0]

    @property
    def preference(self) -> float:
        """Probability that the candidate wins; NaN if any order is invalid."""
        return combine_orders(*self._both)[0] if len(self.verdicts) == 2 else self.verdict.preference

    @property
    def is_valid(self) -> bool:
        return not math.isnan(self.preference)

    @property
    def flipped(self) -> bool:
        """Whether the verdict turned with the order."""
        return len(self.verdicts) == 2 and combine_orders(*self._both)[1]

    @property
    def first_wins(self) -> float | None:
        """How often the response shown first won; None for a single order."""
        if len(self.verdicts) == 1:
            return None
        candidate_first, baseline_first = self._both
        return (candidate_first + 1 - baseline_first) / 2

    @property
    def _both(self) -> tuple[float, float]:
        candidate_first, baseline_first = self.verdicts
        return candidate_first.preference, baseline_first.preference


def combine_orders(candidate_first: float, baseline_first: float) -> tuple[float, bool]:
    """One preference from both orders, their mean, and whether they contradict each other.

    Both are the candidate's probability; it flipped if it wins in one order and loses in the other. An invalid (NaN)
    order makes the pair invalid.
    """
    mean = (candidate_first + baseline_first) / 2
    if abs(mean - 0.5) < 1e-12:  # p and 1 − p, up to rounding
        mean = 0.5
    return mean, (candidate_first - 0.5) * (baseline_first - 0.5) < 0


def pair_up(verdicts: Iterable[Verdict]) -> list[Outcome]:
    """One outcome per pair. A verdict without an order is an outcome; a pair that still lacks an order is left out.

    Raises `InputError` where a pair has two verdicts in one order, or a verdict with an order has no position.
    """
    outcomes: list[Outcome] = []
    pairs: dict[Hashable, dict[str, Verdict]] = defaultdict(dict)
    for verdict in verdicts:
        if verdict.order is None:
            outcomes.append(Outcome((verdict,)))
            continue
        if verdict.position is None:
            raise InputError(
                "a verdict with an order has no position to find the other order by", kind="missing", key="position"
            )
        pair = pairs[verdict.candidate, verdict.baseline, verdict.judge, verdict.position, verdict.sample]
        if verdict.order in pair:
            raise InputError(
                f"{verdict.candidate} has two verdicts on prompt {verdict.position} in the order {verdict.order}",
                kind="conflict",
                key="order",
            )
        pair[verdict.order] = verdict
    complete = (pair for pair in pairs.values() if len(pair) == 2)
    return outcomes + [Outcome((pair[FIRST], pair[SECOND])) for pair in complete]


def summarise(
    candidate: str, outcomes: Sequence[Outcome], difficulty: Sequence[float] | None = None, level: float = 0.95
) -> dict[str, Any]:
    """The result line of one candidate; shares are in [0, 1]. difficulty: of each instruction, by position.

    n counts the valid comparisons. Length control needs the lengths of every pair. Raises `InputError` where no
    comparison is valid.
    """
    valid = [outcome for outcome in outcomes if outcome.is_valid]
    if not valid:
        raise InputError(f"all {len(outcomes)} verdicts on {candidate} are invalid", kind="empty", key="preference")
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
    line |= _order_metrics(valid) | _label_mass(outcomes) | _jury(valid)
    line |= _length_controlled(outcomes, difficulty, level) | _human_metrics(valid)
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in line.items()}


def group_by_candidate(outcomes: Iterable[Outcome]) -> dict[tuple[str, str | None], list[Outcome]]:
    """Outcomes of each candidate and judge, in order of appearance."""
    groups: dict[tuple[str, str | None], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.verdict.candidate, outcome.verdict.judge), []).append(outcome)
    return groups


def _order_metrics(valid: Sequence[Outcome]) -> dict[str, Any]:
    """Flips, and by how much the response shown first wins more often than half the time."""
    asked_twice = [outcome for outcome in valid if outcome.first_wins is not None]
    if not asked_twice:
        return {}
    flips = sum(outcome.flipped for outcome in asked_twice)
    bias = float(np.mean([o.first_wins for o in asked_twice if o.first_wins is not None])) - 0.5
    return {"flips": flips, "flip_share": flips / len(asked_twice), "position_bias": bias}


def _label_mass(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Mean p(A) + p(B) of a chat model's first token, over all questions of which it is known."""
    known = [v.label_mass for outcome in outcomes for v in outcome.verdicts if v.label_mass is not None]
    return {"label_mass": float(np.mean(known))} if known else {}


def _jury(valid: Sequence[Outcome]) -> dict[str, Any]:
    """The win rate of each member of a jury, and how often two members decide alike, on average over members.

    A member's votes on both orders are averaged; pairs on which one of two members has no vote are left out.
    """
    names = list(dict.fromkeys(name for outcome in valid for name in outcome.verdict.votes or ()))
    votes = {name: [_vote(outcome, name) for outcome in valid] for name in names}
    found: list[Agreement] = []
    for one, other in combinations(names, 2):
        both = [(a, b) for a, b in zip(votes[one], votes[other], strict=True) if not math.isnan(a + b)]
        if both:
            found.append(agreement([a for a, _ in both], [b for _, b in both]))
    if not found:
        return {}
    kappas = [each.kappa for each in found if not math.isnan(each.kappa)]
    return {
        "jury_win_rates": {name: float(np.nanmean(cast)) for name, cast in votes.items() if not np.isnan(cast).all()},
        "jury_agreement": float(np.mean([each.equal for each in found])),
        "jury_kappa": float(np.mean(kappas)) if kappas else math.nan,
    }


def _vote(outcome: Outcome, name: str) -> float:
    cast = [vote for v in outcome.verdicts if (vote := (v.votes or {}).get(name)) is not None]
    return float(np.mean(cast)) if len(cast) == len(outcome.verdicts) else math.nan


def _length_controlled(outcomes: Sequence[Outcome], difficulty: Sequence[float] | None, level: float) -> dict[str, Any]:
    lengths = [(o.verdict.len_candidate, o.verdict.len_baseline) for o in outcomes]
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
    own = [outcome.verdict.difficulty for outcome in outcomes]
    if all(value is not None for value in own):
        return [value for value in own if value is not None]
    if table is None:
        return None
    found: list[float] = []
    for outcome in outcomes:
        position = outcome.verdict.position
        if position is None or position >= len(table):
            raise InputError(
                f"there is a difficulty for positions 0 to {len(table) - 1}, but not for {position}",
                kind="missing",
                key="difficulty",
            )
        found.append(table[position])
    return found


def _human_metrics(valid: Sequence[Outcome]) -> dict[str, Any]:
    labelled = [(o.preference, o.verdict.human) for o in valid if o.verdict.human is not None]
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
    """Comparisons of one prompt are a cluster; one without a position is a cluster of its own."""
    return [i if o.verdict.position is None else ("position", o.verdict.position) for i, o in enumerate(outcomes)]


def _cluster_means(values: np.ndarray, clusters: Sequence[Hashable]) -> list[float]:
    groups: dict[Hashable, list[float]] = defaultdict(list)
    for value, cluster in zip(values.tolist(), clusters, strict=True):
        groups[cluster].append(value)
    return [sum(group) / len(group) for group in groups.values()]

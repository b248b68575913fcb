"""Arms against each other, two by two, with a sentence that says plainly whether a difference was found."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Literal

from pe_rlhf.comparison.run_result import PairResult
from pe_rlhf.comparison.run_statistics import (
    detectable_difference,
    difference_estimate,
    holm,
    probability_of_improvement,
    welch,
)
from pe_rlhf.report.format import number

Measure = Literal["win_rate", "reward"]

SIGNIFICANT = 0.05
WORDS = {"win_rate": ("wins", "more often", "less often"), "reward": ("ends with", "more reward", "less reward")}


def compare_pairs(
    values: dict[str, list[float]], failed: dict[str, tuple[int, int]], measure: Measure
) -> list[PairResult]:
    """All pairs of arms that have a value: the later against the earlier, so that a baseline comes second.

    values: the finished runs' by arm. failed: how many of an arm's runs failed, of how many.
    """
    arms = [(b, a) for a, b in combinations([arm for arm in values if values[arm]], 2)]
    p_values = [welch(values[a], values[b]) for a, b in arms]
    tests = sum(not math.isnan(p) for p in p_values)
    pairs = []
    for (a, b), p_value, p_holm in zip(arms, p_values, holm(p_values), strict=True):
        sides = values[a], values[b]
        difference, improvement = difference_estimate(*sides), probability_of_improvement(*sides)
        pair = PairResult(a, b, difference, p_value, p_holm, improvement, sentence="")
        sentence = _sentence(pair, *sides, tests, measure) + _left_out(failed, a, b)
        pairs.append(replace(pair, sentence=sentence))
    return pairs


def _sentence(pair: PairResult, a: list[float], b: list[float], tests: int, measure: Measure) -> str:
    """Whether a difference was found, in words. The interval is the pair's own, the p-value is corrected for all."""
    low, high = (_signed(bound, measure) for bound in (pair.difference.low, pair.difference.high))
    size = _signed(pair.difference.value, measure)
    if math.isnan(pair.p_holm):
        return f"{pair.a} and {pair.b} cannot be tested: {_why_not(pair, a, b)} (difference {size})."
    if not math.isnan(pair.difference.low):
        size += f" ({low} to {high})"
    p_text = "p < 0.001" if pair.p_holm < 0.001 else f"p = {pair.p_holm:.3f}"
    if tests > 1:
        p_text += f" after Holm's correction for {tests} pairs"
    if pair.p_holm < SIGNIFICANT:
        verb, more, less = WORDS[measure]
        return f"{pair.a} {verb} {more if pair.difference.value > 0 else less} than {pair.b}: {size}, {p_text}."
    return f"No difference found between {pair.a} and {pair.b}: {size}, {p_text}{_detectable(a, b, tests, measure)}."


def _detectable(a: list[float], b: list[float], tests: int, measure: Measure) -> str:
    """What would have been found in 4 cases of 5, at the level that Holm's correction asks of the first pair."""
    least = detectable_difference(a, b, SIGNIFICANT / tests)
    if math.isnan(least):
        return ""
    runs = f"{len(a)} runs each" if len(a) == len(b) else f"{len(a)} and {len(b)} runs"
    if measure == "win_rate" and least >= 1:
        return f"; with {runs} hardly any difference would have been found"
    return f"; with {runs} only a difference of about {float(f'{least:.2g}'):g} would have been found"


def _why_not(pair: PairResult, a: list[float], b: list[float]) -> str:
    single = [name for name, values in ((pair.a, a), (pair.b, b)) if len(values) == 1]
    if len(single) == 2:
        return "one run each"
    return f"{single[0]} has one run" if single else "the runs of either do not differ among themselves"


def _left_out(failed: dict[str, tuple[int, int]], *arms: str) -> str:
    """What a reader of the finished runs only must know."""
    parts = [f"{failed[arm][0]} of {failed[arm][1]} runs of {arm}" for arm in arms if failed[arm][0]]
    return f" Not counted, since they failed: {' and '.join(parts)}." if parts else ""


def _signed(value: float, measure: Measure) -> str:
    text = f"{abs(value):.3f}" if measure == "win_rate" else number(abs(value))
    return ("−" if value < 0 else "+" if value > 0 else "") + text

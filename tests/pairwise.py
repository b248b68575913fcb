"""Parametrised tests with every pair of values once, in place of all combinations.

An init does not know the architecture, nor a rank the dtype: a bug needs two values to meet, rarely three.
"""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*values: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Few combinations in which each two values of different arguments meet; greedy, the same in every process."""
    cases = list(product(*values))
    pairs = {case: {(a, b, case[a], case[b]) for a, b in combinations(range(len(case)), 2)} for case in cases}
    missing = set[tuple[Any, ...]]().union(*pairs.values())
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


def every_pair(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over `pairwise`: `@every_pair(init=ALL_INITS, dtype=DTYPES, rank=(1, 4))`."""
    return pytest.mark.parametrize(tuple(values), pairwise(*values.values()))

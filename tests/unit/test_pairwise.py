"""The helper that other tests take their cases from."""

from itertools import combinations

import pytest

from tests.pairwise import pairwise


@pytest.mark.parametrize(
    ("sizes", "at_most"), [((3, 12, 2, 3), 40), ((2, 2, 2), 4), ((3, 3, 3), 10), ((4, 5), 20), ((7, 1, 2), 14)]
)
def test_each_two_values_meet_and_there_are_few_cases(sizes: tuple[int, ...], at_most: int) -> None:
    cases = pairwise(*(range(size) for size in sizes))
    for a, b in combinations(range(len(sizes)), 2):
        assert {(case[a], case[b]) for case in cases} == {(x, y) for x in range(sizes[a]) for y in range(sizes[b])}
    assert len(cases) == len(set(cases)) <= at_most

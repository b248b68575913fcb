"""Running moments against numpy over all numbers at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pe_rlhf.algo.running_moments import RunningMoments


def moments(*batches: list[float]) -> RunningMoments:
    found = RunningMoments()
    for batch in batches:
        found = found.with_batch(torch.tensor(batch, dtype=torch.float64))
    return found


@pytest.mark.parametrize("offset", [0.0, -3.0, 1e6])
@pytest.mark.parametrize("cut", [[40], [1] * 40, [3, 30, 7], [0, 39, 0, 1]])
def test_any_cut_gives_the_moments_of_all_numbers(cut: list[int], offset: float) -> None:
    numbers = np.random.default_rng(0).normal(offset, 2.5, 40)
    found = moments(*(part.tolist() for part in np.split(numbers, np.cumsum(cut)[:-1])))
    assert found.count == 40
    assert found.mean == pytest.approx(numbers.mean(), rel=1e-12)
    assert found.deviation == pytest.approx(numbers.std(), rel=1e-9)


def test_normalised_by_hand() -> None:
    found = moments([1.0, 3.0], [5.0])  # mean 3, variance (4 + 0 + 4) / 3
    assert found.normalise(torch.tensor([3.0, 5.0])).tolist() == pytest.approx([0.0, 2 / (8 / 3) ** 0.5])


@pytest.mark.parametrize("value", [0.0, 0.1, -1e8])
def test_numbers_that_are_all_the_same_are_not_divided_by_rounding(value: float) -> None:
    found = moments([value] * 3, [value] * 7)
    assert found.deviation == 1.0
    assert found.normalise(torch.tensor([value], dtype=torch.float64)).tolist() == pytest.approx([0.0], abs=1e-6)


def test_a_deviation_counts_from_a_hundred_millionth_of_the_mean_on() -> None:
    """At a mean of 1e8 that is 1, which fp64 has digits for; around 0 it is 1e-8 itself."""
    for mean, size, deviation in ((1e8, 0.5, 1.0), (-1e8, 2.0, 2.0), (0.0, 5e-9, 1.0), (0.0, 3e-8, 3e-8)):
        assert moments([mean - size, mean + size]).deviation == pytest.approx(deviation)


def test_nothing_yet() -> None:
    assert RunningMoments().normalise(torch.tensor([2.0])).tolist() == [2.0]

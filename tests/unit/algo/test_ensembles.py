"""Combined scores by hand: three members, two responses."""

from __future__ import annotations

import pytest
import torch

from pe_rlhf.algo.ensembles import COMBINE, disagreement

SCORES = torch.tensor([[1.0, 4.0], [2.0, 4.0], [6.0, 1.0]])
# Means 3 and 3; variances (4 + 1 + 9)/3 = 14/3 and (1 + 1 + 4)/3 = 2.


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ("mean", [3.0, 3.0]),
        ("mean_minus_std", [3 - 0.5 * (14 / 3) ** 0.5, 3 - 0.5 * 2**0.5]),
        ("worst", [1.0, 1.0]),
        ("uwo", [3 - 0.5 * 14 / 3, 3 - 0.5 * 2]),
    ],
)
def test_by_hand(combine: str, expected: list[float]) -> None:
    assert COMBINE[combine](SCORES, 0.5).tolist() == pytest.approx(expected)


def test_disagreement_by_hand() -> None:
    assert disagreement(SCORES) == pytest.approx(((14 / 3) ** 0.5 + 2**0.5) / 2)
    assert disagreement(SCORES[:1]) == 0

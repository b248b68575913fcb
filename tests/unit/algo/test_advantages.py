"""Advantage estimators against numbers worked by hand and plain loops over numbers."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from pe_rlhf.algo.advantages import ESTIMATORS, Options, Rewarded, alike_share
from pe_rlhf.config.ppo import Advantage

NAN = math.nan  # what is at padding must not matter, whatever it is
# R = 3, 1; 2, 2 in two groups of two
REWARDS_BR = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.5, NAN], [2.0, NAN, NAN], [-1.0, 1.0, 2.0]])
MASK_BR = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [True, True, True]])
GROUPS_B = torch.tensor([7, 7, 4, 4])
BATCH = Rewarded(REWARDS_BR, MASK_BR, GROUPS_B)


def estimate(name: str, batch: Rewarded = BATCH, **options: float | bool) -> Tensor:
    advantages_BR, returns_BR = ESTIMATORS[name](batch, Options(**options))  # type: ignore[arg-type]
    assert returns_BR is None
    assert advantages_BR.dtype == batch.rewards_BR.dtype
    assert not advantages_BR[~batch.mask_BR].any()
    return advantages_BR


def spread(*advantages: float) -> Tensor:
    return torch.where(MASK_BR, torch.tensor(advantages)[:, None], 0.0)


def test_recipes_and_estimators_have_the_same_names() -> None:
    assert set(get_args(Advantage)) == set(ESTIMATORS)


def test_rloo_by_hand() -> None:
    # Of two responses the other one is the baseline: 3 − 1 and 1 − 3; 2 − 2.
    torch.testing.assert_close(estimate("rloo"), spread(2.0, -2.0, 0.0, 0.0))


def test_group_mean_by_hand() -> None:
    # The mean is 2, the sample's deviation √((1 + 1) / 1) = √2. A group that scores alike has zeros, not NaN.
    torch.testing.assert_close(estimate("group_mean", group_std=False), spread(1.0, -1.0, 0.0, 0.0))
    scaled = 1 / (math.sqrt(2) + 1e-4)
    torch.testing.assert_close(estimate("group_mean"), spread(scaled, -scaled, 0.0, 0.0))


def test_reinforce_pp_by_hand() -> None:
    # With γ = 1/2 the rewards to go: 1 + .25·2, .5·2, 2 | .5 + .25, .5 | 2 | −1 + .5 + .5, 1 + 1, 2; sum 11.75 of 9.
    to_go_BR = torch.tensor([[1.5, 1.0, 2.0], [0.75, 0.5, 0.0], [2.0, 0.0, 0.0], [0.0, 2.0, 2.0]])
    wanted_BR = torch.where(MASK_BR, to_go_BR - 11.75 / 9, 0.0)
    torch.testing.assert_close(estimate("reinforce_pp", gamma=0.5), wanted_BR)


def test_responses_that_score_alike_to_rounding_teach_nothing() -> None:
    """A mean of equal numbers may be off by their rounding, which a deviation of zero must not blow up."""
    rewards_BR = torch.full((7, 1), 0.1)
    batch = Rewarded(rewards_BR, torch.ones(7, 1, dtype=torch.bool), torch.zeros(7, dtype=torch.long))
    for name in ("rloo", "group_mean"):
        assert estimate(name, batch).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["rloo", "group_mean", "dr_grpo", "reinforce_pp"])
def test_estimators_equal_loops(name: str) -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 9, size=12)
    rewards = [rng.normal(size=n) for n in lengths]
    groups = rng.permutation(np.repeat([0, 1, 2, 3], 3))  # a group's responses are anywhere in the batch
    expected = naive(name, rewards, groups, gamma=0.9)

    rewards_BR = torch.full((12, 8), NAN, dtype=torch.float64)
    for row, own in zip(rewards_BR, rewards, strict=True):
        row[: len(own)] = torch.tensor(own)
    mask_BR = torch.arange(8) < torch.tensor(lengths)[:, None]
    batch = Rewarded(rewards_BR, mask_BR, torch.tensor(groups))
    found_BR = estimate(name.replace("dr_grpo", "group_mean"), batch, gamma=0.9, group_std=name != "dr_grpo")
    for row, wanted in zip(found_BR.tolist(), expected, strict=True):
        assert row[: len(wanted)] == pytest.approx(list(wanted), abs=1e-12)


def naive(name: str, rewards: list[np.ndarray], groups: np.ndarray, gamma: float) -> list[np.ndarray]:
    if name == "reinforce_pp":
        to_go = [[sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))] for r in rewards]
        mean = np.mean([x for row in to_go for x in row])
        return [np.array(row) - mean for row in to_go]
    totals = np.array([r.sum() for r in rewards])
    advantages = []
    for i, own in enumerate(rewards):
        others = [totals[j] for j in range(len(totals)) if groups[j] == groups[i] and j != i]
        group = [*others, totals[i]]
        if name == "rloo":
            a = totals[i] - np.mean(others)
        else:
            a = (totals[i] - np.mean(group)) / (np.std(group, ddof=1) + 1e-4 if name == "group_mean" else 1.0)
        advantages.append(np.full(len(own), a))
    return advantages


def test_a_group_of_one_is_an_error() -> None:
    batch = Rewarded(REWARDS_BR, MASK_BR, torch.tensor([1, 1, 2, 1]))
    for name in ("rloo", "group_mean"):
        with pytest.raises(ValueError, match="group of one"):
            ESTIMATORS[name](batch, Options())


def test_the_share_of_groups_that_score_alike_counts_groups() -> None:
    scores_B = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 3.0])
    assert alike_share(scores_B, torch.tensor([0, 0, 0, 0, 1, 1])) == pytest.approx(0.5)

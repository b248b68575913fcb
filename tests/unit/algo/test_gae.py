import math

import pytest
import torch
from torch import Tensor

from pe_rlhf.algo.gae import generalised_advantages


def naive_gae(
    rewards_BR: Tensor, values_BR: Tensor, lengths: list[int], gamma: float, lam: float
) -> tuple[list[list[float]], list[list[float]]]:
    """A_t = Σ_l (γλ)^l · δ_{t+l}, summed forwards over all the future of each token."""
    advantages: list[list[float]] = []
    returns: list[list[float]] = []
    for rewards, values, length in zip(rewards_BR.tolist(), values_BR.tolist(), lengths, strict=True):
        deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < length else 0.0) - values[t] for t in range(length)]
        row = [math.fsum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
        advantages.append(row)
        returns.append([a + v for a, v in zip(row, values, strict=False)])
    return advantages, returns


def test_hand_worked_rows_of_two_lengths() -> None:
    # With γ = λ = 1/2:
    # Row 0: δ = (1 + .5·1 − .5, 0 + .5·.5 − 1, 2 − .5) = (1, −.75, 1.5)
    #        A = (1 + .25·−.375, −.75 + .25·1.5, 1.5)    = (.90625, −.375, 1.5)
    # Row 1: δ = (2 + .5·.5 − 1, −1 − .5) = (1.25, −1.5), A = (1.25 + .25·−1.5, −1.5) = (.875, −1.5)
    nan = math.nan  # what stands at padding must not matter, whatever it is
    rewards_BR = torch.tensor([[1.0, 0.0, 2.0], [2.0, -1.0, nan]])
    values_BR = torch.tensor([[0.5, 1.0, 0.5], [1.0, 0.5, nan]])
    mask_BR = torch.tensor([[True, True, True], [True, True, False]])
    advantages_BR, returns_BR = generalised_advantages(rewards_BR, values_BR, mask_BR, gamma=0.5, lam=0.5)
    assert advantages_BR.tolist() == [[0.90625, -0.375, 1.5], [0.875, -1.5, 0.0]]
    assert returns_BR.tolist() == [[1.40625, 0.625, 2.0], [1.875, -1.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0)])
def test_ragged_rows_equal_the_naive_double_loop(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 9, 4, 7, 2]
    rewards_BR = torch.randn(5, 9, generator=generator)
    values_BR = torch.randn(5, 9, generator=generator)
    mask_BR = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    advantages_BR, returns_BR = generalised_advantages(rewards_BR, values_BR, mask_BR, gamma=gamma, lam=lam)
    expected_advantages, expected_returns = naive_gae(rewards_BR, values_BR, lengths, gamma, lam)
    for row, length in enumerate(lengths):
        assert advantages_BR[row, :length].tolist() == pytest.approx(expected_advantages[row], abs=1e-5)
        assert returns_BR[row, :length].tolist() == pytest.approx(expected_returns[row], abs=1e-5)
        assert not advantages_BR[row, length:].any()
        assert not returns_BR[row, length:].any()


def test_undiscounted_with_lambda_one_returns_are_the_rewards_to_go() -> None:
    rewards_BR = torch.tensor([[0.0, -0.5, 3.0]])
    values_BR = torch.tensor([[7.0, -2.0, 11.0]])
    _, returns_BR = generalised_advantages(
        rewards_BR, values_BR, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0
    )
    assert returns_BR.tolist() == [[2.5, 2.5, 3.0]]


def test_responses_of_one_token() -> None:
    rewards_BR, values_BR = torch.tensor([[2.0], [-1.0]]), torch.tensor([[0.5], [0.25]])
    found = generalised_advantages(rewards_BR, values_BR, torch.ones(2, 1, dtype=torch.bool), gamma=0.9, lam=0.5)
    assert [each.tolist() for each in found] == [[[1.5], [-1.25]], [[2.0], [-1.0]]]


def test_leaves_its_arguments_alone() -> None:
    rewards_BR, values_BR = torch.ones(1, 2), torch.ones(1, 2)
    generalised_advantages(rewards_BR, values_BR, torch.tensor([[True, False]]), gamma=1.0, lam=0.95)
    assert rewards_BR.tolist() == [[1.0, 1.0]]
    assert values_BR.tolist() == [[1.0, 1.0]]

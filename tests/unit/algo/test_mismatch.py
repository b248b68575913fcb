"""The mismatch of sampler and trainer against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pe_rlhf.algo.mismatch import ROUNDING, anchor_test, mismatch


def test_by_hand() -> None:
    # w = 2, 1, 1/2, 1: Σw = 4.5, Σw² = 6.25, so the share is 20.25 / (4 · 6.25).
    found = mismatch(torch.tensor([2.0, 1.0, 0.5, 1.0]).log())
    assert found.mean == pytest.approx(math.log(2) / 2, rel=1e-6)
    assert found.max == pytest.approx(math.log(2), rel=1e-6)
    assert found.effective_sample_size == pytest.approx(0.81, rel=1e-6)


def test_one_policy_has_the_whole_sample() -> None:
    found = mismatch(torch.zeros(7))
    assert (found.mean, found.max, found.effective_sample_size) == (0, 0, 1)


def test_one_token_that_outweighs_all_does_not_overflow() -> None:
    found = mismatch(torch.tensor([2000.0, 0.0, 0.0, 0.0]))
    assert found.effective_sample_size == pytest.approx(0.25)
    assert mismatch(torch.tensor([float("nan"), 0.0])).mean != mismatch(torch.tensor([float("nan"), 0.0])).mean


def sampled(size: float, kept: float, noise: float, tokens: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-ratios to the sampler of a policy that is `size` nats from the anchor, of which `kept` reach the sampler."""
    generator = torch.Generator().manual_seed(0)
    moved_N = size * torch.randn(tokens, generator=generator, dtype=torch.float64)
    sampler_N = kept * moved_N + noise * torch.randn(tokens, generator=generator, dtype=torch.float64)
    return moved_N - sampler_N, -sampler_N  # log π − log s, log anchor − log s, with log anchor = 0


@pytest.mark.parametrize(
    ("size", "kept", "noise", "is_anchor"),
    [
        (0.05, 1.0, 0.01, False),
        (0.05, 0.0, 0.01, True),  # an engine without the adapter, within the limit of 0.1 nats
        (0.05, 0.25, 0.001, True),  # bf16 weights that keep a quarter
        (0.05, 0.75, 0.001, False),
        (0.001, 1.0, 0.02, False),  # an update far below what bf16 rounds
        (0.001, 0.0, 0.02, False),  # which nobody can tell from none at all
        (0.01, 0.0, 0.01, True),
        (0.0, 0.0, 0.02, False),  # step 0
    ],
)
def test_a_sampler_that_is_rather_the_anchor(size: float, kept: float, noise: float, is_anchor: bool) -> None:
    found = anchor_test(*sampled(size, kept, noise))
    assert found.is_anchor == is_anchor
    if size == 0:
        assert found.relative is None


def test_the_relative_mismatch_by_hand() -> None:
    # Policy and anchor are 0.4 and 0.2 apart; the sampler misses the policy by 0.1 and 0.2.
    found = anchor_test(torch.tensor([0.1, -0.2]), torch.tensor([-0.3, -0.4]))
    assert found.relative == pytest.approx(0.5)


def shares(apart: float, *shares: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens at which policy and anchor are `apart` nats apart, and the sampler that share of the way to the anchor."""
    share_N = torch.tensor(shares, dtype=torch.float64)
    return apart * share_N, apart * (share_N - 1)


def test_noise_and_a_small_lean_to_the_anchor_are_not_taken_for_it() -> None:
    """A token leans by (2·share − 1) of the distance: here 0.4 ± 0.2 of it, which of n tokens is 2·√n errors."""
    both = (0.8, 0.6)
    assert not anchor_test(*shares(0.01, *both * 3)).is_anchor  # 4.9 errors
    assert anchor_test(*shares(0.01, *both * 4)).is_anchor  # 5.7
    # Without any noise a lean of a fifth of the distance is what kernels of other shapes may do; of 0.3 it is not.
    assert not anchor_test(*shares(0.01, *[0.6] * 50)).is_anchor
    assert anchor_test(*shares(0.01, *[0.65] * 50)).is_anchor
    assert not anchor_test(*shares(0.01, *[0.35] * 50)).is_anchor


def test_a_policy_no_further_from_the_anchor_than_rounding_is_the_anchor() -> None:
    assert anchor_test(*shares(0.9 * ROUNDING, *[1.0] * 9)).relative is None
    assert anchor_test(*shares(1.1 * ROUNDING, *[1.0] * 9)).relative == pytest.approx(1.0)
    assert anchor_test(torch.tensor([math.nan]), torch.tensor([0.0])).relative is None

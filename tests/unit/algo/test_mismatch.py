"""The mismatch of sampler and trainer against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pe_rlhf.algo.mismatch import mismatch


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

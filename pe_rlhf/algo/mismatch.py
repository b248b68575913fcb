"""How far the sampler's log-probs are from the trainer's: whether both hold the same policy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mismatch:
    """Figures over response tokens; with w = π_trainer / π_sampler of a token.

    Attributes:
        mean: mean of |log w|, nats per token.
        max: the largest |log w|, nats.
        effective_sample_size: (Σw)² / (N·Σw²), a share: 1 where both are one policy, towards 1/N where they are not.
    """

    mean: Tensor
    max: Tensor
    effective_sample_size: Tensor


def mismatch(trainer_N: Tensor, sampler_N: Tensor) -> Mismatch:
    """Compare the log-probs of the same tokens, at least one, by the trainer and by the sampler."""
    log_ratio_N = (trainer_N - sampler_N).double()
    # The share is the same for any multiple of w: the largest becomes 1, so that nothing overflows.
    w_N = (log_ratio_N - log_ratio_N.max()).exp()
    share = w_N.sum() ** 2 / (w_N.numel() * (w_N**2).sum())
    return Mismatch(log_ratio_N.abs().mean(), log_ratio_N.abs().max(), share)

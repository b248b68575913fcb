"""How far the sampler's log-probs are from the trainer's: whether both hold the same policy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mismatch:
    """Metrics over response tokens; with w = π_trainer / π_sampler of a token.

    Attributes:
        mean: mean of |log w|, nats per token.
        max: the largest |log w|, nats.
        effective_sample_size: (Σw)² / (N·Σw²), a share: 1 where both are one policy, towards 1/N where they are not.
    """

    mean: float
    max: float
    effective_sample_size: float


def mismatch(log_ratio_N: Tensor) -> Mismatch:
    """Metrics of log w = log π_trainer − log π_sampler of tokens that the sampler drew, at least one."""
    log_ratio_N = log_ratio_N.double()
    # The share is the same for any multiple of w: the largest becomes 1, so that nothing overflows.
    w_N = (log_ratio_N - log_ratio_N.max()).exp()
    share = w_N.sum() ** 2 / (w_N.numel() * (w_N**2).sum())
    return Mismatch(log_ratio_N.abs().mean().item(), log_ratio_N.abs().max().item(), share.item())

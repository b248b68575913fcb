"""How far the sampler's log-probs are from the trainer's: whether both hold the same policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# When a sampler counts as nearer to the anchor: by so many standard errors, and by so much of the policy's own distance
# from the anchor. The second keeps apart what kernels of other shapes do to all tokens alike.
SIGNIFICANT, LEAST_SHARE = 5.0, 0.25
ROUNDING = 1e-5  # nats per token: a policy that is no further from the anchor is the anchor


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


@dataclass(frozen=True)
class AnchorTest:
    """Whether the tokens were drawn from the policy or rather from the anchor, by their log-probs.

    Attributes:
        relative: mean |log π − log sampler| over mean |log π − log anchor|: 1 for a sampler without the adapter. None
            where policy and anchor are one.
        is_anchor: whether the sampler is no nearer to the policy than to the anchor, beyond noise.
    """

    relative: float | None
    is_anchor: bool


def anchor_test(log_ratio_N: Tensor, anchor_ratio_N: Tensor) -> AnchorTest:
    """From log π − log sampler and log anchor − log sampler of the same tokens. A limit in nats cannot tell: an update
    of a few steps moves a token's log-prob by less than bf16 rounds it."""
    to_policy_N, to_anchor_N = log_ratio_N.double(), anchor_ratio_N.double()
    moved = (to_policy_N - to_anchor_N).abs().mean().item()
    if not moved > ROUNDING:
        return AnchorTest(None, False)
    nearer_N = to_policy_N.abs() - to_anchor_N.abs()  # above 0 where the token's log-prob is rather the anchor's
    by, error = nearer_N.mean().item(), nearer_N.std(correction=0).item() / math.sqrt(len(nearer_N))
    is_anchor = by > SIGNIFICANT * error and by > LEAST_SHARE * moved
    return AnchorTest(to_policy_N.abs().mean().item() / moved, is_anchor)

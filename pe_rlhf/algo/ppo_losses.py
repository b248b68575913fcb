"""The clipped losses of PPO. Each is a sum over valid tokens divided by a given number of tokens.

The number is that of the whole minibatch, so that cutting it into micro-batches changes nothing but rounding. All
tensors are flat over valid tokens (_N): padding never enters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """`loss` carries the gradient; the rest are sums over the tokens given, for metrics."""

    loss: Tensor
    clipped: Tensor
    approx_kl: Tensor


@dataclass(frozen=True)
class ValueLoss:
    """`loss` carries the gradient; `clipped` is the number of tokens whose clipped error was the larger."""

    loss: Tensor
    clipped: Tensor


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_range: float,
    tokens: int,
    weights_N: Tensor | None = None,
) -> PolicyLoss:
    """−min(ρ·A, clip(ρ, 1−ε, 1+ε)·A) (arXiv 1707.06347, equation 7), ρ = π/π_old.

    Args:
        tokens: the number of tokens to divide by.
        weights_N: importance weights for tokens sampled by something else than π_old; 1 where None.

    `approx_kl` is the k3 estimate of KL(π_old ‖ π), `clipped` counts the tokens where the clipped term was the worse.
    """
    log_ratio_N = logprobs_N - old_logprobs_N
    ratio_N = log_ratio_N.exp()
    unclipped_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1 - clip_range, 1 + clip_range)
    loss_N = torch.maximum(unclipped_N, clipped_N)
    if weights_N is not None:
        loss_N = loss_N * weights_N
    with torch.no_grad():
        clipped = (clipped_N > unclipped_N).sum()
        approx_kl = (ratio_N - 1 - log_ratio_N).sum()
    return PolicyLoss(loss_N.sum() / tokens, clipped, approx_kl)


def value_loss(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, *, clip_range: float, tokens: int
) -> ValueLoss:
    """½·max((V − R)², (clip(V, V_old ± ε) − R)²) (arXiv 1707.06347 with the value clipping of its authors' code)."""
    clipped_values_N = torch.clamp(values_N, old_values_N - clip_range, old_values_N + clip_range)
    error_N = (values_N - returns_N) ** 2
    clipped_error_N = (clipped_values_N - returns_N) ** 2
    loss = 0.5 * torch.maximum(error_N, clipped_error_N).sum() / tokens
    return ValueLoss(loss, (clipped_error_N > error_N).sum().detach())

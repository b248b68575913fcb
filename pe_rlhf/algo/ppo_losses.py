"""The clipped losses of PPO and its relatives. Each is a sum over valid tokens divided by a given number.

The number is that of the whole minibatch, so that cutting it into micro-batches, on one rank or many, changes nothing
but rounding. All tensors are flat over valid tokens (_N), row after row: padding never enters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token", "sequence", "constant"]
RatioLevel = Literal["token", "sequence", "sequence_mean"]


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


@dataclass(frozen=True)
class Mean:
    """How the loss of a minibatch comes from those of its tokens.

    token: the mean over its tokens, as DAPO's (arXiv 2503.14476). sequence: the mean over responses of their means, as
    GRPO's. constant: the sum over responses × `longest`, so that a token weighs the same in every minibatch, as Dr.
    GRPO's (arXiv 2503.20783). TRL's loss types dapo, grpo and dr_grpo; verl's token-mean, seq-mean-token-mean and
    seq-mean-token-sum-norm.

    Attributes:
        tokens, sequences: of the minibatch of all ranks.
        longest: the most tokens that a response may have.
    """

    kind: Aggregation
    tokens: int
    sequences: int
    longest: int

    @property
    def divisor(self) -> int:
        """What the weighted sum over tokens is divided by."""
        return {"token": self.tokens, "sequence": self.sequences, "constant": self.sequences * self.longest}[self.kind]

    def weights(self, lengths_B: Tensor) -> Tensor:
        """The weight _N of each token of responses of those lengths."""
        if self.kind == "sequence":
            return (1 / lengths_B).repeat_interleave(lengths_B)
        return torch.ones(int(lengths_B.sum()), device=lengths_B.device)


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_range: float,
    divisor: float,
    clip_range_high: float | None = None,
    weights_N: Tensor | None = None,
    ratio: RatioLevel = "token",
    lengths: list[int] | None = None,
) -> PolicyLoss:
    """−min(ρ·A, clip(ρ, 1−ε, 1+ε_high)·A) (arXiv 1707.06347, equation 7), ρ = π/π_old.

    Args:
        clip_range_high: ε_high (DAPO, arXiv 2503.14476); `clip_range` where None.
        divisor: what the sum is divided by.
        weights_N: of the terms of the sum: those of the mean, and importance weights for tokens sampled by something
            else than π_old; 1 where None.
        ratio: as of `sequence_log_ratios`; token: each has its own.
        lengths: of the responses; for ratios of whole responses only.

    `approx_kl` is the k3 estimate of KL(π_old ‖ π), `clipped` counts the tokens where the clipped term was the worse.
    """
    token_log_ratio_N = log_ratio_N = logprobs_N - old_logprobs_N
    if ratio != "token":
        assert lengths is not None
        log_ratio_N = sequence_log_ratios(token_log_ratio_N, lengths, mean=ratio == "sequence_mean")
    ratio_N = log_ratio_N.exp()
    high = clip_range if clip_range_high is None else clip_range_high
    unclipped_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1 - clip_range, 1 + high)
    loss_N = torch.maximum(unclipped_N, clipped_N)
    if weights_N is not None:
        loss_N = loss_N * weights_N
    with torch.no_grad():
        clipped = (clipped_N > unclipped_N).sum()
        approx_kl = (token_log_ratio_N.exp() - 1 - token_log_ratio_N).sum()
    return PolicyLoss(loss_N.sum() / divisor, clipped, approx_kl)


def sequence_log_ratios(log_ratio_N: Tensor, lengths: list[int], *, mean: bool) -> Tensor:
    """log ρ of each token's whole response, _N: the sum of its tokens' (as in RLOO, arXiv 2402.14740), or their mean
    (GSPO, arXiv 2507.18071).

    The gradient at a token is that of its own log-prob (GSPO-token). Where the tokens of a response share
    their advantage, their gradients add up to that of ρ·A; where they do not, each keeps its own.
    """
    rows = log_ratio_N.split(lengths)
    # The value is the response's; x − x.detach() is zero, with the gradient of x.
    if mean:
        return torch.cat([row - row.detach() + row.detach().mean() for row in rows])
    return torch.cat([len(row) * (row - row.detach()) + row.detach().sum() for row in rows])


def value_loss(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, *, clip_range: float, tokens: int
) -> ValueLoss:
    """½·max((V − R)², (clip(V, V_old ± ε) − R)²) (arXiv 1707.06347 with the value clipping of its authors' code)."""
    clipped_values_N = torch.clamp(values_N, old_values_N - clip_range, old_values_N + clip_range)
    error_N = (values_N - returns_N) ** 2
    clipped_error_N = (clipped_values_N - returns_N) ** 2
    loss = 0.5 * torch.maximum(error_N, clipped_error_N).sum() / tokens
    return ValueLoss(loss, (clipped_error_N > error_N).sum().detach())

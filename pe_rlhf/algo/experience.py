"""From scores, KL and values to advantages and returns: steps 3 and 4 of PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pe_rlhf.algo.advantages import ESTIMATORS, Options, Rewarded
from pe_rlhf.algo.masked import masked_var, masked_whiten
from pe_rlhf.algo.rewards import KLForm, adjust_scores, shape_rewards


@dataclass(frozen=True)
class Shaping:
    """How rewards are shaped and advantages estimated.

    Attributes:
        beta, form, kl_in_reward: as of `shape_rewards`.
        missing_eos_penalty, missing_eos_replaces, length_penalty: as of `adjust_scores`.
        whiten_rewards: divide the shaped rewards by their standard deviation.
        advantage: the estimator, a name of `ESTIMATORS`.
        options: the estimator's own settings.
        whiten_advantages: mean 0 and variance 1 over the tokens of the batch.
    """

    beta: float
    form: KLForm
    kl_in_reward: bool
    missing_eos_penalty: float | None
    missing_eos_replaces: bool
    length_penalty: float
    whiten_rewards: bool
    advantage: str
    options: Options
    whiten_advantages: bool


class Estimate(NamedTuple):
    """Advantages and returns of each response token, zero at padding; the score of each response after all rules.

    Returns are what a critic learns: None without one.
    """

    advantages_BR: Tensor
    returns_BR: Tensor | None
    shaped_B: Tensor


def shape_and_estimate(
    scores_B: Tensor,
    kl_BR: Tensor,
    values_BR: Tensor | None,
    mask_BR: Tensor,
    truncated_B: Tensor,
    groups_B: Tensor,
    shaping: Shaping,
) -> Estimate:
    """Shape one reward per token and estimate the advantages.

    Args:
        scores_B: the reward source's, before any rule about endings and lengths.
        kl_BR: estimates of the KL to the anchor at each token, nats.
        values_BR: the critic's; None without one.
        mask_BR: True at the real response tokens.
        truncated_B: True where the response was cut at the length limit.
        groups_B: the number of each response's prompt in the batch.
    """
    adjusted_B = adjust_scores(
        scores_B,
        truncated_B,
        mask_BR.sum(dim=1),
        missing_eos_penalty=shaping.missing_eos_penalty,
        missing_eos_replaces=shaping.missing_eos_replaces,
        length_penalty=shaping.length_penalty,
    )
    rewards_BR = shape_rewards(
        adjusted_B, kl_BR, mask_BR, beta=shaping.beta, form=shaping.form, kl_in_reward=shaping.kl_in_reward
    )
    if shaping.whiten_rewards:  # without removing the mean: that would reward or punish length
        rewards_BR = rewards_BR * torch.rsqrt(masked_var(rewards_BR, mask_BR) + 1e-8)
    batch = Rewarded(rewards_BR, mask_BR, groups_B, values_BR)
    advantages_BR, returns_BR = ESTIMATORS[shaping.advantage](batch, shaping.options)
    # The returns stay as they are: the critic is to learn rewards in their own unit.
    if shaping.whiten_advantages:
        advantages_BR = masked_whiten(advantages_BR, mask_BR)
    return Estimate(advantages_BR, returns_BR, adjusted_B)

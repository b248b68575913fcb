"""From one score per response to one reward per token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLForm = Literal["convex", "penalty"]


def kl_objective(reward: float, kl: float, *, beta: float, form: KLForm) -> float:
    """What PPO maximises, (1−β)·r − β·KL (`convex`) or r − β·KL (`penalty`), of means over responses."""
    return (1 - beta if form == "convex" else 1.0) * reward - beta * kl


def adjust_scores(
    scores_B: Tensor,
    truncated_B: Tensor,
    lengths_B: Tensor,
    *,
    missing_eos_penalty: float | None = None,
    missing_eos_replaces: bool = False,
    length_penalty: float = 0.0,
) -> Tensor:
    """Scores after the rules about endings and lengths.

    Args:
        truncated_B: True where the response was cut at the length limit.
        lengths_B: response lengths in tokens.
        missing_eos_penalty: lowers the score of a cut response by this much, or, with `missing_eos_replaces`, the score
            of a cut response becomes minus this.
        length_penalty: taken off per response token.
    """
    scores_B = scores_B - length_penalty * lengths_B
    if missing_eos_penalty is None:
        return scores_B
    penalised_B = -missing_eos_penalty if missing_eos_replaces else scores_B - missing_eos_penalty
    return torch.where(truncated_B, penalised_B, scores_B)


def shape_rewards(
    scores_B: Tensor, kl_BR: Tensor, mask_BR: Tensor, *, beta: float, form: KLForm, kl_in_reward: bool = True
) -> Tensor:
    """Rewards per token: −β·KL at each, the score at the last.

    `convex` is (1−β)·r − β·KL (PE-RLHF, arXiv 2403.10704, section 3), `penalty` is r − β·KL. With `kl_in_reward`
    False the KL is left to the loss.

    Returns:
        rewards_BR, zero at padding.
    """
    weight = 1 - beta if form == "convex" else 1.0
    rewards_BR = -beta * torch.where(mask_BR, kl_BR, 0.0) if kl_in_reward else torch.zeros_like(kl_BR)
    last_B1 = mask_BR.sum(dim=1, keepdim=True) - 1
    return rewards_BR.scatter_add(1, last_B1, weight * scores_B[:, None])

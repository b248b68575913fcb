"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor


def generalised_advantages(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each response token (arXiv 1506.02438, equations 11 and 16).

    δ_t = r_t + γ·V_{t+1} − V_t and A_t = δ_t + γλ·A_{t+1}, with V = 0 after the last token: a response is an episode
    and a cut one is scored as it stands.

    Returns:
        `(advantages_BR, returns_BR)`, returns = advantages + values; both zero at padding.
    """
    values_BR = torch.where(mask_BR, values_BR, 0.0)
    advantages_BR = torch.zeros_like(values_BR)
    next_advantage_B = torch.zeros_like(values_BR[:, 0])
    next_value_B = torch.zeros_like(values_BR[:, 0])
    for t in reversed(range(values_BR.shape[1])):
        valid_B = mask_BR[:, t]
        delta_B = rewards_BR[:, t] + gamma * next_value_B - values_BR[:, t]
        next_advantage_B = torch.where(valid_B, delta_B + gamma * lam * next_advantage_B, 0.0)
        next_value_B = values_BR[:, t]
        advantages_BR[:, t] = next_advantage_B
    return advantages_BR, torch.where(mask_BR, advantages_BR + values_BR, 0.0)

"""Statistics over the valid entries of a padded tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries where `mask` is True; 0 where there are none."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance over the entries where `mask` is True."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def masked_whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """`(x − mean) / sqrt(var + eps)` over the valid entries; 0 elsewhere."""
    whitened = (x - masked_mean(x, mask)) * torch.rsqrt(masked_var(x, mask) + eps)
    return torch.where(mask, whitened, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """`1 − Var(returns − values) / Var(returns)`: 1 is a perfect critic, 0 one that knows only the mean."""
    return 1 - masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-8)


def least_squares(x: Tensor, y: Tensor, mask: Tensor) -> tuple[float, float]:
    """`(a, b)` of the line `a·x + b` that is nearest to `y` over the valid entries; a = 0 where x is a constant."""
    x, y = x.double(), y.double()
    mean_x, mean_y = masked_mean(x, mask), masked_mean(y, mask)
    variance = masked_var(x, mask)
    covariance = masked_mean((x - mean_x) * (y - mean_y), mask)
    slope = (covariance / variance).item() if variance > 1e-12 else 0.0
    return slope, (mean_y - slope * mean_x).item()

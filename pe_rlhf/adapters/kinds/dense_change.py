"""Adding a change of the weight that has to be formed as a matrix, without keeping the matrix for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def add_dense(y: Tensor, x: Tensor, change: Callable[[], Tensor]) -> Tensor:
    """`y + ΔW·x`, ΔW_OI from `change`, which is called once more in the backward pass."""

    def product(x: Tensor) -> Tensor:
        return F.linear(x, change().to(x.dtype))

    x = x.to(y.dtype)
    if not torch.is_grad_enabled():
        return y + product(x)
    return y + checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[operator]

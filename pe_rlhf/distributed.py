"""What a process knows of the others. Without torch.distributed there is one, and every mean is its own."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, the same on each; every rank calls it, in the same order."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()

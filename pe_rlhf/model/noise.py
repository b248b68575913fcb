"""Random noise on weights, filter by filter (RWP, arXiv 2211.11489): a row of a matrix gets as much as it is long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pe_rlhf.system.distributed import is_sharded
from pe_rlhf.system.seeding import derive_seed
from reward.errors import InputError


def filter_noise(weight: Tensor, sigma: float, seed: int) -> Tensor:
    """ε ~ N(0, σ²·‖row‖²) for each element of a row; a vector is one row. In the weight's dtype, on its device.

    The same on every rank: the generator is the device's own, since the noise of a whole model takes long on a CPU.
    """
    rows = weight.detach().flatten(1) if weight.dim() > 1 else weight.detach()[None]
    generator = torch.Generator(weight.device).manual_seed(seed)
    normal = torch.randn(rows.shape, generator=generator, device=weight.device)
    norms = torch.linalg.vector_norm(rows.float(), dim=1, keepdim=True)
    return (sigma * norms * normal).view(weight.shape).to(weight.dtype)


@contextmanager
def noisy_weights(model: nn.Module, sigma: float, seed: int) -> Iterator[None]:
    """Within it the frozen weights of a model are noisy copies; after it they are the same memory as before.

    Raises `InputError` for weights that are quantised, or split by ZeRO-3.
    """
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    if is_sharded(model) or not all(p.is_floating_point() for p in frozen.values()):
        raise InputError(
            "optimizer.noise_on: model needs the weights of the base, which are quantised or split by ZeRO-3",
            kind="conflict",
            key="optimizer.noise_on",
            fix="use noise_on: adapter",
        )
    own = {name: p.data for name, p in frozen.items()}
    try:
        for name, parameter in frozen.items():
            parameter.data = own[name] + filter_noise(own[name], sigma, derive_seed(seed, name))
        yield
    finally:
        for name, parameter in frozen.items():
            parameter.data = own[name]

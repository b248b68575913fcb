"""Flat minima: the gradient of a step is taken beside the weights, and the step is made from the weights themselves.

    SAM   (arXiv 2010.01412)   g(θ + ε),  ε = ρ·g/‖g‖
    ASAM  (arXiv 2102.11600)   g(θ + ε),  ε = ρ·θ²g/‖θg‖, so that the scale of a weight does not matter
    RWP   (arXiv 2211.11489)   λ·g(θ + ε) + (1 − λ)·g(θ),  ε random (`pe_rlhf/model/noise.py`)

Norms are of all trained weights of a role, of the whole batch of all ranks. What depends on weights only, such as a
penalty of the adapter's kind, has no part in it: its gradient is added afterwards, at θ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from pe_rlhf.config import OptimizerConfig
from pe_rlhf.model.noise import filter_noise
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.seeding import derive_seed

Parameters = Mapping[str, nn.Parameter]
NoisyBase = Callable[[float, int], AbstractContextManager[None]]


def perturbation(role: str, parameters: Parameters, config: OptimizerConfig, seed: int) -> dict[str, Tensor]:
    """ε of a role by name, from the gradients that the parameters have; empty where no direction is the worst.

    Raises `TrainingError` for gradients that are not finite.
    """
    if config.sharpness == "rwp":
        # Drawn on the CPU, for the same numbers on every device: an adapter is small.
        noise = {n: filter_noise(p.cpu(), config.noise, derive_seed(seed, n)) for n, p in parameters.items()}
        return {name: noise[name].to(p.device) for name, p in parameters.items()}
    scales = {n: p.detach().abs() if config.sharpness == "asam" else torch.ones_like(p) for n, p in parameters.items()}
    scaled = {n: scales[n] * p.grad for n, p in parameters.items() if p.grad is not None}
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in scaled.values()])).item()
    if not math.isfinite(norm):
        raise TrainingError(f"the gradient of {role} is not finite", kind="not_finite", key=role)
    return {n: config.rho / norm * scales[n] * g for n, g in scaled.items()} if norm else {}


@torch.no_grad()
def take_beside(
    roles: Mapping[str, Parameters],
    config: OptimizerConfig,
    seed: int,
    again: Callable[[], object],
    sum_gradients: Callable[[], None],
    noisy_base: NoisyBase | None = None,
) -> None:
    """Replace the gradients at the weights, which are there and complete, by those that the method takes.

    Args:
        roles: the trained parameters by role; afterwards they are as before, to the bit.
        again: accumulates the gradients of the loss a second time.
        sum_gradients: completes them over the ranks.
        noisy_base: a context in which the base has noise, given σ and a seed; used where the recipe asks for it.
    """
    moves = {role: perturbation(role, named, config, derive_seed(seed, role)) for role, named in roles.items()}
    if not any(moves.values()):
        return
    everything = [parameter for named in roles.values() for parameter in named.values()]
    gradients, weights = [p.grad for p in everything], [p.detach().clone() for p in everything]
    try:
        for role, named in roles.items():
            for name, move in moves[role].items():
                named[name].add_(move)
        for parameter in everything:
            parameter.grad = None
        noisy = noisy_base(config.noise, seed) if noisy_base is not None and config.noises_base else nullcontext()
        with torch.enable_grad(), noisy:
            again()
    finally:
        # From copies: θ + ε − ε is not θ in floating point, and a loss that fails must leave the weights as they were.
        for parameter, weight in zip(everything, weights, strict=True):
            parameter.copy_(weight)
    sum_gradients()
    if config.sharpness == "rwp":
        for parameter, usual in zip(everything, gradients, strict=True):
            if usual is not None and parameter.grad is not None:
                parameter.grad.lerp_(usual, 1 - config.noise_weight)

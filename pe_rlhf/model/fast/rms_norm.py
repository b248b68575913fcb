"""RMSNorm (arXiv 1910.07467) with a frozen weight: transformers' numbers to the bit, and a backward pass of its own.

Autograd would go over the hidden states three times as often, and under a bf16 model keep a copy of them in fp32.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Norm = Any  # a module of transformers, of one of many classes that are alike


def shorten_norms(model: nn.Module) -> None:
    """Give a frozen model's RMSNorms the short backward pass, where a small input shows that they are what is known."""
    for module in model.modules():
        if "RMSNorm" in type(module).__name__ and _takes_hidden_states_alone(module) and _is_the_same(module):
            module.forward = partial(_forward, module)


def _forward(norm: Norm, hidden: Tensor) -> Tensor:
    if norm.weight.requires_grad:  # a copy of the model that is fully tuned
        return type(norm).forward(norm, hidden)
    return _RMSNorm.apply(hidden, norm.weight, _epsilon(norm))


def _takes_hidden_states_alone(norm: Norm) -> bool:
    """Not a gate besides, which recurrent models give some; and it has a weight, and a forward pass that is its own."""
    is_plain = "forward" not in vars(norm) and len(inspect.signature(type(norm).forward).parameters) == 2
    return is_plain and isinstance(getattr(norm, "weight", None), nn.Parameter) and _epsilon(norm) is not None


def _epsilon(norm: Norm) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


class _RMSNorm(torch.autograd.Function):
    """`weight · x / rms(x)`; the root is taken in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        wide = hidden.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden, weight_H, inverse)
        return weight_H * (wide * inverse).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        # With n = x / rms and g the gradient of n: ∂/∂x = (g − n · mean(g · n)) / rms.
        hidden, weight_H, inverse = ctx.saved_tensors
        wide, scaled = hidden.float(), (gradients[0] * weight_H).float()
        along = torch.linalg.vecdot(scaled, wide)[..., None] * (inverse.pow(3) / -hidden.shape[-1])
        return scaled.mul_(inverse).addcmul_(wide, along).to(hidden.dtype), None, None


def _is_the_same(norm: Norm) -> bool:
    """Whether a norm gives what is computed here, and autograd its gradient."""
    size = norm.weight.numel()
    hidden = torch.linspace(-3, 3, 4 * size, dtype=norm.weight.dtype, device=norm.weight.device).view(4, size)
    try:
        with torch.enable_grad():
            found, expected = (hidden.clone().requires_grad_() for _ in range(2))
            ours, theirs = _RMSNorm.apply(found, norm.weight, _epsilon(norm)), type(norm).forward(norm, expected)
            ours.sum().backward()
            theirs.sum().backward()
    except (TypeError, RuntimeError, AttributeError):  # one that is called otherwise
        return False
    assert found.grad is not None
    assert expected.grad is not None
    return torch.equal(ours, theirs) and torch.allclose(found.grad, expected.grad, rtol=0.05, atol=1e-3)

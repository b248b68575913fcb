"""Gated MLPs, `down(act(gate(x)) · up(x))` (arXiv 2002.05202), that keep less for the backward pass.

Autograd keeps act(gate) besides gate, up and their product; here it is computed again. Numbers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaMLP

Activation = Callable[[Tensor], Tensor]
MLP = Any  # a module of transformers, of one of many classes that are alike


def lighten_mlps(model: nn.Module) -> None:
    """Let those of a model's MLPs keep less whose code is Llama's, which most of transformers' are copies of."""
    for module in model.modules():
        if _is_llamas(type(module).forward) and "forward" not in vars(module) and _has_no_weights(module):
            module.forward = partial(_forward, module)


def _forward(mlp: MLP, x: Tensor) -> Tensor:
    return mlp.down_proj(_Gate.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn))


class _Gate(torch.autograd.Function):
    """`act(gate) · up`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.activation(gate)
        return torch.autograd.grad(activated, gate, gradients[0] * up)[0], gradients[0] * activated.detach(), None


def _is_llamas(forward: Any) -> bool:
    """Whether a class's forward pass is that of Llama's MLP, statement by statement: some clamp what they multiply."""
    code, llamas = getattr(forward, "__code__", None), LlamaMLP.forward.__code__
    return code is not None and (code.co_code, code.co_names) == (llamas.co_code, llamas.co_names)


def _has_no_weights(mlp: MLP) -> bool:
    """Whether the activation has none that could be trained."""
    return not isinstance(mlp.act_fn, nn.Module) or not any(True for _ in mlp.act_fn.parameters())

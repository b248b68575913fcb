"""Adding a change of the weight that has to be formed as a matrix, without keeping the matrix for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_rlhf.adapters.layer import has_forward_of_linear, has_plain_weight, weight_out_in
from pe_rlhf.adapters.lora.anchored import writable

Change = Callable[..., Tensor]
Gradients = Callable[..., tuple[Tensor, ...]]


def add_dense(x: Tensor, base: nn.Module, change: Change, gradients: Gradients, *trained: Tensor) -> Tensor:
    """`base(x) + ΔW·x`, with a fresh ΔW_OI from `change(*trained)`, which is called once more in the backward pass.

    `gradients(grad_OI, *trained)` gives those of `trained` from the one of ΔW. By hand, since on a small layer autograd
    for them takes a twentieth of the whole pass.

    ΔW is zero if the last trained tensor is. In fp32 on a CPU it is one product with W0 + ΔW, or `base(x)` itself as
    long as that tensor is zero. Elsewhere ΔW has a product of its own: a narrow W0 + ΔW loses most of a small ΔW, and a
    GPU would have to be waited for to know whether it is zero.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and _is_plain(base):
        return _Sum.apply(x, base, change, gradients, *trained)
    y = base(x)
    return _AddChange.apply(writable(y), x.to(y.dtype), change, gradients, *trained)


def _is_plain(base: nn.Module) -> bool:
    """Whether a module computes a product with an fp32 weight, and no hook sees it."""
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    return has_plain_weight(base) and has_forward_of_linear(base) and base.weight.dtype == torch.float32 and not hooks


class _Sum(torch.autograd.Function):
    """`(W0 + ΔW) x + bias`; gradients go to x and to what is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, change: Change, gradients: Gradients, *trained: Tensor) -> Tensor:
        ctx.base, ctx.change, ctx.gradients = base, change, gradients
        ctx.save_for_backward(x, *trained)
        if not trained[-1].any():
            return base(x)
        return F.linear(x, change(*trained).add_(weight_out_in(base)), base.bias)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *trained = ctx.saved_tensors
        grad_x = grad @ ctx.change(*trained).add_(weight_out_in(ctx.base)) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, *_gradients(ctx, grad, x, trained)


class _AddChange(torch.autograd.Function):
    """`y += ΔW x`, in place; gradients go to y, to x and to what is trained."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, change: Change, gradients: Gradients, *trained: Tensor) -> Tensor:
        ctx.change, ctx.gradients = change, gradients
        ctx.save_for_backward(x, *trained)
        y.view(-1, y.shape[-1]).addmm_(x.flatten(0, -2), change(*trained).to(y.dtype).T)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *trained = ctx.saved_tensors
        grad_x = grad @ ctx.change(*trained).to(grad.dtype) if ctx.needs_input_grad[1] else None
        return grad, grad_x, None, None, *_gradients(ctx, grad, x, trained)


def _gradients(ctx: Any, grad: Tensor, x: Tensor, trained: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Of the trained tensors; empty where no tensor is trained."""
    if not any(ctx.needs_input_grad[4:]):
        return (None,) * len(trained)
    found = ctx.gradients(grad.flatten(0, -2).T @ x.flatten(0, -2), *trained)
    return tuple(grad.to(tensor.dtype) for grad, tensor in zip(found, trained, strict=True))

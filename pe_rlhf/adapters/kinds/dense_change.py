"""Adding a change of the weight that has to be formed as a matrix, without keeping the matrix for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_rlhf.adapters.layer import has_forward_of_linear, has_plain_weight, weight_out_in
from pe_rlhf.adapters.lora.anchored import writable

Change = Callable[..., Tensor]
Gradients = tuple[Tensor | None, ...]


def add_dense(x: Tensor, base: nn.Module, change: Change, *trained: Tensor) -> Tensor:
    """`base(x) + ΔW·x`, with a fresh ΔW_OI from `change(*trained)`, which is called once more in the backward pass.

    ΔW is zero if the last trained tensor is. In fp32 on a CPU it is one product with W0 + ΔW, or `base(x)` itself as
    long as that tensor is zero. Elsewhere ΔW has a product of its own: a narrow W0 + ΔW loses most of a small ΔW, and a
    GPU would have to be waited for to know whether it is zero.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and _is_plain(base):
        return _Sum.apply(x, base, change, *trained)
    y = base(x)
    return _AddChange.apply(writable(y), x.to(y.dtype), change, *trained)


def _is_plain(base: nn.Module) -> bool:
    """Whether a module computes a product with an fp32 weight, and no hook sees it."""
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    return has_plain_weight(base) and has_forward_of_linear(base) and base.weight.dtype == torch.float32 and not hooks


class _Sum(torch.autograd.Function):
    """`(W0 + ΔW) x + bias`; gradients go to x and to what is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, change: Change, *trained: Tensor) -> Tensor:
        ctx.base, ctx.change = base, change
        ctx.save_for_backward(x, *trained)
        if not trained[-1].any():
            return base(x)
        return F.linear(x, change(*trained).add_(weight_out_in(base)), base.bias)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:  # type: ignore[override]
        change_OI, grads = _backward(ctx, gradients[0], ctx.needs_input_grad[3:])
        grad_x = gradients[0] @ change_OI.add_(weight_out_in(ctx.base)) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, *grads


class _AddChange(torch.autograd.Function):
    """`y += ΔW x`, in place; gradients go to x and to what is trained."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, change: Change, *trained: Tensor) -> Tensor:
        ctx.change = change
        ctx.save_for_backward(x, *trained)
        y.view(-1, y.shape[-1]).addmm_(x.flatten(0, -2), change(*trained).to(y.dtype).T)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:  # type: ignore[override]
        change_OI, grads = _backward(ctx, gradients[0], ctx.needs_input_grad[3:])
        grad_x = gradients[0] @ change_OI.to(gradients[0].dtype) if ctx.needs_input_grad[1] else None
        return gradients[0], grad_x, None, *grads


def _backward(ctx: Any, grad: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Gradients]:
    """ΔW_OI, formed again, and the gradients of those trained tensors that are wanted."""
    x, *trained = ctx.saved_tensors
    if not any(wanted):
        return ctx.change(*trained), (None,) * len(trained)
    leaves = [t.detach().requires_grad_(want) for t, want in zip(trained, wanted, strict=True)]
    with torch.enable_grad():
        change_OI = ctx.change(*leaves)
    grad_OI = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(change_OI.dtype)
    found = iter(torch.autograd.grad(change_OI, [leaf for leaf in leaves if leaf.requires_grad], grad_OI))
    return change_OI.detach(), tuple(next(found) if want else None for want in wanted)

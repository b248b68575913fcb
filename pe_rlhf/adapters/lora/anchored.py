"""Anchored LoRA: an adapter of any initialisation that leaves the base weight alone.

    W_role = W0 + s · (B·A − B0·A0)

A0 and B0 are the frozen initial values, s = alpha/r or alpha/sqrt(r). The difference is taken first and added to the
base output second; at step 0 both terms are the same numbers, so the role's output is bit-identical to the anchor's.
PiSSA and its kin as published move s·B0·A0 out of the base weight instead: the same function and the same gradients,
but then "adapter off" is no longer the model that the KL is measured against.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_rlhf.adapters.layer import LowRankFactors

Scaling = Literal["standard", "rslora"]


def lora_scale(alpha: float, rank: int, scaling: Scaling) -> float:
    """`alpha/r`, or `alpha/sqrt(r)` for rank-stabilised LoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if scaling == "rslora" else alpha / rank


class AnchoredLoRA(nn.Module):
    """LoRA with its initial product subtracted; A, B and the initial values are fp32 whatever the base's dtype.

    Args:
        A_RI, B_OR: the initial factors, from an init in `adapters/inits/`.
        scale: s, the factor of the product.
        dropout: probability of zeroing an input of the adapter, in `train()` mode only.
    """

    initial_A_RI: Tensor | None
    initial_B_OR: Tensor | None

    def __init__(self, A_RI: Tensor, B_OR: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(_own(A_RI))
        self.lora_B = nn.Parameter(_own(B_OR))
        # Where B0 is zero the second term does not exist and costs nothing.
        starts_at_zero = not bool(B_OR.any())
        self.register_buffer("initial_A_RI", None if starts_at_zero else _own(A_RI))
        self.register_buffer("initial_B_OR", None if starts_at_zero else _own(B_OR))
        self.scale = scale
        self.dropout = dropout

    @classmethod
    def from_state(cls, state: dict[str, Tensor], scale: float, dropout: float) -> AnchoredLoRA:
        """The module that `state_dict()` gave `state`. Raises KeyError where a tensor is missing."""
        B_OR = state["lora_B"]
        adapter = cls(
            state.get("initial_A_RI", state["lora_A"]),
            state.get("initial_B_OR", torch.zeros_like(B_OR)),
            scale,
            dropout,
        )
        adapter.load_state_dict(state)
        return adapter

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """`y + s·(B(A x) − B0(A0 x))` in y's dtype, written into y where it can be; one dropped-out x in both terms."""
        if self.training and self.dropout:
            x = F.dropout(x.to(self.lora_A.dtype), self.dropout)
        if y._base is not None or not y.is_contiguous():  # Conv1D's is a view, which autograd would copy more often
            y = y.clone(memory_format=torch.contiguous_format)
        return _AddDifference.apply(y, x, self.lora_A, self.lora_B, self.initial_A_RI, self.initial_B_OR, self.scale)

    @torch.no_grad()
    def factors(self) -> LowRankFactors:
        """Plain LoRA factors on the original base: `[A; A0]`, `[B, −B0]`, rank 2r (rank r where B0 = 0)."""
        if self.initial_A_RI is None or self.initial_B_OR is None:
            return LowRankFactors(self.lora_A.detach().clone(), self.lora_B.detach().clone(), self.scale)
        A_RI = torch.cat([self.lora_A, self.initial_A_RI], dim=0)
        B_OR = torch.cat([self.lora_B, -self.initial_B_OR], dim=1)
        return LowRankFactors(A_RI, B_OR, self.scale)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW_OI = s · (B·A − B0·A0)."""
        delta = self.lora_B @ self.lora_A
        if self.initial_A_RI is not None and self.initial_B_OR is not None:
            delta = delta - self.initial_B_OR @ self.initial_A_RI
        return self.scale * delta


class _AddDifference(torch.autograd.Function):
    """`y += s·(B(A x) − B0(A0 x))`, in place, since nothing else needs y; the adapter's part in its own dtype.

    Autograd would keep what is kept here and copies of x in fp32 besides, and go over the wide outputs more often.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        A_RI: Tensor,
        B_OR: Tensor,
        initial_A_RI: Tensor | None,
        initial_B_OR: Tensor | None,
        scale: float,
    ) -> Tensor:
        x_NI, y_NO = x.flatten(0, -2).to(A_RI.dtype), y.view(-1, y.shape[-1])
        low_NR = F.linear(x_NI, A_RI)
        if initial_A_RI is not None and initial_B_OR is not None:
            difference_NO = F.linear(low_NR, B_OR).sub_(F.linear(F.linear(x_NI, initial_A_RI), initial_B_OR))
            y_NO.add_(difference_NO, alpha=scale)
        elif y.dtype == low_NR.dtype:
            y_NO.addmm_(low_NR, B_OR.T, alpha=scale)  # exact at step 0, since B is zero there
        else:
            y_NO.add_(F.linear(low_NR, B_OR), alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, low_NR, A_RI, B_OR, initial_A_RI, initial_B_OR)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, low_NR, A_RI, B_OR, initial_A_RI, initial_B_OR = ctx.saved_tensors
        x_NI, grad_NO = (tensor.flatten(0, -2).to(A_RI.dtype) for tensor in (x, gradients[0]))
        down_OR, up_RI = B_OR, A_RI
        if initial_A_RI is not None:
            down_OR, up_RI = torch.cat([B_OR, -initial_B_OR], dim=1), torch.cat([A_RI, initial_A_RI])
        grad_NR = ctx.scale * (grad_NO @ down_OR)
        grad_x = (grad_NR @ up_RI).view_as(x).to(x.dtype) if ctx.needs_input_grad[1] else None
        grad_A_RI = grad_NR[:, : len(A_RI)].T @ x_NI
        grad_B_OR = (ctx.scale * (low_NR.T @ grad_NO)).T  # the other way round it takes twice the time
        return gradients[0], grad_x, grad_A_RI, grad_B_OR, None, None, None


def _own(factor: Tensor) -> Tensor:
    """An fp32 copy, row after row in memory: columns of an SVD are not, and then round differently than once saved."""
    return factor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)

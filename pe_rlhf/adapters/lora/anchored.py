"""Anchored LoRA: an adapter of any initialisation that leaves the base weight alone.

    W_role = W0 + s · (B·A − B0·A0) = W0 + s · [B − B0, B0] · [A; A − A0]

A0 and B0 are the frozen initial values, s = alpha/r or alpha/sqrt(r). PiSSA and its kin as published move s·B0·A0 out
of the base weight instead: the same function and the same gradients, but then "adapter off" is no longer the model that
the KL is measured against.

The right-hand form is what is computed, in the forward and the backward pass and in exports. Each of its terms has a
factor that is exactly zero at step 0, so the role's output is bit-identical to the anchor's in every dtype and on every
kernel. And each term is as small as the update itself, so bf16 products are precise enough. The left-hand form is a
difference of two large products: after one step of PiSSA, bf16 rounds them by more than the whole update.
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
        A_RI, B_OR: the initial factors, from an init in `adapters/lora/inits/`.
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
        """`y + s·[B−B0, B0]([A; A−A0] x)` in y's dtype, written into y where it can be."""
        x = x.to(y.dtype)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        if y._base is not None or not y.is_contiguous():  # Conv1D's is a view, which autograd would copy more often
            y = y.clone(memory_format=torch.contiguous_format)
        # Made anew in each pass: a fused optimizer changes A and B without counting up their versions.
        up, down = (factor.to(y.dtype) for factor in self._difference())
        if not torch.is_grad_enabled():  # a token that is sampled has no time for autograd's bookkeeping
            _add_low_rank(y, x, up, down, self.scale)
            return y
        return _AddLowRank.apply(y, x, self.lora_A, self.lora_B, up, down, self.scale)

    @torch.no_grad()
    def factors(self) -> LowRankFactors:
        """Plain LoRA factors on the original base: `[A; A−A0]`, `[B−B0, B0]`, rank 2r (rank r where B0 = 0)."""
        up, down = self._difference()
        return LowRankFactors(up.clone(), down.clone(), self.scale)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW_OI = s · (B·A − B0·A0), fp32."""
        up, down = self._difference()
        return self.scale * (down @ up)

    @torch.no_grad()
    def _difference(self) -> tuple[Tensor, Tensor]:
        """`[A; A−A0]` and `[B−B0, B0]`; A and B themselves where B0 = 0."""
        A_RI, B_OR = self.lora_A.detach(), self.lora_B.detach()
        if self.initial_A_RI is None or self.initial_B_OR is None:
            return A_RI, B_OR
        down = torch.cat([B_OR - self.initial_B_OR, self.initial_B_OR], dim=1)
        return torch.cat([A_RI, A_RI - self.initial_A_RI]), down


def _add_low_rank(y: Tensor, x: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """`y += s·down(up x)` in place; returns `up x` as _NR."""
    low_NR = F.linear(x.flatten(0, -2), up)
    y.view(-1, y.shape[-1]).addmm_(low_NR, down.T, alpha=scale)
    return low_NR


class _AddLowRank(torch.autograd.Function):
    """`y += s·down(up x)`, in place, since nothing else needs y; gradients go to x and to A and B.

    `up` = [A; A−A0] and `down` = [B−B0, B0] are of the base's dtype, gradients of A and B are fp32. Autograd's own
    graph would keep more of the wide tensors and go over them more often.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A_RI: Tensor, B_OR: Tensor, up: Tensor, down: Tensor, scale: float
    ) -> Tensor:
        low_NR = _add_low_rank(y, x, up, down, scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, low_NR, up, down)
        ctx.scale, ctx.rank = scale, len(A_RI)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, low_NR, up, down = ctx.saved_tensors
        rank = ctx.rank
        x_NI, grad_NO = x.flatten(0, -2), gradients[0].flatten(0, -2)
        grad_NR = ctx.scale * (grad_NO @ down)
        grad_x = (grad_NR @ up).view_as(x) if ctx.needs_input_grad[1] else None
        # A is in both halves of `up`, B in the first half of `down` only: ∂L/∂A = s·Bᵀ∂y·xᵀ with B = (B−B0) + B0.
        through_B_NR = grad_NR if len(up) == rank else grad_NR[:, :rank] + grad_NR[:, rank:]
        grad_A_RI = (through_B_NR.T @ x_NI).float()
        grad_B_OR = (
            ctx.scale * (low_NR[:, :rank].T @ grad_NO).float()
        ).T  # the other way round it takes twice the time
        return gradients[0], grad_x, grad_A_RI, grad_B_OR, None, None, None


def _own(factor: Tensor) -> Tensor:
    """An fp32 copy, row after row in memory: columns of an SVD are not, and then round differently than once saved."""
    return factor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)

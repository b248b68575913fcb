"""Redrawn projections: a new random low-rank space every k steps (J. Su; compare Flora 2402.03293, ReLoRA 2307.05695).

    W0 + ΔW + B·A        A random and frozen, B trained from zero; every k steps ΔW += B·A, B = 0, A is drawn anew

A's entries have variance 1/r, so E[AᵀA] = I: with k = 1 and SGD, ΔW changes by −η·G·AᵀA, in the mean full training's
step. So all of W0 can be reached, in r dimensions at a time. With `side: outputs` B is drawn and A is trained.

ΔW is dense, one fp32 matrix per layer and role, and its product costs as much as the base's: this is meant against
forgetting, not for speed. At step 0 ΔW and B are zero, and add exact zeros. The draws come from a seed and a count in a
buffer, so a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, LayerContext, Layers, Restart, Time
from pe_rlhf.adapters.layer import AdapterLayer
from pe_rlhf.adapters.lora.anchored import add_product, writable
from pe_rlhf.config.adapter import AdapterConfig
from pe_rlhf.config.section import Positive


class RedrawnConfig(AdapterConfig):
    """One of two low-rank factors is trained, and the other is drawn anew every few steps."""

    rank: Positive = Field(default=16, description="rank r of B·A")
    every: Positive = Field(default=50, description="optimizer steps k between two draws")
    side: Literal["inputs", "outputs"] = Field(
        default="inputs",
        description="what is projected: inputs: A is drawn and B trained; outputs: the other way round",
    )


class RedrawnLayer(AdapterLayer):
    """`base(x) + ΔW x + B(A x)`.

    The tensors are the factor that is `learned`, the other, `drawn`, the sum `change_OI` of what was learned before,
    and `draws`: a seed, and how many draws there were after the first.
    """

    trained: ClassVar[tuple[str, ...]] = ("learned",)
    kept: ClassVar[tuple[str, ...]] = ("drawn", "change_OI", "draws")
    learned: nn.Parameter
    drawn: Tensor
    change_OI: Tensor
    draws: Tensor

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        y = base(x)
        y = _AddFrozen.apply(writable(y), x.to(y.dtype), self.change_OI)
        return add_product(x, y, *self._factors())

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A _RI and B _OR."""
        return (self.drawn, self.learned) if self.settings.side == "inputs" else (self.learned, self.drawn)

    @torch.no_grad()
    def fold(self) -> None:
        """Add B·A to ΔW, set the learned factor to zero and draw the other anew."""
        A_RI, B_OR = self._factors()
        self.change_OI.addmm_(B_OR, A_RI)
        self.learned.zero_()
        self.draws[1] += 1
        self.drawn.copy_(_draw(self.draws, self.drawn.shape, self.settings.rank))

    @torch.no_grad()
    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        """ΔW + B·A, fp32."""
        A_RI, B_OR = self._factors()
        return torch.addmm(self.change_OI, B_OR, A_RI)


def _draw(draws: Tensor, size: torch.Size | tuple[int, ...], rank: int) -> Tensor:
    """The projection of a count, the same on every machine and rank: N(0, 1/r) on the CPU."""
    seed, count = draws.tolist()
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + count)) * rank**-0.5


class _AddFrozen(torch.autograd.Function):
    """`y += ΔW x`, in place; a narrow copy of ΔW is made in both passes, not kept between them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, change_OI: Tensor) -> Tensor:
        y.view(-1, y.shape[-1]).addmm_(x.flatten(0, -2), change_OI.to(y.dtype).T)
        ctx.mark_dirty(y)
        ctx.save_for_backward(change_OI)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (change_OI,) = ctx.saved_tensors
        grad_x = gradients[0] @ change_OI.to(gradients[0].dtype) if ctx.needs_input_grad[1] else None
        return gradients[0], grad_x, None


class Redrawn(AdapterKind[RedrawnConfig]):
    """A low-rank factor on a projection that is drawn anew."""

    settings_type: ClassVar[type[AdapterConfig]] = RedrawnConfig
    layer = RedrawnLayer
    restarted: ClassVar[Mapping[str, Restart]] = {"learned": "momentum"}

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        """Zeros, a seed and its first draw."""
        (out_features, in_features), rank = context.weight_OI.shape, self.settings.rank
        size = (rank, in_features) if self.settings.side == "inputs" else (out_features, rank)
        seed = torch.randint(2**62, (1,), generator=context.generator)
        draws = torch.cat([seed, torch.zeros_like(seed)])
        learned = torch.zeros(self.sizes(out_features, in_features)["learned"])
        change_OI = torch.zeros(out_features, in_features)
        return {"learned": learned, "drawn": _draw(draws, size, rank), "change_OI": change_OI, "draws": draws}

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        rank = self.settings.rank
        return {"learned": (out_features, rank) if self.settings.side == "inputs" else (rank, in_features)}

    def after_step(self, layers: Layers, time: Time) -> set[str]:
        """Fold and draw every k steps. What was learned has another meaning then: its momentum starts again.

        AdamW's second moment stays. It has the size of the gradients, which is the same for every draw.
        """
        if time.step % self.settings.every:
            return set()
        for layer in layers.values():
            layer.fold()
        return {"learned"}

"""Anchored LoRA: an adapter of any initialisation that leaves the base weight as it is.

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
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, LayerContext, Layers, PeftFiles
from pe_rlhf.adapters.layer import AdapterLayer, LowRankFactors
from pe_rlhf.adapters.layer_statistics import Need
from pe_rlhf.adapters.lora.init_registry import InitContext, init_of
from pe_rlhf.config.adapter import AdapterConfig, LoRAConfig, LowRankConfig

Scaling = Literal["standard", "rslora"]
ALIGNED_BYTES = 16  # a row of a grouped product has a multiple of them


def lora_scale(alpha: float, rank: int, scaling: Scaling) -> float:
    """`alpha/r`, or `alpha/sqrt(r)` for rank-stabilised LoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if scaling == "rslora" else alpha / rank


def scale_of(settings: LowRankConfig) -> float:
    """The factor s of B·A."""
    return lora_scale(settings.alpha, settings.rank, settings.scaling)


class AnchoredLoRA(AdapterLayer):
    """LoRA with its initial product subtracted.

    The tensors are `lora_A` _RI and `lora_B` _OR, and where B0 is not zero their initial values `initial_A_RI` and
    `initial_B_OR`.
    """

    trained = ("lora_A", "lora_B")
    optional = ("initial_A_RI", "initial_B_OR")
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    initial_A_RI: Tensor | None
    initial_B_OR: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor], settings: LowRankConfig) -> None:
        super().__init__(tensors, settings)
        self.scale = scale_of(settings)

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """`base(x) + s·[B−B0, B0]([A; A−A0] x)` in the base's dtype, written into the base's output where it can be."""
        return self.add_low_rank(x, base(x))

    def add_low_rank(self, x: Tensor, y: Tensor) -> Tensor:
        """`y + s·[B−B0, B0]([A; A−A0] x)`, written into y where it can be."""
        x = x.to(y.dtype)
        if self.training and self.settings.dropout:
            x = F.dropout(x, self.settings.dropout)
        y = writable(y)
        # Made anew in each pass: a fused optimizer changes A and B without counting up their versions.
        with torch.no_grad():
            up, down = (factor.to(y.dtype) for factor in self._difference())
        if not torch.is_grad_enabled():  # a token that is sampled has no time for autograd's bookkeeping
            _add_low_rank(y, x, up, down, self.scale)
            return y
        return _AddLowRank.apply(y, x, self.lora_A, self.lora_B, up, down, self.scale)

    def lora_factors(self) -> LowRankFactors | None:
        return self.export_factors()

    @torch.no_grad()
    def export_factors(self) -> LowRankFactors:
        """LoRA factors on the original base: `[A; A−A0]`, `[B−B0, B0]`, rank 2r (rank r where B0 = 0)."""
        up, down = self._difference()
        return LowRankFactors(up.clone(), down.clone(), self.scale)

    @torch.no_grad()
    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        """ΔW_OI = s · (B·A − B0·A0), fp32."""
        up, down = self._difference()
        return self.scale * (down @ up)

    def starts(self) -> dict[str, Tensor]:
        """The initial A0 and B0, where B0 is not zero: there the anchor is."""
        found = {"lora_A": self.initial_A_RI, "lora_B": self.initial_B_OR}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _difference(self) -> tuple[Tensor, Tensor]:
        """`[A; A−A0]` and `[B−B0, B0]`; A and B themselves where B0 = 0."""
        A_RI, B_OR = self.lora_A, self.lora_B
        if self.initial_A_RI is None or self.initial_B_OR is None:
            return A_RI, B_OR
        down = torch.cat([B_OR - self.initial_B_OR, self.initial_B_OR], dim=-1)
        return torch.cat([A_RI, A_RI - self.initial_A_RI], dim=-2), down


class ExpertLoRA(AnchoredLoRA):
    """Anchored LoRA on fused experts: every tensor has an axis of experts, E, before the others.

    Its factors are no plain LoRA: PEFT has another layout for them, and vLLM does not load that.
    """

    forward = AdapterLayer.forward  # none: experts compute their own products
    lora_factors = AdapterLayer.lora_factors

    def add_to_rows(self, x_SI: Tensor, y_SO: Tensor, ends_E: Tensor) -> Tensor:
        """`y + s·[B−B0, B0]([A; A−A0] x)` for rows that are sorted by expert; those of expert e end at `ends_E[e]`."""
        x_SI = x_SI.to(y_SO.dtype)
        if self.training and self.settings.dropout:
            x_SI = F.dropout(x_SI, self.settings.dropout)
        up_ERI, down_EOR = (factor.to(y_SO.dtype) for factor in self._difference())
        missing = -up_ERI.shape[1] % (ALIGNED_BYTES // y_SO.element_size())
        up_ERI, down_EOR = F.pad(up_ERI, (0, 0, 0, missing)), F.pad(down_EOR, (0, missing))
        low_SR = F.grouped_mm(x_SI, up_ERI.mT, offs=ends_E)
        return torch.add(y_SO, F.grouped_mm(low_SR, down_EOR.mT, offs=ends_E), alpha=self.scale)


def writable(y: Tensor) -> Tensor:
    """A base's output as one that can be written into: Conv1D's is a view, which autograd would copy more often."""
    whole = y._base is None and y.is_contiguous()
    return y if whole else y.clone(memory_format=torch.contiguous_format)


def add_product(x: Tensor, y: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float = 1.0) -> Tensor:
    """`y + s·B(A x)` in y's dtype, written into y where it can be; A and B may be computed from what is trained."""
    up, down = A_RI.detach().to(y.dtype), B_OR.detach().to(y.dtype)
    return _AddLowRank.apply(writable(y), x.to(y.dtype), A_RI, B_OR, up, down, scale)


def add_frozen(x: Tensor, y: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """`y + s·B(A x)` of factors that are not trained, all of y's dtype, written into y; it has the bits of a LoRA."""
    if not torch.is_grad_enabled():
        _add_low_rank(y, x, A_RI, B_OR, scale)
        return y
    return _AddLowRank.apply(y, x, A_RI, B_OR, A_RI, B_OR, scale)


def add_low(y: Tensor, low: Tensor, down_OR: Tensor) -> Tensor:
    """`y + down·low`, written into y where it can be; low _…R is of y's dtype, down may be of another."""
    return _AddLow.apply(writable(y), low, down_OR, down_OR.detach().to(y.dtype))


def _add_low_rank(y: Tensor, x: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """`y += s·down(up x)` in place; returns `up x` as _NR."""
    low_NR = F.linear(x.flatten(0, -2), up)
    y.view(-1, y.shape[-1]).addmm_(low_NR, down.T, alpha=scale)
    return low_NR


def anchored_tensors(A_RI: Tensor, B_OR: Tensor) -> dict[str, Tensor]:
    """The tensors of a layer that starts from these factors. Where A0 or B0 is zero there is no product to subtract."""
    made = {"lora_A": A_RI, "lora_B": B_OR}
    return made | {"initial_A_RI": A_RI, "initial_B_OR": B_OR} if bool(A_RI.any() and B_OR.any()) else made


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
        grad_A_RI = (through_B_NR.T @ x_NI).float() if ctx.needs_input_grad[2] else None
        grad_B_OR = None
        if ctx.needs_input_grad[3]:  # the other way round it takes twice the time
            grad_B_OR = (ctx.scale * (low_NR[:, :rank].T @ grad_NO).float()).T
        return gradients[0], grad_x, grad_A_RI, grad_B_OR, None, None, None


class _AddLow(torch.autograd.Function):
    """`y += down·low`, in place; `down` is `down_OR` in y's dtype."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, low: Tensor, down_OR: Tensor, down: Tensor) -> Tensor:
        y.view(-1, y.shape[-1]).addmm_(low.flatten(0, -2), down.T)
        ctx.mark_dirty(y)
        ctx.save_for_backward(low, down)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        low, down = ctx.saved_tensors
        grad_NO = gradients[0].flatten(0, -2)
        grad_low = (grad_NO @ down).view_as(low) if ctx.needs_input_grad[1] else None
        grad_OR = (low.flatten(0, -2).T @ grad_NO).float().T if ctx.needs_input_grad[2] else None
        return gradients[0], grad_low, grad_OR, None


class LoRA(AdapterKind[LowRankConfig]):
    """LoRA (arXiv 2106.09685) with any init, anchored. Kinds that hold a LoRA extend it."""

    settings_type: ClassVar[type[AdapterConfig]] = LoRAConfig
    layer: ClassVar[type[AdapterLayer]] = AnchoredLoRA
    fast = ("lora_B",)
    rank_of_weight = True

    def __init__(self, settings: LowRankConfig) -> None:
        super().__init__(settings)
        self.init, self._options = init_of(settings)

    @property
    def needs(self) -> Need | None:
        return self.init.needs

    @property
    def takes_experts(self) -> bool:
        return self.layer is AnchoredLoRA and self.needs is None

    @property
    def batch_size(self) -> int:
        return getattr(self._options, "batch_size", super().batch_size)

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        """A and B as the init makes them."""
        s, weight_OI = self.settings, context.weight_OI

        def factors(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
            given = (weight_OI, s.rank, scale_of(s), context.generator, self._options, context.statistics)
            return self.init(InitContext(*given))

        if weight_OI.dim() == 2:
            return anchored_tensors(*factors(weight_OI))
        As, Bs = zip(*map(factors, weight_OI), strict=True)  # expert by expert
        return anchored_tensors(torch.stack(As), torch.stack(Bs))

    def build(self, tensors: Mapping[str, Tensor], weight_OI: Tensor) -> AdapterLayer:
        """A layer of these tensors; what the init freezes is a buffer, as all that an adapter does not train."""
        on_experts = weight_OI.dim() == 3
        layer = ExpertLoRA(tensors, self.settings) if on_experts else super().build(tensors, weight_OI)
        for name in self.init.frozen:
            tensor = layer.get_parameter(name).detach()
            delattr(layer, name)
            layer.register_buffer(name, tensor)
        return layer

    def peft(self, layers: Layers) -> PeftFiles | None:
        """With experts, a LoRA with `target_parameters`; without, it is a plain one, which needs no form here."""
        from pe_rlhf.adapters.peft_export import as_plain_lora  # it imports the kinds

        if not any(isinstance(layer, ExpertLoRA) for layer in layers.values()):
            return None
        return as_plain_lora({name: layer.export_factors() for name, layer in layers.items()})

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        rank = self.settings.rank
        return {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}

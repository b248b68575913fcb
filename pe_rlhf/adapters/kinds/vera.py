"""VeRA (arXiv 2310.11454): two vectors a layer between random matrices that all layers share and nobody trains.

    y = W0·x + λ_b ⊙ B·(λ_d ⊙ (A·x))        λ_b starts at 0, λ_d at `d_initial`

A and B are parts of one random table each, A _RI its first I columns over √I. They follow from a seed, so a role holds
only the vectors, and the matrices are in memory once for each size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from peft import VeraConfig as PeftVeraConfig
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, LayerContext, Layers, PeftFiles
from pe_rlhf.adapters.layer import AdapterLayer, LowRankFactors
from pe_rlhf.adapters.lora.anchored import writable
from pe_rlhf.config.adapter import AdapterConfig
from pe_rlhf.config.section import Positive


class VeRAConfig(AdapterConfig):
    """VeRA: two trained vectors a layer between shared random matrices."""

    rank: Positive = Field(default=256, description="rank of the shared matrices, which costs little")
    d_initial: float = Field(default=0.1, gt=0, description="the value that λ_d starts from")
    projection_seed: int = Field(default=0, ge=0, description="seed of the shared matrices")


class VeRALayer(AdapterLayer):
    """`vera_lambda_b` _O and `vera_lambda_d` _R; `width` is the number of inputs."""

    trained = ("vera_lambda_b", "vera_lambda_d")
    kept = ("width",)
    vera_lambda_b: nn.Parameter
    vera_lambda_d: nn.Parameter
    width: Tensor

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        y = writable(base(x))
        return _AddVeRA.apply(
            y, x.to(y.dtype), self.vera_lambda_b, self.vera_lambda_d, *self.matrices(x.shape[-1], y.dtype)
        )

    def matrices(self, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The shared A _RI and B _OR of a layer with so many inputs."""
        rank, device = len(self.vera_lambda_d), self.vera_lambda_d.device
        seed = self.settings.projection_seed
        A_IR = random_matrix(seed, width, rank, width, device, dtype)
        return A_IR.T, random_matrix(seed + 1, len(self.vera_lambda_b), rank, rank, device, dtype)

    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        factors = self.lora_factors()
        return factors.B_OR @ factors.A_RI

    @torch.no_grad()
    def lora_factors(self) -> LowRankFactors:
        A_RI, B_OR = self.matrices(int(self.width))
        return LowRankFactors(self.vera_lambda_d[:, None] * A_RI, self.vera_lambda_b[:, None] * B_OR, 1.0)


class VeRA(AdapterKind[VeRAConfig]):
    """VeRA with shared uniform matrices."""

    settings_type = VeRAConfig
    layer = VeRALayer

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        out_features, in_features = context.weight_OI.shape
        lambda_d = torch.full((self.settings.rank,), self.settings.d_initial)
        made = {"vera_lambda_b": torch.zeros(out_features), "vera_lambda_d": lambda_d}
        return made | {"width": torch.tensor(in_features)}

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        return {"vera_lambda_b": (out_features,), "vera_lambda_d": (self.settings.rank,)}

    def peft(self, layers: Layers) -> PeftFiles | None:
        """PEFT cuts A and B of all layers from two matrices: the largest ones, with λ_d in their unit."""
        rank, seed = self.settings.rank, self.settings.projection_seed
        widest = max(int(layer.width) for layer in layers.values())
        tallest = max(len(layer.vera_lambda_b) for layer in layers.values())
        device = torch.device("cpu")
        shared = {
            "vera_A": random_matrix(seed, widest, rank, widest, device).T,
            "vera_B": random_matrix(seed + 1, tallest, rank, rank, device),
        }
        tensors = {
            name: {
                "vera_lambda_b": layer.vera_lambda_b.detach(),
                "vera_lambda_d": layer.vera_lambda_d.detach() * (widest / int(layer.width)) ** 0.5,
            }
            for name, layer in layers.items()
        }
        return PeftFiles(PeftVeraConfig(r=rank, save_projection=True), tensors, shared)


@lru_cache(maxsize=32)
def random_matrix(
    seed: int, rows: int, rank: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Numbers in [−1, 1) _NR over √width, row after row: of fewer rows it is the beginning of the same table."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.rand(rows, rank, generator=generator) * 2 - 1) / width**0.5).to(device, dtype)


class _AddVeRA(torch.autograd.Function):
    """`y += λ_b ⊙ B·(λ_d ⊙ (A·x))`, in place. Gradients go to x and to the vectors, in fp32."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, lambda_b: Tensor, lambda_d: Tensor, A_RI: Tensor, B_OR: Tensor
    ) -> Tensor:
        by_O, by_R = lambda_b.to(y.dtype), lambda_d.to(y.dtype)
        low_NR = F.linear(x.flatten(0, -2), A_RI)
        high_NO = F.linear(low_NR * by_R, B_OR)
        y.view(-1, y.shape[-1]).addcmul_(high_NO, by_O)
        ctx.mark_dirty(y)
        ctx.save_for_backward(low_NR, high_NO, by_O, by_R, A_RI, B_OR)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        low_NR, high_NO, by_O, by_R, A_RI, B_OR = ctx.saved_tensors
        grad_NO = gradients[0].flatten(0, -2)
        grad_b = (grad_NO * high_NO).sum(dim=0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        through_B_NR = grad_NO @ (by_O[:, None] * B_OR)  # cheaper than λ_b times the wide gradient
        grad_d = (through_B_NR * low_NR).sum(dim=0, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = (through_B_NR.mul_(by_R) @ A_RI).view(*gradients[0].shape[:-1], A_RI.shape[1])
        return gradients[0], grad_x, grad_b, grad_d, None, None

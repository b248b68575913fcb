"""AdaLoRA (arXiv 2303.10512): the layers of a role share a budget of ranks, which goes where it matters.

    W_role = W0 + s·P·Λ·Q        Λ diagonal, starts at 0; s = alpha/rank

A triplet is a column of P, its λ, a row of Q. Its importance is smoothed sensitivity |w·∂w| times smoothed uncertainty
(eq. 9–11), of λ and on average of the column and the row (eq. 8). After the warm-up the budget falls with the cube of
time from `rank` to `target_rank` triplets a layer (eq. 12); λ of the least important of all layers is set to 0. The
penalty keeps P and Q near orthonormal (eq. 4).
"""

from __future__ import annotations

import torch
from peft import LoraConfig
from pydantic import Field, model_validator
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, LayerContext, Layers, PeftFiles, Time
from pe_rlhf.adapters.layer import AdapterLayer, LowRankFactors
from pe_rlhf.adapters.lora.anchored import add_product
from pe_rlhf.config.adapter import AdapterConfig
from pe_rlhf.config.section import Decay, Positive, Rate, Share, refusal

PARTS = ("lora_A", "lora_E", "lora_B")


class AdaLoRAConfig(AdapterConfig):
    """AdaLoRA: a budget of ranks that all layers share."""

    rank: Positive = Field(default=12, description="rank of every layer at the start")
    target_rank: Positive | None = Field(
        default=None, description="mean rank of a layer at the end; two thirds of `rank` if left out"
    )
    alpha: float = Field(default=32.0, gt=0, description="P·Λ·Q is scaled by alpha/rank")
    warmup_share: Share = Field(default=0.1, description="share of the steps before the budget begins to fall")
    final_share: Share = Field(default=0.3, description="share of the steps at the end, with the final budget")
    every: Positive = Field(default=10, description="steps between two new budgets while it falls")
    sensitivity_decay: Decay = Field(default=0.85, description="β1, smoothing of the sensitivity")
    uncertainty_decay: Decay = Field(default=0.85, description="β2, smoothing of the uncertainty")
    orthogonality: Rate = Field(default=0.1, description="γ, weight of the penalty that keeps P and Q orthonormal")

    @property
    def final_rank(self) -> int:
        """The mean rank of a layer at the end; the paper starts with 1.5 × of it."""
        return self.target_rank or max(1, round(self.rank / 1.5))

    @model_validator(mode="after")
    def _fits(self) -> AdaLoRAConfig:
        if self.final_rank > self.rank:
            raise refusal("target_rank", f"{self.target_rank} is more than rank, {self.rank}")
        if self.warmup_share + self.final_share > 1:
            raise refusal("final_share", "warmup_share and final_share are more than all steps together")
        return self


class AdaLoRALayer(AdapterLayer):
    """`lora_A` is Q _RI, `lora_B` P _OR, `lora_E` the diagonal of Λ _R1; `alive` _R says which triplets are in.

    `sensitivity_X` and `uncertainty_X` are the smoothed statistics of each of them.
    """

    trained = PARTS
    kept = ("alive", *(f"sensitivity_{n}" for n in PARTS), *(f"uncertainty_{n}" for n in PARTS))
    lora_A: nn.Parameter
    lora_E: nn.Parameter
    lora_B: nn.Parameter
    alive: Tensor

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        scale = self.settings.alpha / self.settings.rank
        return add_product(x, base(x), self.lora_E * self.lora_A, self.lora_B, scale)

    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        factors = self.lora_factors()
        return factors.scale * (factors.B_OR @ factors.A_RI)

    @torch.no_grad()
    def lora_factors(self) -> LowRankFactors:
        """Of the triplets that are in, or train again after they were put out; at least one: a LoRA has no rank 0."""
        alive_R = self.alive | (self.lora_E[:, 0] != 0)
        alive_R[0] |= not alive_R.any()
        scale = self.settings.alpha / self.settings.rank
        return LowRankFactors((self.lora_E * self.lora_A)[alive_R], self.lora_B[:, alive_R].clone(), scale)

    @torch.no_grad()
    def note_gradients(self) -> None:
        """Smooth |w·∂w| and its distance from the smoothed value (eq. 9, 10)."""
        for name in PARTS:
            parameter = getattr(self, name)
            sensitivity, uncertainty = getattr(self, f"sensitivity_{name}"), getattr(self, f"uncertainty_{name}")
            now = (parameter * parameter.grad).abs()
            sensitivity.lerp_(now, 1 - self.settings.sensitivity_decay)
            uncertainty.lerp_((now - sensitivity).abs(), 1 - self.settings.uncertainty_decay)

    def importance(self) -> Tensor:
        """Of each triplet, _R (eq. 8, 11)."""
        A_RI, E_R1, B_OR = (getattr(self, f"sensitivity_{n}") * getattr(self, f"uncertainty_{n}") for n in PARTS)
        return E_R1[:, 0] + B_OR.mean(dim=0) + A_RI.mean(dim=1)


class AdaLoRA(AdapterKind[AdaLoRAConfig]):
    """AdaLoRA over all layers of a role."""

    settings_type = AdaLoRAConfig
    layer = AdaLoRALayer

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        """P and Q of small normal numbers, as the authors' code has them; Λ zero."""
        sizes, rank = self.sizes(*context.weight_OI.shape), self.settings.rank
        made = {n: 0.02 * torch.randn(sizes[n], generator=context.generator) for n in ("lora_A", "lora_B")}
        made |= {"lora_E": torch.zeros(rank, 1), "alive": torch.ones(rank, dtype=torch.bool)}
        return made | {f"{what}_{n}": torch.zeros(sizes[n]) for what in ("sensitivity", "uncertainty") for n in PARTS}

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        rank = self.settings.rank
        return {"lora_A": (rank, in_features), "lora_E": (rank, 1), "lora_B": (out_features, rank)}

    def penalty(self, layers: Layers) -> Tensor | None:
        """γ·Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖²."""
        if not self.settings.orthogonality:
            return None
        pairs = [(layer.lora_B.T, layer.lora_A) for layer in layers.values()]
        products = [factor @ factor.T for pair in pairs for factor in pair]
        eye = torch.eye(self.settings.rank, device=products[0].device)
        return self.settings.orthogonality * (torch.stack(products) - eye).square().sum()

    def after_backward(self, layers: Layers, time: Time) -> None:
        if time.step <= time.total - self._final(time):
            for layer in layers.values():
                layer.note_gradients()

    def after_step(self, layers: Layers, time: Time) -> set[str]:
        start, end = self._warmup(time), time.total - self._final(time)
        if time.step <= start or (time.step < end and time.step % self.settings.every):
            return set()
        scores = torch.cat([layer.importance() for layer in layers.values()])
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.argsort(descending=True, stable=True)[: self.budget(len(layers), time)]] = True
        for layer, alive_R in zip(layers.values(), kept.split(self.settings.rank), strict=True):
            layer.alive.copy_(alive_R)
            layer.lora_E.masked_fill_(~alive_R[:, None], 0.0)
        return set()

    def budget(self, layers: int, time: Time) -> int:
        """How many triplets there are in all layers together after a step (eq. 12)."""
        first, last = self.settings.rank * layers, self.settings.final_rank * layers
        start, end = self._warmup(time), time.total - self._final(time)
        if time.step <= start:
            return first
        if time.step >= end:
            return last
        return last + int((first - last) * (1 - (time.step - start) / (end - start)) ** 3)

    def peft(self, layers: Layers) -> PeftFiles | None:
        """A LoRA with the rank that each layer has kept."""
        factors = {name: layer.lora_factors() for name, layer in layers.items()}
        ranks = {name: len(found.A_RI) for name, found in factors.items()}
        scale, largest = self.settings.alpha / self.settings.rank, max(ranks.values())
        # PEFT divides alpha by the layer's rank again.
        config = LoraConfig(
            r=largest,
            lora_alpha=scale * largest,  # type: ignore[arg-type]
            rank_pattern=ranks,
            alpha_pattern={name: scale * rank for name, rank in ranks.items()},  # type: ignore[arg-type]
        )
        return PeftFiles(config, {n: {"lora_A.weight": f.A_RI, "lora_B.weight": f.B_OR} for n, f in factors.items()})

    def _warmup(self, time: Time) -> int:
        return round(self.settings.warmup_share * time.total)

    def _final(self, time: Time) -> int:
        return round(self.settings.final_share * time.total)

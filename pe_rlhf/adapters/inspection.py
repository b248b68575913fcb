"""What an init would do before anything is trained: `pe-rlhf inspect`. One pass; one layer's gradient at a time.

Of each layer and init: norms, where in W's spectrum A listens, how well the first step of SGD follows the gradient G,
and how the adapter's neural tangent kernel compares with the full model's,

    K_full[i, j] = Σ_layers ⟨G_i, G_j⟩        K_adapter[i, j] = Σ_layers s²·(⟨Bᵀ·G_i, Bᵀ·G_j⟩ + ⟨G_i·Aᵀ, G_j·Aᵀ⟩)

with G_i the gradient of sample i's part of the loss. The inner products are taken token by token, ⟨dy·xᵀ, dy'·x'ᵀ⟩ =
⟨dy, dy'⟩⟨x, x'⟩, so that no sample's gradient is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pe_rlhf.adapters.gradients import Probe, by_rows, input_sums, watched, weight_gradient
from pe_rlhf.adapters.layer import weight_out_in
from pe_rlhf.adapters.layer_statistics import InputMoments, LayerStatistics
from pe_rlhf.adapters.lora.anchored import scale_of
from pe_rlhf.adapters.lora.init_registry import InitContext, init_of
from pe_rlhf.adapters.lora.inits.svd import Directions, full_svd
from pe_rlhf.config import LowRankConfig


@dataclass(frozen=True)
class LayerMetrics:
    """One init on one layer.

    Attributes:
        norm_A, norm_B: Frobenius norms.
        product: ‖s·B0·A0‖ / ‖W‖.
        position: where in W's spectrum A's rows lie, 0 at the greatest singular value, 1 at the least; None for A = 0.
        cosine: of the first step's s²·(B·Bᵀ·G + G·Aᵀ·A) and G.
        best: the cosine of G's best approximation of rank 2r and G, which no init can exceed.
    """

    layer: str
    norm_A: float
    norm_B: float
    product: float
    position: float | None
    cosine: float
    best: float


@dataclass
class InitMetrics:
    """One init: a row per layer, and what the layers add up to."""

    init: str
    scale: float
    layers: list[LayerMetrics] = field(default_factory=list)
    kernel: Tensor = field(default_factory=lambda: torch.zeros(()))
    inner: float = 0.0
    update_square: float = 0.0

    def totals(self, full: Tensor, gradient_square: float, best_square: float) -> dict[str, Any]:
        """Over all layers as one long vector; the kernel against the full model's."""
        own, whole = self.kernel.double(), full.double()
        return {
            "init": self.init,
            "norm_A": sum(row.norm_A**2 for row in self.layers) ** 0.5,
            "norm_B": sum(row.norm_B**2 for row in self.layers) ** 0.5,
            "product": _mean([row.product for row in self.layers]),
            "position": _mean([row.position for row in self.layers if row.position is not None]),
            "cosine": self.inner / max((self.update_square * gradient_square) ** 0.5, 1e-30),
            "best": (best_square / gradient_square) ** 0.5,
            "kernel_error": float((own - whole).norm() / whole.norm()),
            "kernel_alignment": float((own * whole).sum() / (own.norm() * whole.norm()).clamp(min=1e-30)),
        }


@dataclass
class Inspection:
    """All inits on one batch. `kernel` is the full model's, one row per sample."""

    inits: list[InitMetrics]
    kernel: Tensor
    gradient_square: float
    best_square: float

    def totals(self) -> list[dict[str, Any]]:
        return [init.totals(self.kernel, self.gradient_square, self.best_square) for init in self.inits]

    def as_json(self) -> dict[str, Any]:
        """Everything in numbers."""
        per_init = [
            {**total, "layers": [asdict(row) for row in init.layers], "kernel": init.kernel.tolist()}
            for total, init in zip(self.totals(), self.inits, strict=True)
        ]
        return {"inits": per_init, "kernel": self.kernel.tolist()}


def inspect_inits(
    layers: dict[str, nn.Module],
    probe: Probe,
    adapters: Sequence[LowRankConfig],
    seed: Callable[[str], int],
    done: Callable[[int], None] = lambda count: None,
    original: Callable[[str], Tensor] | None = None,
) -> Inspection:
    """Run one pass over a batch and work out every init's metrics on every layer as its gradient comes by.

    Args:
        layers: the frozen modules by name.
        probe: the batch, in two halves (`batch_B`), with a number per sample in `sample_B`.
        adapters: settings that share rank, alpha and scaling, but not the init and its options.
        seed: the seed of a layer, by its name.
        done: called after each layer.
        original: the weight of a layer before it was quantised, for inits that need it.
    """
    chosen = [init_of(settings) for settings in adapters]
    scale, rank = scale_of(adapters[0]), adapters[0].rank
    samples_B = probe.sample_B if probe.sample_B is not None else torch.arange(len(probe.batch_B))
    count = int(samples_B.max()) + 1
    metrics = [InitMetrics(settings.init, scale, kernel=torch.zeros(count, count)) for settings in adapters]
    result = Inspection(metrics, torch.zeros(count, count), 0.0, 0.0)

    def see(name: str, x: Tensor, dy: Tensor) -> None:
        weight_OI = weight_out_in(layers[name]).float()
        tokens = Tokens.of(x, dy, samples_B, probe.mask_BT)
        x, dy = by_rows(name, x, probe.mask_BT), by_rows(name, dy, probe.mask_BT)
        G_OI = weight_gradient(x, dy)
        second, first, number = input_sums(name, x, probe.mask_BT)
        halves = tuple(weight_gradient(x, dy, probe.batch_B == half) for half in (0, 1))
        moments = InputMoments(second / number, first / number, number)
        of_W, of_G = full_svd(weight_OI), full_svd(G_OI)
        result.kernel += tokens.kernel(tokens.x_NI, tokens.dy_NO)
        result.gradient_square += float(G_OI.square().sum())
        best = float(of_G.S_K[: 2 * rank].square().sum())
        result.best_square += best
        for (registered, options), init in zip(chosen, metrics, strict=True):
            given = {"two gradients": halves, "gradient": (G_OI,)}.get(registered.needs or "", ())
            before = original(name) if original and registered.needs == "original weight" else None
            statistics = LayerStatistics(given, moments if registered.needs == "inputs" else None, before)
            generator = torch.Generator().manual_seed(seed(name))
            context = InitContext(weight_OI, rank, scale, generator, options, statistics)
            A_RI, B_OR = registered(context)
            _add_layer(init, name, A_RI.float(), B_OR.float(), weight_OI, of_W, G_OI, best)
            init.kernel += scale**2 * tokens.kernel(tokens.x_NI, tokens.dy_NO @ B_OR)
            init.kernel += scale**2 * tokens.kernel(tokens.x_NI @ A_RI.T, tokens.dy_NO)
        done(1)

    with watched(layers, see), torch.enable_grad():
        probe.loss().backward()
    order = list(layers)
    for init in metrics:  # the backward pass met the last layer first
        init.layers.sort(key=lambda row: order.index(row.layer))
    return result


@dataclass(frozen=True)
class Tokens:
    """The real tokens of a batch at one layer: inputs, output gradients, and one-hot rows that say whose they are."""

    x_NI: Tensor
    dy_NO: Tensor
    owner_SN: Tensor

    @classmethod
    def of(cls, x: Tensor, dy: Tensor, samples_B: Tensor, mask_BT: Tensor) -> Tokens:
        real = mask_BT.to(x.device)
        owner_N = samples_B[:, None].expand(mask_BT.shape)[mask_BT]
        owner_SN = torch.nn.functional.one_hot(owner_N).T.float().to(x.device)
        return cls(x[real].float(), dy[real].float(), owner_SN)

    def kernel(self, left_NI: Tensor, right_NO: Tensor) -> Tensor:
        """Σ over the tokens t of sample i and u of sample j of ⟨left_t, left_u⟩·⟨right_t, right_u⟩, _SS."""
        pairs_NN = (left_NI @ left_NI.T) * (right_NO @ right_NO.T)
        return (self.owner_SN @ pairs_NN @ self.owner_SN.T).cpu()


def _add_layer(
    init: InitMetrics,
    name: str,
    A_RI: Tensor,
    B_OR: Tensor,
    weight_OI: Tensor,
    of_W: Directions,
    G_OI: Tensor,
    best_square: float,
) -> None:
    s = init.scale
    update_OI = s**2 * (B_OR @ (B_OR.T @ G_OI) + (G_OI @ A_RI.T) @ A_RI)
    inner, update_square = float((update_OI * G_OI).sum()), float(update_OI.square().sum())
    gradient_square = float(G_OI.square().sum())
    init.inner += inner
    init.update_square += update_square
    init.layers.append(
        LayerMetrics(
            name,
            norm_A=float(A_RI.norm()),
            norm_B=float(B_OR.norm()),
            product=float((s * B_OR @ A_RI).norm() / weight_OI.norm()),
            position=spectrum_position(A_RI, of_W.Vh_KI),
            cosine=inner / max((update_square * gradient_square) ** 0.5, 1e-30),
            best=(best_square / max(gradient_square, 1e-30)) ** 0.5,
        )
    )


def spectrum_position(A_RI: Tensor, Vh_KI: Tensor) -> float | None:
    """The mean place of A's rows among W's right singular vectors, by squared length: 0 the first, 1 the last."""
    weights_K = (A_RI @ Vh_KI.T).square().sum(dim=0)
    if not bool(weights_K.any()):
        return None
    place_K = torch.linspace(0, 1, len(weights_K), device=weights_K.device)
    return float((weights_K * place_K).sum() / weights_K.sum())


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None

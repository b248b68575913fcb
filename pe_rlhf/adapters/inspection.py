"""What an adapter would do before anything is trained: `pe-rlhf inspect`. One pass; one layer's gradient at a time.

Of each layer and adapter: norms, where in W's spectrum A listens, how well the first step of SGD follows the gradient
G, and how the adapter's neural tangent kernel compares with the full model's,

    K_full[i, j] = Σ_layers ⟨G_i, G_j⟩        K_adapter[i, j] = Σ_layers Σ_parameters rate·⟨g_i, g_j⟩

with G_i the gradient of sample i's part of the loss with respect to W, and g_i that of the adapter's parameters. A LoRA
has s²·(⟨Bᵀ·G_i, Bᵀ·G_j⟩ + ⟨G_i·Aᵀ, G_j·Aᵀ⟩). The inner products of G_i are taken token by token, ⟨dy·xᵀ, dy'·x'ᵀ⟩ =
⟨dy, dy'⟩⟨x, x'⟩, so that no sample's G_i is ever formed.

The first step is the change of ΔW along −Σ_i rate·g_i, by a central difference of the layer's own `delta_weight`. A
LoRA's is s²·(B·Bᵀ·G + G·Aᵀ·A).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pe_rlhf.adapters.gradients import Probe, by_rows, input_sums, watched, weight_gradient
from pe_rlhf.adapters.kind import AdapterKind, LayerContext, kind_of
from pe_rlhf.adapters.layer import AdapterLayer, weight_out_in
from pe_rlhf.adapters.layer_statistics import InputMoments, LayerStatistics
from pe_rlhf.adapters.lora.anchored import AnchoredLoRA
from pe_rlhf.adapters.lora.inits.svd import full_svd
from pe_rlhf.config import AdapterConfig
from reward.errors import InputError

STEP = 0.01  # of the weight's norm: large beside fp32's rounding of W, small beside what bends ΔW


@dataclass(frozen=True)
class LayerMetrics:
    """One adapter on one layer; None is what its kind has not.

    Attributes:
        norm_A, norm_B: Frobenius norms.
        product: ‖s·B0·A0‖ / ‖W‖.
        position: where in W's spectrum A's rows lie, 0 at the greatest singular value, 1 at the least; None for A = 0.
        cosine: of the first step's change of the weight and G.
        best: the cosine of G's best approximation of rank 2r and G, which no adapter with the form of a LoRA exceeds.
    """

    layer: str
    norm_A: float | None
    norm_B: float | None
    product: float | None
    position: float | None
    cosine: float
    best: float | None


@dataclass
class InitMetrics:
    """One adapter, by the name of its init or kind: a row per layer, and what the layers add up to."""

    init: str
    kind: AdapterKind[Any]
    layers: list[LayerMetrics] = field(default_factory=list)
    kernel: Tensor = field(default_factory=lambda: torch.zeros(()))
    inner: float = 0.0
    update_square: float = 0.0
    best_square: float = 0.0

    def totals(self, full: Tensor, gradient_square: float) -> dict[str, Any]:
        """Over all layers as one long vector; the kernel against the full model's."""
        own, whole = self.kernel.double(), full.double()
        return {
            "init": self.init,
            "norm_A": _norm([row.norm_A for row in self.layers]),
            "norm_B": _norm([row.norm_B for row in self.layers]),
            "product": _mean([row.product for row in self.layers]),
            "position": _mean([row.position for row in self.layers]),
            "cosine": self.inner / max((self.update_square * gradient_square) ** 0.5, 1e-30),
            "best": (self.best_square / gradient_square) ** 0.5 if self.is_bounded else None,
            "kernel_error": float((own - whole).norm() / whole.norm()),
            "kernel_alignment": float((own * whole).sum() / (own.norm() * whole.norm()).clamp(min=1e-30)),
        }

    @property
    def is_bounded(self) -> bool:
        """Whether its first step has a rank of 2r at most."""
        return self.kind.layer.lora_factors is not AdapterLayer.lora_factors and hasattr(self.kind.settings, "rank")


@dataclass
class Inspection:
    """All adapters on one batch. `kernel` is the full model's, one row per sample; `left_out` says what has no rows."""

    inits: list[InitMetrics]
    kernel: Tensor
    gradient_square: float
    left_out: dict[str, str] = field(default_factory=dict)

    def totals(self) -> list[dict[str, Any]]:
        return [init.totals(self.kernel, self.gradient_square) for init in self.inits]

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
    adapters: Sequence[AdapterConfig],
    seed: Callable[[str], int],
    done: Callable[[int], None] = lambda count: None,
    original: Callable[[str], Tensor] | None = None,
    *,
    lenient: bool = False,
) -> Inspection:
    """Run one pass over a batch and work out every adapter's metrics on every layer as its gradient comes by.

    Args:
        layers: the frozen modules by name.
        probe: the batch, in two halves (`batch_B`), with a number per sample in `sample_B`.
        adapters: settings of kinds whose layers have a ΔW. Raises `InputError` for others unless `lenient`.
        seed: the seed of a layer, by its name.
        done: called after each layer.
        original: the weight of a layer before it was quantised, for inits that need it.
        lenient: leave out an adapter that a layer cannot have.
    """
    samples_B = probe.sample_B if probe.sample_B is not None else torch.arange(len(probe.batch_B))
    count = int(samples_B.max()) + 1
    metrics = [InitMetrics(label(given), kind_of(given), kernel=torch.zeros(count, count)) for given in adapters]
    result = Inspection(metrics, torch.zeros(count, count), 0.0)

    def see(name: str, x: Tensor, dy: Tensor) -> None:
        weight_OI = weight_out_in(layers[name]).float()
        tokens = Tokens.of(x, dy, samples_B, probe.mask_BT)
        x, dy = by_rows(name, x, probe.mask_BT), by_rows(name, dy, probe.mask_BT)
        G_OI = weight_gradient(x, dy)
        second, first, number = input_sums(name, x, probe.mask_BT)
        halves = tuple(weight_gradient(x, dy, probe.batch_B == half) for half in (0, 1))
        moments = InputMoments(second / number, first / number, number)
        seen = _SeenLayer(name, weight_OI, G_OI, full_svd(weight_OI).Vh_KI, full_svd(G_OI).S_K, tokens)
        result.kernel += tokens.kernel(tokens.x_NI, tokens.dy_NO)
        result.gradient_square += float(G_OI.square().sum())
        for init in list(metrics):
            needs = init.kind.needs
            given = {"two gradients": halves, "gradient": (G_OI,)}.get(needs or "", ())
            before = original(name) if original and needs == "original weight" else None
            statistics = LayerStatistics(given, moments if needs == "inputs" else None, before)
            generator = torch.Generator().manual_seed(seed(name))
            try:
                layer = _layer_of(init, LayerContext(weight_OI, generator, statistics))
            except InputError as error:
                if not lenient:
                    raise error.at(f"{init.init} on the layer {name}") from error
                metrics.remove(init)
                result.left_out[init.init] = str(error)
                continue
            with torch.enable_grad():
                seen.add_to(init, layer)
        done(1)

    with watched(layers, see), torch.enable_grad():
        probe.loss().backward()
    order = list(layers)
    for init in metrics:  # the backward pass met the last layer first
        init.layers.sort(key=lambda row: order.index(row.layer))
    return result


def _layer_of(init: InitMetrics, context: LayerContext) -> AdapterLayer:
    if init.kind.layer.delta_weight is AdapterLayer.delta_weight:
        message = f"the kind {init.init} has no change of the weight, which is what inspect looks at"
        raise InputError(message, kind="conflict", key="adapter.kind")
    layer = init.kind.build(init.kind.tensors(context), context.weight_OI)
    return layer.to(context.weight_OI.device).eval()


def label(settings: AdapterConfig) -> str:
    """What an adapter is called beside others: a LoRA by its init, another kind by its name, and an unusual init."""
    init = getattr(settings, "init", "")
    if settings.kind == "lora":
        return init
    return f"{settings.kind}, {init}" if init not in ("", "lora") else settings.kind


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

    def of_sample(self, sample: int) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients of one sample's tokens."""
        own_N = self.owner_SN[sample].bool()
        return self.x_NI[own_N], self.dy_NO[own_N]

    def kernel(self, left_NI: Tensor, right_NO: Tensor) -> Tensor:
        """Σ over the tokens t of sample i and u of sample j of ⟨left_t, left_u⟩·⟨right_t, right_u⟩, _SS."""
        pairs_NN = (left_NI @ left_NI.T) * (right_NO @ right_NO.T)
        return (self.owner_SN @ pairs_NN @ self.owner_SN.T).cpu()


@dataclass(frozen=True)
class _SeenLayer:
    """A layer as the backward pass comes by: its weight, gradient, tokens, W's right and G's values of the SVD."""

    name: str
    weight_OI: Tensor
    G_OI: Tensor
    Vh_KI: Tensor
    of_G_K: Tensor
    tokens: Tokens

    def add_to(self, init: InitMetrics, layer: AdapterLayer) -> None:
        """Work out an adapter's metrics on this layer."""
        start, named = self._start(layer), dict(layer.named_parameters())
        rate_P = torch.cat([torch.full((p.numel(),), init.kind.rate(name)) for name, p in named.items()])
        g_SP = self._sample_gradients(layer, list(named.values()))
        rate_P = rate_P.to(g_SP.device)
        init.kernel += ((g_SP * rate_P) @ g_SP.T).cpu()
        update_OI = self._first_step(layer, list(named.values()), rate_P * g_SP.sum(0))
        inner, update_square = float((update_OI * self.G_OI).sum()), float(update_OI.square().sum())
        gradient_square = float(self.G_OI.square().sum())
        best_square = float(self.of_G_K[: 2 * getattr(init.kind.settings, "rank", 0)].square().sum())
        init.inner += inner
        init.update_square += update_square
        init.best_square += best_square
        init.layers.append(
            LayerMetrics(
                self.name,
                **start,
                cosine=inner / max((update_square * gradient_square) ** 0.5, 1e-30),
                best=(best_square / max(gradient_square, 1e-30)) ** 0.5 if init.is_bounded else None,
            )
        )

    @torch.no_grad()
    def _start(self, layer: AdapterLayer) -> dict[str, float | None]:
        """What is said of a LoRA's A and B only."""
        if not isinstance(layer, AnchoredLoRA):
            return dict.fromkeys(("norm_A", "norm_B", "product", "position"))
        A_RI, B_OR = layer.lora_A, layer.lora_B
        product = float(layer.scale * (B_OR @ A_RI).norm() / self.weight_OI.norm())
        position = spectrum_position(A_RI, self.Vh_KI)
        return {"norm_A": float(A_RI.norm()), "norm_B": float(B_OR.norm()), "product": product, "position": position}

    def _sample_gradients(self, layer: AdapterLayer, parameters: list[nn.Parameter]) -> Tensor:
        """The gradient of the adapter's parameters for each sample, _SP: those that training would use."""
        base = nn.Linear(*self.weight_OI.T.shape, bias=False, device="meta")
        base.weight = nn.Parameter(self.weight_OI, requires_grad=False)
        rows = []
        for sample in range(len(self.tokens.owner_SN)):
            x_NI, dy_NO = self.tokens.of_sample(sample)
            found = torch.autograd.grad(layer(x_NI, base), parameters, dy_NO, materialize_grads=True)
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
        return torch.stack(rows)

    @torch.no_grad()
    def _first_step(self, layer: AdapterLayer, parameters: list[nn.Parameter], direction_P: Tensor) -> Tensor:
        """How ΔW_OI changes along a direction of the parameters, per length of it; zero for no direction."""
        starts = [parameter.clone() for parameter in parameters]
        parts = direction_P.split([parameter.numel() for parameter in parameters])

        def change(length: float) -> Tensor:
            for parameter, start, part in zip(parameters, starts, parts, strict=True):
                parameter.copy_(start + length * part.view_as(start))
            delta_OI = layer.delta_weight(self.weight_OI)
            assert delta_OI is not None
            return delta_OI

        size = float(direction_P.norm())
        moved = float(change(1 / size).norm()) if size else 0.0
        if not moved:
            return torch.zeros_like(self.weight_OI)
        length = STEP * float(self.weight_OI.norm()) / moved / size
        return (change(length) - change(-length)) / (2 * length)


def spectrum_position(A_RI: Tensor, Vh_KI: Tensor) -> float | None:
    """The mean place of A's rows among W's right singular vectors, by squared length: 0 the first, 1 the last."""
    weights_K = (A_RI @ Vh_KI.T).square().sum(dim=0)
    if not bool(weights_K.any()):
        return None
    place_K = torch.linspace(0, 1, len(weights_K), device=weights_K.device)
    return float((weights_K * place_K).sum() / weights_K.sum())


def _norm(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(value**2 for value in known) ** 0.5 if known else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

"""Kinds of adapters: what a kind makes, what it may do during training, and the registry.

A kind sees all layers of a role and knows time; a layer computes. Everything else (stages, roles, rollouts, exports)
asks a layer or its kind what it can do, and never which kind it is. To add one, in a module that is imported:

    class Shift(AdapterLayer):
        trained = ("shift",)

        def forward(self, x, base):
            return base(x) + self.shift

    @register_kind("shift")
    class ShiftKind(AdapterKind):
        layer = Shift

        def tensors(self, context):
            return {"shift": torch.zeros(len(context.weight_OI))}

A recipe names it by `adapter: {kind: shift}`, or imports it: `kind: my_module:ShiftKind`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pe_rlhf.adapters.layer_statistics import LayerStatistics, Need
from pe_rlhf.config.adapter import AdapterConfig, set_kinds
from reward.errors import InputError, look_up
from reward.judges import load_function

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import Tensor

    from pe_rlhf.adapters.layer import AdapterLayer

S = TypeVar("S", bound=AdapterConfig)
K = TypeVar("K", bound="type[AdapterKind[Any]]")


@dataclass(frozen=True)
class LayerContext:
    """What a kind may look at when it makes a layer.

    Attributes:
        weight_OI: the frozen base weight in fp32; a quantised one is dequantised. That of fused experts is _EOI.
        generator: the only source of randomness, seeded per role and layer.
        statistics: what the kind `needs`.
    """

    weight_OI: Tensor
    generator: torch.Generator
    statistics: LayerStatistics = field(default_factory=LayerStatistics)


@dataclass(frozen=True)
class Time:
    """The optimizer step that is being made, counted from 1, and how many there are in the stage."""

    step: int
    total: int


@dataclass(frozen=True)
class PeftFiles:
    """A role as an adapter of PEFT's.

    Attributes:
        config: PEFT's config of the kind; who writes the files fills in targets, task and base.
        tensors: by module, and by PEFT's name within it.
        shared: those of all layers together, by PEFT's name.
        experts: the fused weights among the layers, PEFT's `target_parameters`.
    """

    config: PeftConfig
    tensors: dict[str, dict[str, Tensor]]
    shared: dict[str, Tensor] = field(default_factory=dict)
    experts: list[str] = field(default_factory=list)


Layers = Mapping[str, Any]
Restart = Literal["moments", "momentum"]


class AdapterKind(Generic[S]):
    """A kind of adapter with the settings of one role.

    Attributes:
        settings_type: the recipe's section: a subclass of `AdapterConfig` with the keys of this kind.
        layer: the module that computes one layer.
        fast: the parameters that LoRA+ gives a learning rate of their own; none: it is refused.
        restarted: the parameters, by name in a layer, that `after_step` may let start again, and what of AdamW's state
            does: all (`moments`), so that they are as fresh ones, or the `momentum`, where gradients keep their size.
        rank_of_weight: whether its rank can be no more than the weight's; the size of a block or vector can.
    """

    settings_type: ClassVar[type[AdapterConfig]] = AdapterConfig
    layer: ClassVar[type[AdapterLayer]]
    fast: ClassVar[tuple[str, ...]] = ()
    restarted: ClassVar[Mapping[str, Restart]] = {}
    rank_of_weight: ClassVar[bool] = False

    def __init__(self, settings: S) -> None:
        self.settings = settings

    # ---- making layers ----------------------------------------------------------------------------------------------

    @property
    def needs(self) -> Need | None:
        """What layers are made of beyond the weight."""
        return None

    @property
    def takes_experts(self) -> bool:
        """Whether it can be on experts that are fused into one weight _EOI: `tensors` and `build` then get that."""
        return False

    @property
    def batch_size(self) -> int:
        """How many rows, or pairs, are in a batch that layers are made of."""
        return 8

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        """The initial parameters and buffers of a layer, by name; with them it computes what its base does, to the bit.

        Their shapes never change: what shrinks is masked.
        """
        raise NotImplementedError  # each kind has its own; one that only acts between steps makes no layers

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        """The shapes of what is trained of a layer, by name: checked at loading, and counted for memory plans."""
        return {}

    def build(self, tensors: Mapping[str, Tensor], weight_OI: Tensor) -> AdapterLayer:
        """A layer of these tensors, fresh or saved, for a base of that weight."""
        return self.layer(tensors, self.settings)

    def share(self, layers: Layers) -> None:
        """Let layers share parameters; called whenever those of a role, in the model's order, are put on a model."""

    # ---- while it trains --------------------------------------------------------------------------------------------

    def rate(self, name: str) -> float:
        """The factor of the learning rate of a parameter, by its name in the layer."""
        return 1.0

    def penalty(self, layers: Layers) -> Tensor | None:
        """A term of the loss that depends on the adapter's weights only; None without one."""
        return None

    def after_backward(self, layers: Layers, time: Time) -> None:
        """Look at the gradients: those of the whole batch, of all ranks, before they are clipped."""

    def after_step(self, layers: Layers, time: Time) -> set[str]:
        """Change parameters or buffers once the optimizer has made its step.

        Returns those of `restarted` that start again now, in all layers.
        """
        return set()

    @property
    def changes_parameters(self) -> bool:
        """Whether `after_step` may write into parameters."""
        return type(self).after_step is not AdapterKind.after_step

    # ---- leaving ----------------------------------------------------------------------------------------------------

    def peft(self, layers: Layers) -> PeftFiles | None:
        """The role as PEFT's adapter of this kind; None: as a plain LoRA where the layers have factors, else not."""
        return None


# One line a kind. A kind's file imports torch, so it is imported when it is first asked for.
KINDS: dict[str, str | type[AdapterKind[Any]]] = {
    "lora": "pe_rlhf.adapters.lora.anchored:LoRA",
    "adalora": "pe_rlhf.adapters.kinds.adalora:AdaLoRA",
    "additive": "pe_rlhf.adapters.kinds.additive:Additive",
    "bat": "pe_rlhf.adapters.kinds.bat:Bat",
    "dora": "pe_rlhf.adapters.kinds.dora:DoRA",
    "loha": "pe_rlhf.adapters.kinds.loha:LoHa",
    "lora_dash": "pe_rlhf.adapters.kinds.lora_dash:LoRADash",
    "miss": "pe_rlhf.adapters.kinds.miss:MiSS",
    "redrawn": "pe_rlhf.adapters.kinds.redrawn:Redrawn",
    "routed": "pe_rlhf.adapters.kinds.routed:Routed",
    "rosa": "pe_rlhf.adapters.kinds.rosa:RoSA",
    "shira": "pe_rlhf.adapters.kinds.shira:ShiRA",
    "spectral_a": "pe_rlhf.adapters.kinds.spectral_a:SpectralA",
    "spectral_r": "pe_rlhf.adapters.kinds.spectral_r:SpectralR",
    "tinylora": "pe_rlhf.adapters.kinds.tinylora:TinyLoRA",
    "stacked": "pe_rlhf.adapters.kinds.stacked:Stacked",
    "vera": "pe_rlhf.adapters.kinds.vera:VeRA",
}


def register_kind(name: str) -> Callable[[K], K]:
    """Add a kind under a name, as a decorator. Raises ValueError for a name that is taken."""

    def add(kind: K) -> K:
        if name in KINDS:
            raise ValueError(f"a kind of adapter named {name!r} is already registered")
        KINDS[name] = kind
        return kind

    return add


def find_kind(name: str) -> type[AdapterKind[Any]]:
    """The kind of that name, or of `module:Class`. Raises `InputError` for one that does not exist."""
    if name not in KINDS and ":" in name:
        found: Any = load_function(name)
        if not (isinstance(found, type) and issubclass(found, AdapterKind)):
            raise InputError(f"{name} is no AdapterKind", kind="user_code", key="kind")
        KINDS[name] = found
    found = look_up(KINDS, name, f"unknown kind of adapter {name!r}", "kind")
    return resolve_name(found) if isinstance(found, str) else found


def kind_of(settings: AdapterConfig) -> AdapterKind[Any]:
    """The kind that these settings describe."""
    return find_kind(settings.kind)(settings)


set_kinds(KINDS, lambda name: find_kind(name).settings_type)

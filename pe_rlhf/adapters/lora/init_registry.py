"""The registry of adapter inits, what an init is given, and how to add one.

An init is a function of an `InitContext` that returns `(A_RI, B_OR)`. To add one:

    @register_init("halves")
    def halves(context: InitContext) -> tuple[Tensor, Tensor]: ...

in a module that is imported. A recipe can import it: `init: my_module:halves`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pe_rlhf.adapters.layer_statistics import InputMoments, LayerStatistics, Need
from pe_rlhf.config.adapter import INIT_OPTIONS, LowRankConfig, parse_options
from pe_rlhf.config.section import Positive, Section
from reward.errors import InputError, look_up
from reward.judges import load_function
from reward.judges.user_code import call_users_code

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class NoOptions(Section):
    """An init without options."""


class SampledOptions(Section):
    """The option of every init that reads data."""

    batch_size: Positive = Field(default=8, description="sequences, or pairs, in a batch that the init reads")


@dataclass(frozen=True)
class InitContext:
    """What an init may look at, for one layer.

    Attributes:
        weight_OI: the frozen base weight in fp32; a quantised one is dequantised.
        rank, scale: r, and the factor s of B·A.
        generator: the only source of randomness, seeded per role and layer.
        options: an instance of the init's options.
        statistics: what the init `needs`.
    """

    weight_OI: Tensor
    rank: int
    scale: float
    generator: torch.Generator
    options: Any = None
    statistics: LayerStatistics = field(default_factory=LayerStatistics)

    @property
    def gradient_OI(self) -> Tensor:
        """The gradient of the loss with respect to the weight."""
        return self.statistics.gradients_OI[0]

    @property
    def original_OI(self) -> Tensor:
        """The weight as it was before it was quantised, fp32."""
        assert self.statistics.original_OI is not None
        return self.statistics.original_OI

    @property
    def inputs(self) -> InputMoments:
        """Moments of the layer's inputs."""
        assert self.statistics.inputs is not None
        return self.statistics.inputs


InitFunction = Callable[[InitContext], "tuple[Tensor, Tensor]"]
Factor = Literal["lora_A", "lora_B"]


@dataclass(frozen=True)
class Init:
    """A registered init: the function, the schema of its options, and what it needs beyond the weight.

    `frozen` are the factors that are not trained: `lora_A` or `lora_B`.
    """

    name: str
    function: InitFunction
    options: type[Section] = NoOptions
    needs: Need | None = None
    frozen: tuple[Factor, ...] = ()

    def __call__(self, context: InitContext) -> tuple[Tensor, Tensor]:
        """`(A_RI, B_OR)`. Raises `InputError` where the statistics that it needs are missing, zero or not finite."""
        self._check_statistics(context.statistics)
        given = context if context.options is not None else replace(context, options=self.options())
        import torch  # here: the registry is read by commands that do without it

        made = self._made(given)
        if not (isinstance(made, (tuple, list)) and [isinstance(each, torch.Tensor) for each in made] == [True, True]):
            raise self._error(f"gave {type(made).__name__} instead of the two tensors A and B", kind="user_code")
        A_RI, B_OR = made
        out_features, in_features = context.weight_OI.shape
        expected = (context.rank, in_features), (out_features, context.rank)
        if (tuple(A_RI.shape), tuple(B_OR.shape)) != expected:
            raise self._error(
                f"gave A and B of shapes {tuple(A_RI.shape)} and {tuple(B_OR.shape)} instead of {expected[0]} and"
                f" {expected[1]}",
                kind="user_code",
            )
        if not (A_RI.isfinite().all() and B_OR.isfinite().all()):
            raise self._error("gave an A or B that is not finite", kind="not_finite")
        return A_RI, B_OR

    def _made(self, context: InitContext) -> Any:
        """What the function returns; a user's may raise or exit, and does not take the run with it."""
        if self.function.__module__.startswith("pe_rlhf."):
            return self.function(context)
        return call_users_code(f"the init {self.name!r}", self.function, context)

    def _check_statistics(self, found: LayerStatistics) -> None:
        wanted = {"gradient": 1, "two gradients": 2}.get(self.needs or "", 0)
        absent = {"inputs": found.inputs is None, "original weight": found.original_OI is None}
        if len(found.gradients_OI) < wanted or absent.get(self.needs or "", False):
            what = "moments of the layers' inputs" if self.needs == "inputs" else f"the layers' {self.needs}"
            raise self._error(
                f"needs {what}", kind="missing", fix="give add_adapter(…, statistics=…); the stages reward and ppo do"
            )
        tensors = list(found.gradients_OI) + ([found.inputs.second_II] if found.inputs else [])
        tensors += [] if found.original_OI is None else [found.original_OI]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise self._error("was given statistics of a layer that are not finite", kind="not_finite")
        if any(not bool(tensor.any()) for tensor in tensors):
            raise self._error(
                "was given statistics of a layer that are zero (in ppo: all responses have the same score)",
                kind="empty",
                fix="raise init_options.batch_size or use another init",
            )

    def _error(self, message: str, **fields: Any) -> InputError:
        return InputError(f"the init {self.name!r} {message}", key="adapter.init", **fields)


def refuse_rank(rank: int, directions: int, key: str = "adapter.rank") -> None:
    """Raise `InputError` for a rank that is more than the directions of a layer."""
    if rank > directions:
        raise InputError(
            f"{key}: {rank} is more than the {directions} directions of a target layer",
            kind="conflict",
            key=key,
            fix=f"lower {key}, or name larger layers in adapter.targets",
        )


INITS: dict[str, Init] = {}


def register_init(
    name: str,
    function: InitFunction | None = None,
    *,
    options: type[Section] = NoOptions,
    needs: Need | None = None,
    frozen: tuple[Factor, ...] = (),
) -> Callable[[InitFunction], InitFunction]:
    """Add an init under a name, called or as a decorator. Raises ValueError for a name that is taken."""

    def add(function: InitFunction) -> InitFunction:
        if name in INITS:
            raise ValueError(f"an adapter init named {name!r} is already registered")
        INITS[name] = Init(name, function, options, needs, frozen)
        INIT_OPTIONS[name] = options
        return function

    if function is not None:
        add(function)
    return add


def get_init(name: str) -> Init:
    """The init of that name, or of `module:function`. Raises `InputError` for one that does not exist."""
    if name not in INITS and ":" in name:
        _register_loaded(name, load_function(name))
    return look_up(INITS, name, f"adapter.init: unknown init {name!r}", "adapter.init")


def init_of(settings: LowRankConfig) -> tuple[Init, Section]:
    """The init of an adapter and its options. Raises `InputError` for an init or option that does not exist."""
    init = get_init(settings.init)
    return init, parse_options(init.name, init.options, settings.init_options)


def init_names() -> list[str]:
    """The names of all registered inits."""
    return sorted(INITS)


def _register_loaded(name: str, function: Callable[..., Any]) -> None:
    """Register a loaded function under `module:function`, with the options and needs that its decorator gave it."""
    decorated = next((init for init in INITS.values() if init.function is function), None)
    INITS.setdefault(name, replace(decorated, name=name) if decorated else Init(name, function))

"""The registry of adapter inits, what an init is given, and how others add theirs.

An init is a function of an `InitContext` that returns `(A_RI, B_OR)`. To add one:

    @register_init("halves")
    def halves(context: InitContext) -> tuple[Tensor, Tensor]: ...

in a module that is imported (a recipe can name it: `init: my_module:halves`), or, from an installed package, an entry
point in the group `pe_rlhf.inits` whose name is the init's and whose object is the function.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import Tensor

from pe_rlhf.adapters.layer_statistics import InputMoments, LayerStatistics, Need
from pe_rlhf.config.init_options import INIT_OPTIONS, NoOptions, parse_options
from pe_rlhf.config.section import Section
from reward.errors import InputError
from reward.judges import load_function

ENTRY_POINTS = "pe_rlhf.inits"


@dataclass(frozen=True)
class InitContext:
    """What an init may look at for one layer.

    `weight_OI` is the frozen base weight in fp32 (a quantised one dequantised), `rank` r, `scale` the factor s that
    multiplies B·A, `generator` the only source of randomness, seeded per role and layer, `options` an instance of the
    init's schema, and `statistics` what the init asked for with `needs`.
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
    def inputs(self) -> InputMoments:
        """Moments of the layer's inputs."""
        assert self.statistics.inputs is not None
        return self.statistics.inputs


InitFunction = Callable[[InitContext], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Init:
    """A registered init: the function, the schema of its options, and what it needs beyond the weight."""

    name: str
    function: InitFunction
    options: type[Section] = NoOptions
    needs: Need | None = None

    def __call__(self, context: InitContext) -> tuple[Tensor, Tensor]:
        """`(A_RI, B_OR)`. Raises `InputError` where the statistics that it needs are missing or not finite."""
        found = context.statistics
        tensors = list(found.gradients_OI) + ([found.inputs.second_II] if found.inputs else [])
        wanted = {"gradient": 1, "two gradients": 2}.get(self.needs or "", 0)
        if len(found.gradients_OI) < wanted or (self.needs == "inputs" and found.inputs is None):
            what = "moments of the layers' inputs" if self.needs == "inputs" else f"the layers' {self.needs}"
            raise InputError(
                f"the init {self.name!r} needs {what}: give add_adapter(…, statistics=…);"
                " the stages reward and ppo do so themselves"
            )
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise InputError(f"the init {self.name!r}: the statistics of a layer are not finite")
        if any(not bool(tensor.any()) for tensor in tensors):
            raise InputError(
                f"the init {self.name!r}: the statistics of a layer are zero (in ppo: all responses of the batch scored"
                " alike); raise init_options.batch_size or take another init"
            )
        factors = self.function(context if context.options is not None else replace(context, options=self.options()))
        return self._checked(context, *factors)

    def _checked(self, context: InitContext, A_RI: Tensor, B_OR: Tensor) -> tuple[Tensor, Tensor]:
        out_features, in_features = context.weight_OI.shape
        expected = (context.rank, in_features), (out_features, context.rank)
        if (tuple(A_RI.shape), tuple(B_OR.shape)) != expected:
            raise InputError(
                f"the init {self.name!r} gave A and B of shapes {tuple(A_RI.shape)} and {tuple(B_OR.shape)} where"
                f" {expected[0]} and {expected[1]} are wanted"
            )
        if not (A_RI.isfinite().all() and B_OR.isfinite().all()):
            raise InputError(f"the init {self.name!r} gave factors that are not finite")
        return A_RI, B_OR

    def parse(self, given: dict[str, Any]) -> Section:
        """Its options from a recipe's mapping, complete. Raises `InputError` for one that it has not."""
        try:
            return parse_options(self.name, self.options, given)
        except ValueError as error:
            raise InputError(f"adapter.init_options: {error}") from error


INITS: dict[str, Init] = {}


def register_init(
    name: str,
    function: InitFunction | None = None,
    *,
    options: type[Section] = NoOptions,
    needs: Need | None = None,
) -> Callable[[InitFunction], InitFunction]:
    """Add an init under a name, called or as a decorator. A name that is taken is an error, never an override."""

    def add(function: InitFunction) -> InitFunction:
        if name in INITS:
            raise ValueError(f"an adapter init named {name!r} is already registered")
        INITS[name] = Init(name, function, options, needs)
        return function

    if function is not None:
        add(function)
    return add


def get_init(name: str) -> Init:
    """The init of that name; an unknown name is an `InputError` naming the nearest and listing those there are."""
    if name not in INITS and name in (plugins := _plugins()):
        _load_plugin(plugins[name])
    if name not in INITS and ":" in name:
        _load_from_module(name)
    if name in INITS:
        return INITS[name]
    known = init_names()
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise InputError(f"adapter.init: unknown init {name!r}{hint}; there are {', '.join(known)}")


def init_names() -> list[str]:
    """The names of all inits, those of installed packages included."""
    return sorted(INITS.keys() | _plugins().keys())


def _plugins() -> dict[str, EntryPoint]:
    """The inits of installed packages. Raises `InputError` for a name that is ours, or that two packages have."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in INIT_OPTIONS or found.setdefault(point.name, point).value != point.value:
            raise InputError(
                f"the plug-in {point.name!r} ({point.value}): there is an adapter init of that name already"
            )
    return found


def _load_plugin(point: EntryPoint) -> None:
    """Load an entry point: a function that its module registers under that name, or a plain one."""
    try:
        loaded = point.load()
    except Exception as error:  # whatever a foreign package raises when it is imported
        raise InputError(f"adapter.init: the plug-in {point.name!r} cannot be loaded: {error}") from error
    if not callable(loaded):
        raise InputError(f"adapter.init: the plug-in {point.name!r} ({point.value}) is not a function")
    _register_loaded(point.name, loaded)


def _load_from_module(name: str) -> None:
    _register_loaded(name, load_function(name))


def _register_loaded(name: str, function: Callable[..., Any]) -> None:
    """Under the name it was asked for by: with what its decorator says of it, where it has one."""
    decorated = next((init for init in INITS.values() if init.function is function), None)
    INITS.setdefault(name, replace(decorated, name=name) if decorated else Init(name, function))

"""The adapter of a role: what all kinds have in common, and the settings of the usual one, LoRA.

Every other kind has its settings in its own file in `pe_rlhf/adapters/kinds/`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, ValidationInfo, field_validator

from pe_rlhf.config.section import Positive, Section, refusal
from reward.errors import InputError, did_you_mean

# The options of each adapter init by its name. `pe_rlhf.adapters.lora.inits`, which the package imports first, fills
# it: so an init has its options in its own file, and a recipe is checked before torch is imported.
INIT_OPTIONS: dict[str, type[Section]] = {}


# Keys that somebody may miss in a kind, and why it has not got them.
ELSEWHERE = {
    "scaling": "rsLoRA keeps the size of B·A for any rank r: only a LoRA's product of a fixed rank has use for it",
    "init": "an init is of a LoRA's factors A and B: leave it out, or take a kind that holds a LoRA",
}


class OptionsOnQuantised(Section):
    """The options of an init for a quantised base only."""


def init_fits(init: str, quantization: str) -> bool:
    """Whether an init can be taken on a base that is quantised like that; one that is not registered yet can."""
    return quantization != "none" or not issubclass(INIT_OPTIONS.get(init, Section), OptionsOnQuantised)


class AdapterConfig(Section):
    """The adapter of a role: the keys that every kind has. Each kind has others beside them."""

    kind: str = Field(default="lora", description="{kinds}, one that you registered, or module:Class")
    targets: str | list[str] = Field(
        default="all-linear",
        description="layers that get an adapter: all-linear, attention, a list of module names or their endings, or a"
        " regular expression over whole names, as PEFT's target_modules and target_parameters (experts.down_proj)",
    )
    exclude: str | list[str] = Field(
        default_factory=list, description="layers that get none: a list of names or endings, or a regular expression"
    )
    last_layers: Positive | None = Field(
        default=None,
        description="put adapters on the last blocks only; less time and memory, since the backward pass ends"
        " there; default: all blocks",
    )

    @property
    def routes(self) -> tuple[str, ...]:
        """The tasks that it computes something else for each of; empty for a kind that knows no tasks."""
        return ()

    def without_dropout(self) -> Self:
        """The same adapter without dropout, which kinds without a LoRA have not."""
        return self

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, given: str | list[str]) -> str | list[str]:
        if not given:
            raise ValueError("name at least one module")
        return given


class LowRankConfig(AdapterConfig):
    """The keys of kinds that are or hold a LoRA: s·B·A of some rank."""

    init: str = Field(default="lora", description="{inits}, one that you registered, or module:function")
    init_options: dict[str, Any] = Field(default_factory=dict, description="options of the init, see below")
    rank: Positive = Field(default=16, description="rank r of B·A; if the init has B0 ≠ 0, the export has rank 2r")
    alpha: float = Field(
        default=32.0, gt=0, description="B·A is scaled by alpha/rank (standard) or alpha/√rank (rslora)"
    )
    scaling: Literal["standard", "rslora"] = Field(
        default="standard", description="standard: alpha/rank; rslora: alpha/√rank"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout on the adapter's input; only in the stages sft and reward"
    )

    def without_dropout(self) -> Self:
        return self.model_copy(update={"dropout": 0.0})

    @field_validator("init_options")
    @classmethod
    def _options_of_the_init(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Options of an init that is not registered yet, such as module:function, are checked when it is loaded."""
        init = info.data.get("init", "")
        if init in INIT_OPTIONS:
            parse_options(init, INIT_OPTIONS[init], given)
        return given


class LoRAConfig(LowRankConfig):
    """The adapter of a role, a LoRA unless `kind` says otherwise. Other kinds have the keys of the tables below."""


SettingsOf = Callable[[str], type[AdapterConfig]]
# The schema of a kind by its name. `pe_rlhf.adapters.kind`, which the package imports first, sets it, since a kind has
# its settings in its own file.
_settings_of: SettingsOf = {"lora": LoRAConfig}.__getitem__
_kinds: Collection[str] = ("lora",)


def set_kinds(kinds: Collection[str], settings_of: SettingsOf) -> None:
    """Say which kinds there are, and how the settings of one are found.

    `settings_of` raises `InputError` for a kind that does not exist. `kinds` may grow later.
    """
    global _kinds, _settings_of
    _kinds, _settings_of = kinds, settings_of


def kind_names() -> list[str]:
    """The names of all registered kinds."""
    return sorted(_kinds)


def settings_of(kind: str) -> type[AdapterConfig]:
    """The schema of a kind's section. Raises `InputError` for a kind that does not exist."""
    # Another kind's file imports torch, which takes seconds.
    return LoRAConfig if kind == "lora" else _settings_of(kind)


def parse_adapter(given: Any) -> Any:
    """An adapter section as settings of the kind that it names."""
    if not isinstance(given, dict) or not isinstance(kind := given.get("kind", "lora"), str):
        return given
    try:
        schema = settings_of(kind)
        refuse_unknown(f"the kind {kind!r}", "key", given, schema)
    except InputError as error:
        raise refusal(error.key or "kind", str(error), error.kind) from error
    return schema.model_validate(given)


Adapter = Annotated[SerializeAsAny[AdapterConfig], BeforeValidator(parse_adapter)]


def parse_options(init: str, schema: type[Section], given: dict[str, Any]) -> Section:
    """The options of an init, complete. Raises `InputError` that names the option and the nearest one that exists."""
    refuse_unknown(f"the init {init!r}", "option", given, schema, below="adapter.init_options.")
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{option} of the init {init!r}: {first['msg']} (got {first['input']!r})",
            kind="invalid",
            key=f"adapter.init_options.{option}",
        ) from error


def refuse_unknown(owner: str, what: str, given: dict[str, Any], schema: type[Section], below: str = "") -> None:
    """Raise `InputError` for a key that the schema has not, with the nearest one that it has."""
    known = list(schema.model_fields)
    for key in given:
        if key not in known:
            raise InputError(
                f"{owner} has no {what} {key!r}; it has {', '.join(known) or 'none'}",
                kind="unknown",
                key=f"{below}{key}",
                fix=ELSEWHERE.get(str(key)) or did_you_mean(str(key), known, cutoff=0.5),
            )

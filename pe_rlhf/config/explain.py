"""A mistake in a recipe, which pydantic found, in one sentence with the nearest key that exists."""

from __future__ import annotations

import reprlib
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pe_rlhf.config import Recipe
from reward.errors import Kind, did_you_mean

UNION_BRANCHES = ("str", "list[str]")


class Mistake(NamedTuple):
    """The first mistake in a recipe: its key, its kind, and one sentence, which says how many more there are."""

    key: str
    kind: Kind
    text: str


def explain_validation_error(error: ValidationError, schema: type[BaseModel] = Recipe) -> Mistake:
    """The mistake that is reported, of all that pydantic found."""
    # An unknown key comes first: where it is a typo, another key is missing because of it.
    mistakes = sorted(error.errors(), key=lambda mistake: mistake["type"] not in ("extra_forbidden", "invalid_key"))
    # For `str | Section` fields pydantic reports both branches; keep the error inside the section.
    places = [_location(mistake) for mistake in mistakes]
    mistakes = [m for m, place in zip(mistakes, places, strict=True) if not _is_other_branch(m, place, places)]
    first = mistakes[0]
    location = _location(first)
    key = ".".join(location)
    kind: Kind = "invalid"
    if first["type"] == "refusal":
        ours = first.get("ctx", {})
        key, kind = ".".join(filter(None, [key, ours["key"]])), ours["kind"]
        text = f"{key}: {ours['message']}" if key else ours["message"]
    elif first["type"] == "extra_forbidden":
        kind = "unknown"
        known = _fields_at(schema, location[:-1])
        hint = did_you_mean(location[-1], known, 0.5) or f"known here: {', '.join(known)}"
        text = f"unknown key {key!r}; {hint}"
    elif first["type"] == "missing":
        kind, text = "missing", f"{key} is missing"
    else:
        # Each branch of a union like `str | list[str]` has a reason of its own.
        reasons = [
            mistake["msg"].removeprefix("Value error, ") for mistake in mistakes if _location(mistake) == location
        ]
        reason = " or ".join(reason[0].lower() + reason[1:] for reason in reasons)
        text = f"{key}: {reason}" if key else reason
        if key and first["type"] != "value_error":
            text += f" (got {reprlib.repr(first['input'])})"
    more = len({tuple(_location(mistake)) for mistake in mistakes}) - 1
    return Mistake(key, kind, text + (f" (and {more} more mistake{'s' if more > 1 else ''})" if more else ""))


def _is_other_branch(mistake: ErrorDetails, place: list[str], places: list[list[str]]) -> bool:
    below = any(other[: len(place)] == place and len(other) > len(place) for other in places)
    return mistake["type"] == "string_type" and below


def _location(mistake: ErrorDetails) -> list[str]:
    """The key of a mistake, without pydantic's names for validators and for the branches of a union."""
    return [
        str(part)
        for part in mistake["loc"]
        if isinstance(part, int) or not (part in UNION_BRANCHES or part.startswith("function-"))
    ]


def _fields_at(model: type[BaseModel], location: list[str]) -> list[str]:
    for part in location:
        if part.isdigit():
            continue
        model = next(_models_in(model.model_fields[part].annotation), model)
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The schema classes inside a type like `list[RewardSource]` or `PPOConfig | None`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)

"""The page that lists every key of a recipe: `python -m pe_rlhf.config.reference > docs/recipe.md`."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pe_rlhf.config.adapter import INIT_OPTIONS, AdapterConfig, LoRAConfig, LowRankConfig, kind_names, settings_of
from pe_rlhf.config.evaluate import EvaluateConfig, EvaluationSettings
from pe_rlhf.config.ppo import PPOConfig
from pe_rlhf.config.preferences import PreferencesConfig
from pe_rlhf.config.recipe import Recipe
from pe_rlhf.config.reward import RewardConfig
from pe_rlhf.config.sampling import SamplingConfig
from pe_rlhf.config.section import DataSource, Section
from reward.judges.judge_settings import JudgeSettings

HEAD = """# Recipe keys

Every key of a recipe with its type, default and meaning. `pe-rlhf run RECIPE key.sub=value` changes a key for one run.
A key whose default is – has to be given. A recipe has a section for each stage that it runs: `sft`, `preferences`,
`reward`, `ppo`, `evaluate`. Each run saves its complete settings in `recipe.yaml`.

This page is generated from the schema by `python -m pe_rlhf.config.reference > docs/recipe.md`.
"""

TABLE = "| key | type | default | meaning |\n|---|---|---|---|\n"

# A section that occurs in several places is documented once, under this key.
TOLD_AT: dict[type[Section], str] = {
    AdapterConfig: "adapter",
    DataSource: "preferences.prompts",
    JudgeSettings: "preferences.judge",
    SamplingConfig: "preferences.sampling",
    # of `tasks`
    PreferencesConfig: "preferences",
    RewardConfig: "reward",
    PPOConfig: "ppo",
    EvaluateConfig: "evaluate",
}


COMMAND = "pe-rlhf evaluate"


def recipe_page() -> str:
    """docs/recipe.md as it has to be: a table for the top level, for each section, and for `pe-rlhf evaluate`."""
    parts = [HEAD]
    for path, section in [*_sections("", Recipe), *_sections(COMMAND, EvaluationSettings)]:
        shown = LoRAConfig if section is AdapterConfig else section
        parts.append(f"## {f'`{path}`' if path else 'Top level'}\n\n{_first_line(shown)}\n")
        keys = sorted(shown.model_fields.items(), key=lambda item: not item[1].is_required())
        rows = [_row(name, field) for name, field in keys]
        parts.append(TABLE + "\n".join(rows) + "\n")
        parts += [*_other_kinds(), *_init_options()] if section is AdapterConfig else []
    return "\n".join(parts)


def _other_kinds() -> Iterator[str]:
    """A table for each kind but `lora` of what it has beside the keys of every adapter, or instead of LoRA's."""
    for name in kind_names():
        schema = settings_of(name)
        common = LowRankConfig if issubclass(schema, LowRankConfig) else AdapterConfig
        beside = "all of the above" if common is LowRankConfig else ", ".join(f"`{key}`" for key in common.model_fields)
        told = {_row(key, field) for key, field in common.model_fields.items()}
        rows = [row for key, field in schema.model_fields.items() if (row := _row(key, field)) not in told]
        if name != "lora":
            table = TABLE + "\n".join(rows) + "\n" if rows else ""
            yield f"### `adapter` of the kind `{name}`\n\n{_first_line(schema)} Keys: {beside}.\n\n{table}"


def _init_options() -> Iterator[str]:
    """A table of options for each init that has some."""
    for name in sorted(INIT_OPTIONS):
        if fields := INIT_OPTIONS[name].model_fields:
            rows = [_row(option, field) for option, field in fields.items()]
            yield f"### `adapter.init_options` of `{name}`\n\n{TABLE}" + "\n".join(rows) + "\n"


def _sections(path: str, section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """A section and those below it, by path."""
    yield path, section
    for name, field in section.model_fields.items():
        for below in _sections_in(field.annotation):
            place = f"{path} {name}" if path == COMMAND else f"{path}.{name}".lstrip(".")
            if TOLD_AT.get(below, place) == place:
                yield from _sections(place, below)


def _row(name: str, field: FieldInfo) -> str:
    below = _sections_in(field.annotation)
    meaning = field.description or (_first_line(below[0]) if below else "")
    meaning = meaning.replace("{inits}", ", ".join(sorted(INIT_OPTIONS))).replace("{kinds}", ", ".join(kind_names()))
    cells = [f"`{name}`", _type(field.annotation), _default(field, bool(below)), meaning]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "\\<") for cell in cells) + " |"


def _default(field: FieldInfo, is_section: bool) -> str:
    if field.is_required():
        return "–"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, Section) or (is_section and isinstance(value, list)):
        return ""
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _type(annotation: Any) -> str:
    """A type as a reader of YAML knows it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(one) for one in inner if one is not type(None))
    if origin in (list, tuple):
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        place = TOLD_AT.get(annotation)
        return f"as [`{place}`](#{place.replace('.', '')})" if place else "section"
    return {int: "whole number", float: "number", str: "text", bool: "yes or no"}.get(annotation, "any")


def _sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_in(inner)]


def _first_line(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    print(recipe_page(), end="")

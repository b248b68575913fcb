"""Reading a recipe: find the file, apply overrides, check it against the schema, say clearly what is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.composer import ComposerError

from pe_rlhf.config import DataFile, Recipe
from pe_rlhf.config.explain import explain_validation_error
from pe_rlhf.system.files import write_whole
from reward.errors import InputError, did_you_mean
from reward.row_files import refuse_pipe

SAVED_RECIPE = "recipe.yaml"  # in the folder of a run and of each stage

S = TypeVar("S", bound=BaseModel)

# Where and with how much memory a run computes; what it computes is the same.
FREE_TO_CHANGE = ("deepspeed", "threads", "tracking", "function_timeout", "rank_timeout", "deterministic")
FREE_TO_CHANGE += ("backbone.device", "backbone.trunk_cache_mib")
# Of the engines that sample, too: which servers answer, and how long somebody waits for them.
FREE_TO_CHANGE += tuple(
    f"{section}.{key}"
    for section in ("preferences.sampling", "ppo.rollout", "evaluate.sampling")
    for key in ("urls", "exchange_dir", "start_timeout", "timeout", "gpu_memory_share", "sleep")
)


def bundled(folder: str) -> Path:
    """`recipes/` or `launch/`: inside the installed package, or at the top of a checkout."""
    packaged = Path(__file__).parents[1] / "_bundled" / folder
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / folder


def find_recipe(name: str) -> Path:
    """A recipe's file from its path, or the name of one that comes with the package."""
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix not in (".yaml", ".yml") and (named := bundled("recipes") / f"{name}.yaml").is_file():
        return named
    if (own := path / SAVED_RECIPE).is_file():
        message = f"{name} is the folder of a run"
        raise InputError(message, kind="invalid", key="RECIPE", file=name, fix=f"its recipe is {own}")
    known = sorted(p.stem for p in bundled("recipes").glob("*.yaml"))
    message = f"there is no recipe {name!r}: neither a file nor one of {', '.join(known)}"
    raise InputError(message, kind="missing", key="RECIPE", file=name, fix=did_you_mean(name, known))


def load_deepspeed_config(name: str) -> dict[str, Any]:
    """A DeepSpeed configuration: zero0 … zero3_offload of `launch/`, or a JSON file.

    Raises `InputError` for one that is not there or no JSON object.
    """
    path = Path(name)
    if path.suffix != ".json":
        known = sorted(p.stem for p in bundled("launch").glob("zero*.json"))
        if name not in known:
            message = f"deepspeed: there is no {name!r}; there are {', '.join(known)}"
            raise InputError(message, kind="unknown", key="deepspeed", fix="choose one of them, or name a JSON file")
        path = bundled("launch") / f"{name}.json"
    try:
        refuse_pipe(path)
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        message = f"deepspeed: {path} cannot be read: {error}"
        raise InputError(message, kind=kind, key="deepspeed", file=path) from error
    if not isinstance(config, dict):
        raise InputError(f"deepspeed: {path} is not a JSON object", kind="unreadable", key="deepspeed", file=path)
    return {key: value for key, value in config.items() if key != "comment"}


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a file, with `key.sub=value` overrides; relative data paths become absolute.

    Raises `InputError` naming the file and the key.
    """
    return make_recipe(read_tree(path, overrides), path, overrides or ())


def read_tree(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """What a recipe's file says, with overrides, before it is checked against the schema."""
    try:
        refuse_pipe(path)
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else None
        where = f" line {line}" if mark else ""
        message = f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}"
        raise InputError(message, kind="unreadable", file=path, row=line) from error
    except (OSError, ValueError, RecursionError) as error:  # bytes that are no text, numbers of thousands of digits
        raise InputError(f"{path}: cannot be read: {error}", kind="unreadable", file=path) from error
    if not isinstance(tree, dict):
        message = f"{path}: a recipe is a mapping of keys, this file holds {_describe(tree)}"
        raise InputError(message, kind="empty" if tree is None else "invalid", file=path)
    tree.setdefault("name", path.stem)
    apply_overrides(tree, overrides or ())
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set every `key.sub=value` in a tree. Raises `InputError` naming the override."""
    for override in overrides:
        _apply(tree, override)


def make_recipe(tree: dict[str, Any], path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a tree describes. `path` is the file that it came from: data is looked for beside it.

    Raises `InputError` naming the file, or the one of the `overrides` applied that is wrong, and the key.
    """
    recipe = validated(Recipe, tree, str(path), overrides, path)
    _resolve_paths(recipe, path.parent)
    return recipe


def validated(
    schema: type[S], tree: dict[str, Any], origin: str, overrides: Sequence[str] = (), file: Path | None = None
) -> S:
    """A tree, to which the overrides were applied, as its schema.

    Raises `InputError` naming the key, and the override that is wrong, or otherwise the `origin` of the tree.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        mistake = explain_validation_error(error, schema)
        wrong = (override for override in overrides if is_below(mistake.key, override.partition("=")[0]))
        where = next((f"override {override!r}" for override in wrong), origin)
        raise InputError(f"{where}: {mistake.text}", kind=mistake.kind, key=mistake.key or None, file=file) from error


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the fully resolved recipe; the file is itself a valid recipe."""
    write_whole(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def refuse_other_recipe(recipe: Recipe, path: Path, may_change: Sequence[str] = ()) -> None:
    """Raise `InputError` where the run to be resumed was started with another recipe, the one at `path`."""
    if changed := changes_since(recipe, path, may_change):
        message = (
            f"{path.parent} was started with another recipe and cannot be resumed (--may-change KEY lets one differ):"
            f" {changed}"
        )
        raise InputError(message, kind="changed", key=changed.partition(":")[0], file=path)


def changes_since(recipe: Recipe, path: Path, may_change: Sequence[str] = (), *, moved: bool = False) -> str:
    """The keys in which a recipe differs from the one at `path`, except those that may; "" where there are none.

    moved: the other one may come from another machine: of absolute paths only the last part counts.
    """
    allowed = (*FREE_TO_CHANGE, *may_change)
    changed = [
        f"{key}: {before!r} → {after!r}"
        for key, (before, after) in differences(load_recipe(path), recipe, moved=moved).items()
        if not any(is_below(key, free) for free in allowed)
    ]
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    return "; ".join(changed[:5]) + more


def differences(before: Recipe, after: Recipe, *, moved: bool = False) -> dict[str, tuple[Any, Any]]:
    """The values before and after of every key in which two recipes differ; `moved` as of `changes_since`."""
    old, new = (flat(each.model_dump(mode="json")) for each in (before, after))
    if after.date is None:  # then a run keeps its own
        new["date"] = before.date
    if moved:
        old, new = _without_folders(old), _without_folders(new)
    # A section that one of them has not at all is one difference for each of its keys.
    return {k: (old.get(k), new.get(k)) for k in dict.fromkeys([*old, *new]) if old.get(k) != new.get(k)}


def recipe_keys(recipe: Recipe) -> set[str]:
    """The keys of a recipe that have a value, those of sections as `section.key`; a list is one value."""
    return set(flat(recipe.model_dump(mode="json")))


def is_below(key: str, above: str) -> bool:
    """Whether a key is another one, or in the section of that name."""
    return f"{key}.".startswith(f"{above}.")


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_without_folders(below) for below in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a tree by `section.key`; a list is one value."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{prefix}.{name}" if prefix else name).items()}


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"override {override!r} is not of the form key.sub=value", kind="invalid", key=override)
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        message = f"override {override!r}: the value is not valid YAML"
        raise InputError(message, kind="unreadable", key=key) from error
    set_key(tree, key, value, f"override {override!r}")


def set_key(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set `key.sub` in a recipe's tree. Raises `InputError`, which says `where` it was asked for."""
    *parents, last = parts = key.split(".")
    node: Any = tree
    for i, part in enumerate(parents):
        if isinstance(node.get(part), str):  # the short form of a section
            short = "kind" if part == "judge" else "path" if parts[i + 1] in DataFile.model_fields else None
            node[part] = node[part] if short is None else {short: node[part]}
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            above = ".".join(parents[: i + 1])
            message = f"{where}: {above} is {node!r} and has no {parts[i + 1]!r} below it"
            raise InputError(message, kind="unknown", key=key)
    node[last] = value


class _UniqueKeys(yaml.SafeLoader):
    """YAML as it is specified: a key that a mapping has twice is an error; PyYAML lets the last one win."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping as it is written, before `<<` merges keys into it, which its own keys may override."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in seen:
                raise ComposerError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _resolve_paths(node: BaseModel, folder: Path) -> None:
    """Make the paths of data files absolute: beside the recipe first, then below the working directory."""
    for name in type(node).model_fields:
        value = getattr(node, name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, DataFile) and each.path:
                named = Path(each.path).expanduser()
                for base in (folder, Path.cwd()):
                    if (base / named).is_file():
                        each.path = str((base / named).resolve())
                        break
            elif isinstance(each, BaseModel):
                _resolve_paths(each, folder)


def _describe(tree: Any) -> str:
    return "nothing" if tree is None else f"a {type(tree).__name__}"

"""Comparisons of the tiny random model by the command line: what the tests of it share."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from tests.runs import contents, recipe, write_recipe

COMPARE: dict[str, Any] = {"grid": {"init": ["lora", "pissa"]}, "seeds": [1]}


def comparison(folder: Path, **changes: Any) -> Path:
    """A recipe of a comparison with a shared reward model; `compare__seeds=[1]` changes one key of it."""
    tree = recipe("reward", "ppo", "evaluate", ppo__reward=[{"adapter": "stage"}], **changes)
    tree["compare"] = {**COMPARE, **tree.get("compare", {})}
    return write_recipe(folder, {"name": "inits", **tree})


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def without_machine(row: dict[str, str]) -> dict[str, str]:
    words = ("seconds", "tokens_per_second", "peak")
    return {key: value for key, value in row.items() if not any(word in key for word in words)}


def trained(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith("role.safetensors")}

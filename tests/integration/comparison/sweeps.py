"""Comparisons of the tiny random model by the command line: what the tests of it share."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.paths import ROOT
from tests.runs import contents, recipe, write_recipe

CHECKOUT = ROOT
COMPARE: dict[str, Any] = {"grid": {"init": ["lora", "pissa"]}, "seeds": [1]}


def comparison(folder: Path, **changes: Any) -> Path:
    """A recipe of a comparison with a shared reward model; `compare__seeds=[1]` changes one key of it."""
    tree = recipe("reward", "ppo", "evaluate", ppo__reward=[{"adapter": "stage"}], **changes)
    tree["compare"] = {**COMPARE, **tree.get("compare", {})}
    return write_recipe(folder, {"name": "inits", **tree})


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pe_rlhf", "compare", *map(str, arguments)]


def environment(cache: Path, **more: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(CHECKOUT), "PE_RLHF_CACHE": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets")}
    return os.environ | own | {"OMP_NUM_THREADS": "1"} | more


def run(folder: Path, cache: Path, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=folder, env=environment(cache, **more), capture_output=True, text=True, check=False
    )


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def without_machine(row: dict[str, str]) -> dict[str, str]:
    words = ("seconds", "tokens_per_second", "peak")
    return {key: value for key, value in row.items() if not any(word in key for word in words)}


def trained(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith("role.safetensors")}

"""Small runs through the command line: what the tests of it share."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]

PROMPTS = [{"prompt": f"Say something about the number {i}"} for i in range(6)]
PAIRS = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No idea."} for i in range(8)]

_BASE: Tree = {"model": "random:tiny-llama", "adapter": {"rank": 2, "alpha": 4}}
PREFERENCES: Tree = {"prompts": "prompts.jsonl", "judge": "reward.scores:length", "sampling": {"max_new_tokens": 4}}
REWARD: Tree = {"data": "pairs.jsonl", "batch_size": 4, "checkpoint_every": 1}
PPO: Tree = {
    "prompts": "prompts.jsonl",
    "reward": [{"function": "reward.scores:length"}],
    "rollout": {"max_new_tokens": 4},
    "steps": 2,
    "batch_size": 4,
    "epochs": 1,
    "checkpoint_every": 1,
}
EVALUATE: Tree = {"prompts": "prompts.jsonl", "judge": "reward.scores:length", "sampling": {"max_new_tokens": 4}}
SECTIONS: Tree = {"preferences": PREFERENCES, "reward": REWARD, "ppo": PPO, "evaluate": EVALUATE}


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str
    error: BaseException | None = None  # what was raised, where the command failed

    @property
    def errors(self) -> list[str]:
        """The lines that say what is wrong, without their start."""
        lines = (self.out + self.err).splitlines()
        return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]


def recipe(*stages: str, **changes: Any) -> Tree:
    """A recipe with those stages, of the tiny random model; `ppo__kl__beta=1` changes one key of it."""
    tree = copy.deepcopy({**_BASE, **{stage: SECTIONS[stage] for stage in stages}})
    for path, value in changes.items():
        *parents, last = path.split("__")
        node: Any = tree
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = value
    return tree


def write_recipe(folder: Path, tree: Tree | str) -> Path:
    """Write a recipe, and beside it the data that it names, except data that is there already."""
    for name, rows in (("prompts.jsonl", PROMPTS), ("pairs.jsonl", PAIRS)):
        if not (folder / name).exists():
            write_jsonl(folder / name, rows)
    path = folder / "recipe.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: list[Tree]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[Tree]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its name, except locks, which hold the number of a process."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def without_time(row: Tree) -> Tree:
    """What two equal runs share: no seconds, no rates, no peak memory."""
    return {k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per_second", "peak"))}

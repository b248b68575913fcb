"""Several tasks on two ranks: each task's run, and what the policies are measured as, are those of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.forked import Forked
from tests.integration.distributed.launching import run_on_ranks
from tests.integration.distributed.test_ranks import CONFIGURATIONS, assert_same_run, small
from tests.runs import Tree, write_recipe

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

ROLLOUT = {"max_new_tokens": 4, "samples_per_prompt": 2}
HERE = "tests.integration.distributed.test_tasks_on_ranks"
JUDGES = {"high": f"{HERE}:high", "vowels": f"{HERE}:vowels"}


# Of four random bytes: rewards that differ, or the ranks' rounding is all that is left to learn from.
def high(prompts: list[str], responses: list[str]) -> list[float]:
    return [sum(map(ord, response)) / 500 for response in responses]


def vowels(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(sum(letter in "aeiouyAEIOUY" for letter in response)) for response in responses]


def tree(**ppo: object) -> Tree:
    tasks = [
        {"name": name, "ppo": {"reward": [{"function": judge}]}, "evaluate": {"judge": judge}}
        for name, judge in JUDGES.items()
    ]
    whole = small("ppo", "evaluate") | {"tasks": tasks, "adapter": {"rank": 2, "alpha": 4}}
    whole["ppo"] |= ppo
    return whole


@pytest.mark.parametrize(
    ("continual", "ppo"),
    [
        # Without a critic: a clipped value turns the ranks' rounding into another gradient.
        ({"method": "olora", "anchor": "previous"}, {"advantage": "rloo", "rollout": ROLLOUT}),
        ({"method": "ewc", "fisher_samples": 4}, {}),
        ({"method": "joint", "route": {"shared_rank": 1}}, {"advantage": "rloo", "rollout": ROLLOUT}),
    ],
    ids=["olora", "ewc", "routed"],
)
def test_two_ranks_are_one(tmp_path: Path, model_cache: Path, continual: Tree, ppo: Tree) -> None:
    path = write_recipe(tmp_path, tree(**ppo) | {"continual": continual})
    Forked(["run", str(path), "--run-dir", "one"], tmp_path, model_cache).finish()
    run_on_ranks(["run", str(path), *CONFIGURATIONS["zero2"], "--run-dir", "two"], tmp_path, model_cache)
    policies = ["joint"] if "route" in continual else [*JUDGES]
    for task in policies:
        assert_same_run(tmp_path / "two" / "tasks" / task, tmp_path / "one" / "tasks" / task, ("ppo",), weights=1e-3)
    found, wanted = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("two", "one"))
    assert [(cell["after"], cell["on"]) for cell in found["cells"]] == [(a, on) for a in policies for on in JUDGES]
    for cell, other in zip(found["cells"], wanted["cells"], strict=True):
        assert cell["win_rate"] == pytest.approx(other["win_rate"], abs=0.35)  # six prompts: a response may differ
        assert cell["kl"] == pytest.approx(other["kl"], abs=0.05)

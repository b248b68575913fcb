"""Whole runs with each kind of adapter: reward model, policy and critic of it, cut and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pe_rlhf.adapters.kind import KINDS
from tests.runs import Outcome, read_jsonl, recipe, without_time, write_recipe

Cli = Callable[..., Outcome]
# What keeps every kind inside the tiny model, and lets what changes over time change within three steps.
SETTINGS = {
    "adalora": {"every": 1, "warmup_share": 0.0},
    "lora_dash": {"warmup_steps": 2, "directions": 2},
    "redrawn": {"every": 2},
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_run_of_every_kind_resumes_to_the_same_numbers(cli: Cli, tmp_path: Path, kind: str) -> None:
    adapter = {"kind": kind, **SETTINGS.get(kind, {})}
    tree = recipe("reward", "ppo", adapter=adapter, ppo__steps=3, ppo__checkpoint_every=1)
    path = write_recipe(tmp_path, tree)
    assert cli("run", path, "--run-dir", "whole").code == 0
    assert cli("run", path, "--run-dir", "cut", "ppo.steps=2").code == 0
    assert cli("run", path, "--run-dir", "cut", "--resume", "--may-change", "ppo.steps").code == 0
    whole, cut = (read_jsonl(tmp_path / name / "ppo" / "metrics.jsonl") for name in ("whole", "cut"))
    assert whole[0]["kl"] == pytest.approx(0.0, abs=1e-6)  # the sampler's log-probs against the trainer's
    assert max(row["logprob_mismatch_max"] for row in whole) < 1e-4
    if kind not in ("adalora", "lora_dash"):  # whose schedules follow the number of steps
        assert [without_time(row) for row in cut] == [without_time(row) for row in whole]

"""Kinds of adapters that look at gradients or write into their parameters, on two ranks and with split states."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked import Forked
from tests.integration.distributed.launching import run_on_ranks
from tests.integration.distributed.test_ranks import CONFIGURATIONS, assert_same_run, small, write_all_split
from tests.runs import write_recipe

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

KINDS = {
    "adalora": ["adapter.kind=adalora", "adapter.every=1", "adapter.warmup_share=0.1"],
    "dora": ["adapter.kind=dora", "adapter.init=pissa", "adapter.rank=4"],
    # Of full rank, it makes much of the ranks' rounding: its steps are smaller.
    "redrawn": ["adapter.kind=redrawn", "adapter.every=2", "reward.learning_rate=1e-3", "ppo.learning_rate=1e-3"],
    "shira": ["adapter.kind=shira"],
    # The directions are chosen in the middle of both stages.
    "lora_dash": [
        *("adapter.kind=lora_dash", "adapter.rank=4", "adapter.directions=3", "adapter.warmup_steps=4"),
        *("reward.learning_rate=1e-3", "ppo.learning_rate=1e-3"),
    ],
    # All layers share one vector.
    "tinylora": ["adapter.kind=tinylora", "adapter.size=13", "adapter.vectors=1"],
    # Ways to make a step, which look at gradients and write into weights, too.
    "sam": [f"{stage}.optimizer.{key}" for stage in ("reward", "ppo") for key in ("sharpness=sam", "rho=0.1")],
    # A noisy model makes much of the ranks' rounding.
    "rwp": [
        f"{stage}.{key}"
        for stage in ("reward", "ppo")
        for key in ("optimizer.sharpness=rwp", "optimizer.noise_on=model", "learning_rate=1e-3")
    ],
}
SPLIT = {
    **dict.fromkeys(KINDS, ("zero0",)),
    **dict.fromkeys(("adalora", "redrawn"), ("zero2",)),
    **dict.fromkeys(("tinylora", "lora_dash"), ("zero2", "all_split")),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_two_ranks_are_one(tmp_path: Path, model_cache: Path, kind: str) -> None:
    path = write_recipe(tmp_path, {**small("reward", "ppo"), "adapter": {}})
    write_all_split(tmp_path)
    command = ["run", str(path), *KINDS[kind]]
    Forked([*command, "--run-dir", "one"], tmp_path, model_cache).finish()
    for zero in SPLIT[kind]:
        run_on_ranks([*command, *CONFIGURATIONS[zero], "--run-dir", zero], tmp_path, model_cache)
        assert_same_run(tmp_path / zero, tmp_path / "one", ("reward", "ppo"), weights=1e-3)

"""Kinds of adapters that look at gradients or write into their parameters, on two ranks and with split states."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked import Forked
from tests.integration.distributed.launching import ROOT, deepspeed, finish, start
from tests.integration.distributed.test_ranks import assert_same_run, small
from tests.runs import write_recipe

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

KINDS = {
    "adalora": ["adapter.kind=adalora", "adapter.every=1", "adapter.warmup_share=0.1"],
    "dora": ["adapter.kind=dora", "adapter.init=pissa", "adapter.rank=4"],
    # Of full rank, it makes much of the ranks' rounding: its steps are smaller.
    "redrawn": ["adapter.kind=redrawn", "adapter.every=2", "reward.learning_rate=1e-3", "ppo.learning_rate=1e-3"],
    "shira": ["adapter.kind=shira"],
    # Ways to make a step, which look at gradients and write into weights, too.
    "sam": [f"{stage}.optimizer.{key}" for stage in ("reward", "ppo") for key in ("sharpness=sam", "rho=0.1")],
    # A noisy model makes much of the ranks' rounding.
    "rwp": [
        f"{stage}.{key}"
        for stage in ("reward", "ppo")
        for key in ("optimizer.sharpness=rwp", "optimizer.noise_on=model", "learning_rate=1e-3")
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> Path:
    """One process for each kind, then all kinds on two ranks, under ZeRO 0 and 2 in turn."""
    folder = tmp_path_factory.mktemp("kinds")
    path = write_recipe(folder, {**small("reward", "ppo"), "adapter": {}})
    for kind, options in KINDS.items():
        Forked(["run", str(path), *options, "--run-dir", kind], folder, model_cache).finish()
    worker = str(ROOT / "tests" / "integration" / "distributed" / "worker.py")
    names = [two_ranks(kind) for kind in KINDS]
    finish(start(deepspeed(2, worker, str(path), str(folder), *names), folder, model_cache))
    return folder


def two_ranks(kind: str) -> str:
    zero = "zero2" if kind in ("adalora", "redrawn") else "zero0"
    return ",".join([f"deepspeed={zero}", *KINDS[kind]])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_two_ranks_are_one(runs: Path, kind: str) -> None:
    assert_same_run(runs / two_ranks(kind), runs / kind, ("reward", "ppo"), weights=1e-3)

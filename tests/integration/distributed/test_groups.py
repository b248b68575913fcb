"""Estimators that compare the responses to a prompt, on two ranks: a group's responses are on both."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked import Forked
from tests.integration.distributed.launching import run_on_ranks
from tests.integration.distributed.test_ranks import assert_same_run, small
from tests.runs import read_jsonl, write_recipe

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

OPTIONS = [
    *("ppo.advantage=group_mean", "ppo.rollout.samples_per_prompt=3", "ppo.ratio=sequence_mean"),
    *("ppo.loss_aggregation=sequence", "ppo.kl.place=loss", "ppo.clip_range=0.01", "ppo.clip_range_high=0.02"),
]


def test_two_ranks_are_one(tmp_path: Path, model_cache: Path) -> None:
    path = write_recipe(tmp_path, small("ppo"))
    Forked(["run", str(path), *OPTIONS, "--run-dir", "plain"], tmp_path, model_cache).finish()
    run_on_ranks(["run", str(path), "deepspeed=zero2", *OPTIONS, "--run-dir", "two"], tmp_path, model_cache)
    assert_same_run(tmp_path / "two", tmp_path / "plain", ("ppo",))
    lines = read_jsonl(tmp_path / "two" / "ppo" / "metrics.jsonl")
    assert lines[-1]["policy_grad_norm"] > 0
    assert lines[-1]["episodes"] == 3 * 5 * 3
    assert not list((tmp_path / "two").rglob("*value*"))

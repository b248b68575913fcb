"""Estimators that compare the responses to a prompt, on two ranks: a group's responses are on both."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked import Forked
from tests.integration.distributed.launching import ROOT, deepspeed, finish, start
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
    worker = str(ROOT / "tests" / "integration" / "distributed" / "worker.py")
    name = ",".join(["deepspeed=zero2", *OPTIONS])
    finish(start(deepspeed(2, worker, str(path), str(tmp_path), name), tmp_path, model_cache))
    assert_same_run(tmp_path / name, tmp_path / "plain", ("ppo",))
    lines = read_jsonl(tmp_path / name / "ppo" / "metrics.jsonl")
    assert lines[-1]["policy_grad_norm"] > 0
    assert lines[-1]["episodes"] == 3 * 5 * 3
    assert not list((tmp_path / name).rglob("*value*"))

"""Ensembles, normalised sources and judges as rewards on two ranks: the numbers and the files of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import Forked
from tests.integration.distributed.launching import run_on_ranks
from tests.runs import read_jsonl, recipe, without_time, write_recipe

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")


def test_two_ranks_are_one(tmp_path: Path, model_cache: Path) -> None:
    sources = [
        {"ensemble": "reward", "combine": "mean_minus_std", "k": 0.5, "normalise": "running", "clip": 3.0},
        {"judge": "length", "weight": 0.5},
        {"function": "reward.scores:length_penalty", "arguments": {"limit": 5, "buffer": 5}},
    ]
    changes = {
        "reward__epochs": 2,
        "reward__batch_size": 3,
        "reward__learning_rate": 1e-2,
        "reward__micro_batch_tokens": 40,
        "reward__ensemble": {"members": 3, "vary": ["seed", "bootstrap"]},
        "ppo__batch_size": 5,
        "ppo__steps": 3,
        "ppo__minibatches": 2,
        "ppo__learning_rate": 1e-2,
        "ppo__micro_batch_tokens": 24,
        "ppo__reward": sources,
        "evaluate__policy": {"best_of": 2},
    }
    path = write_recipe(tmp_path, recipe("reward", "ppo", "evaluate", **changes))
    Forked(["run", str(path), "--run-dir", "one"], tmp_path, model_cache).finish()
    run_on_ranks(["run", str(path), "--run-dir", "two"], tmp_path, model_cache)
    for stage in ("reward", "ppo", "evaluate"):
        one, two = (read_jsonl(tmp_path / run / stage / "metrics.jsonl") for run in ("one", "two"))
        for line, want in zip(two, one, strict=True):
            assert without_time(line) == pytest.approx(without_time(want), rel=2e-3, abs=2e-5), stage
    for folder in ("adapter", "adapter_2", "adapter_3"):
        found, expected = (load_file(tmp_path / run / "reward" / folder / "role.safetensors") for run in ("two", "one"))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3, msg=f"{folder} {name}")
    moments = [json.loads((tmp_path / run / "ppo" / "summary.json").read_text())["moments"] for run in ("one", "two")]
    assert moments[1]["ensemble"] == pytest.approx(moments[0]["ensemble"], rel=1e-3, abs=1e-4)
    for name in ("judged_rewards.jsonl", "anchor_responses.jsonl"):
        assert (tmp_path / "two" / "ppo" / name).read_text() == (tmp_path / "one" / "ppo" / name).read_text()
        assert read_jsonl(tmp_path / "one" / "ppo" / name)

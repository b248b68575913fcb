"""`kill -9` at random moments, then `--resume`, again and again: nothing differs from the run that was not killed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.forked import Forked
from tests.runs import Tree, read_jsonl, recipe, without_time, write_recipe

KILLS = {"ppo": 20, "reward": 10}
ROLES = {"ppo": ("ppo/adapter", "ppo/value"), "reward": ("reward/adapter",)}


def several_seconds_of(stage: str) -> Tree:
    """A checkpoint at every step or at every third: a kill falls into one, or throws finished steps away."""
    if stage == "reward":
        return recipe(
            stage,
            threads=1,
            adapter__init="lora_ga",  # from a gradient, which a resumed run does not take again
            adapter__dropout=0.2,
            reward__epochs=16,
            reward__checkpoint_every=3,
        )
    return recipe(
        stage,
        threads=1,
        adapter__init="pissa",
        ppo__steps=12,
        ppo__epochs=2,
        ppo__minibatches=2,
        ppo__learning_rate=1e-2,
        ppo__checkpoint_every=1,
        ppo__kl={"controller": "adaptive", "target": 0.01, "horizon": 50},
    )


def result(run: Path, stage: str) -> dict[str, object]:
    """All that a run leaves except the time it took."""
    found: dict[str, object] = {
        f"{role}/{name}": (run / role / name).read_bytes()
        for role in ROLES[stage]
        for name in ("role.safetensors", "adapter_model.safetensors")
    }
    found["metrics"] = [without_time(line) for line in read_jsonl(run / stage / "metrics.jsonl")]
    if stage == "ppo":
        found["samples"] = read_jsonl(run / stage / "samples.jsonl")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "reward"])
def test_killed_at_random_moments(stage: str, tmp_path: Path, model_cache: Path) -> None:
    path = str(write_recipe(tmp_path, several_seconds_of(stage)))
    Forked(["run", path, "--run-dir=first"], tmp_path, model_cache).finish()  # starts the server, makes the model
    began = time.monotonic()
    Forked(["run", path, "--run-dir=whole"], tmp_path, model_cache).finish()
    seconds = time.monotonic() - began
    expected = result(tmp_path / "whole", stage)

    moments = random.Random(0)
    kills = runs = 0
    while kills < KILLS[stage]:
        runs += 1
        run = tmp_path / f"killed-{runs}"
        while not (run / stage / "summary.json").exists():
            process = Forked(["run", path, f"--run-dir={run}", "--resume"], tmp_path, model_cache)
            time.sleep(moments.uniform(0.1, 0.5) * seconds)
            kills += process.kill() == -signal.SIGKILL
            if kills == KILLS[stage]:
                Forked(["run", path, f"--run-dir={run}", "--resume"], tmp_path, model_cache).finish()
        assert result(run, stage) == expected
    steps = [line["step"] for line in read_jsonl(tmp_path / "whole" / stage / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))

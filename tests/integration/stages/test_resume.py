"""Kill a run at any moment and resume it: the metrics and the weights are those of the run that was never killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forked import Forked
from tests.runs import read_jsonl, recipe, without_time, write_recipe

# A checkpoint at every step, and all that a checkpoint has to hold: dropout, a β that adapts, an order of prompts
# that runs over the end of a pass.
RECIPE = recipe(
    *("preferences", "reward", "ppo"),
    threads=1,
    preferences__judge="judge:score",
    reward__epochs=6,
    reward__batch_size=2,
    reward__learning_rate=1e-2,
    reward__adapter={"dropout": 0.2},
    ppo__reward=[{"adapter": "stage"}],
    ppo__steps=6,
    ppo__learning_rate=1e-2,
    ppo__samples_every=1,
    ppo__kl={"controller": "adaptive", "target": 0.1, "horizon": 50},
)
del RECIPE["reward"]["data"]
JUDGE = """
def score(prompts, responses):
    return [float(sum(map(ord, response)) % 97) for response in responses]
"""


def lines(stage: Path) -> int:
    path = stage / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def kill_when(process: Forked, moment: Callable[[], bool]) -> None:
    """SIGKILL as soon as the moment has come; it is an error for the process to end before."""
    process.wait_until(moment)
    assert process.kill() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_three_times(tmp_path: Path, model_cache: Path) -> None:
    (tmp_path / "judge.py").write_text(JUDGE)
    path = str(write_recipe(tmp_path, RECIPE))

    def start(*options: str) -> Forked:
        return Forked(["run", path, "--run-dir=killed", *options], tmp_path, model_cache)

    Forked(["run", path, "--run-dir=whole"], tmp_path, model_cache).finish()
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    # 1. in the middle of the reward stage, a metrics line on the disk whose checkpoint may be there or not
    kill_when(start(), lambda: lines(killed / "reward") >= 3)
    assert not (killed / "reward" / "summary.json").exists()
    # 2. in the middle of PPO, while a checkpoint is written
    checkpoints = killed / "ppo" / "checkpoints"
    kill_when(
        start("--resume"), lambda: any(checkpoints.glob(".step-000002.tmp*")) or (checkpoints / "step-000002").exists()
    )
    # 3. later, between a metrics line and its checkpoint or just after
    kill_when(start("--resume"), lambda: lines(killed / "ppo") >= 4)
    assert not (killed / "ppo" / "summary.json").exists()
    # The tail of a line that a kill left half written.
    with (killed / "ppo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    said = start("--resume").finish()
    assert "reward: finished before, left as it is" in said
    assert "ppo: continuing after step " in said

    assert (killed / "preferences" / "preferences.jsonl").read_bytes() == (
        whole / "preferences" / "preferences.jsonl"
    ).read_bytes()
    for role in ("reward/adapter", "ppo/adapter", "ppo/value"):
        for name in ("role.safetensors", "adapter_model.safetensors"):
            assert (killed / role / name).read_bytes() == (whole / role / name).read_bytes(), (role, name)
    for stage in ("reward", "ppo"):
        rows, expected = (list(map(without_time, read_jsonl(run / stage / "metrics.jsonl"))) for run in (killed, whole))
        assert [row["step"] for row in rows] == list(range(1, len(expected) + 1))
        assert rows == expected
        summaries = (json.loads((run / stage / "summary.json").read_text()) for run in (killed, whole))
        assert without_time(next(summaries)) == without_time(next(summaries))
    assert (killed / "ppo" / "samples.jsonl").read_bytes() == (whole / "ppo" / "samples.jsonl").read_bytes()
    assert len({row["beta"] for row in read_jsonl(whole / "ppo" / "metrics.jsonl")}) == 6

"""A run without a critic, by the command line: killed and resumed it is the run that was never killed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.forked import Forked
from tests.integration.stages.test_resume import kill_when, lines
from tests.runs import read_jsonl, recipe, without_time, write_recipe

SETTINGS = [
    *("threads=1", "ppo.advantage=rloo", "ppo.rollout.samples_per_prompt=4", "ppo.ratio=sequence"),
    *("ppo.loss_aggregation=sequence", "ppo.batch_size=4", "ppo.steps=6", "ppo.learning_rate=1e-2"),
]


def test_killed_and_resumed(tmp_path: Path, model_cache: Path) -> None:
    file = str(write_recipe(tmp_path, recipe("ppo")))

    def start(folder: str, *options: str) -> Forked:
        return Forked(["run", file, *SETTINGS, f"--run-dir={folder}", *options], tmp_path, model_cache)

    said = start("whole").finish()
    assert "explained_variance" not in said
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_when(start("killed"), lambda: lines(killed / "ppo") >= 3)
    assert not (killed / "ppo" / "summary.json").exists()
    assert "ppo: continuing after step " in start("killed", "--resume").finish()

    rows, wanted = (read_jsonl(run / "ppo" / "metrics.jsonl") for run in (killed, whole))
    assert [without_time(row) for row in rows] == [without_time(row) for row in wanted]
    assert not [key for row in rows for key in row if "value" in key or "explained" in key]
    states = [load_file(run / "ppo" / "adapter" / "role.safetensors") for run in (killed, whole)]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert any(tensor.any() for name, tensor in states[1].items() if name.endswith("lora_B"))
    for run in (killed, whole):
        assert not list(run.rglob("*value*"))
        for path in run.glob("ppo/checkpoints/*/state.safetensors"):
            assert not [name for name in load_file(path) if "value" in name]
    assert "Explained variance" not in (killed / "report.html").read_text()

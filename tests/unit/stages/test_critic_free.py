"""Runs without a critic: nothing of a value role is computed, kept or shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pe_rlhf.config import Recipe
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.report.run_page import write_report
from pe_rlhf.runs.export import export_role
from pe_rlhf.stages.pipeline import run_recipe
from tests.failures import raises
from tests.runs import Tree, read_jsonl
from tests.stage_support import byte_model, run, write_prompts

PROMPTS = [f"Prompt {i}:" for i in range(10)]


def recipe(folder: Path, advantage: str) -> Tree:
    model = byte_model(folder / "model", pad_is_eos=True, initializer_range=0.3, eos_token_id=list(range(0, 258, 12)))
    ppo = {
        "prompts": write_prompts(folder / "prompts.jsonl", PROMPTS),
        "reward": [{"function": "reward.scores:length"}],
        "rollout": {"max_new_tokens": 6, "samples_per_prompt": 2},
        "steps": 2,
        "batch_size": 3,
        "learning_rate": 1e-2,
        "checkpoint_every": 1,
        "advantage": advantage,
    }
    return {"model": str(model), "adapter": {"rank": 2, "alpha": 4}, "threads": 1, "ppo": ppo}


@pytest.mark.parametrize(("advantage", "init"), [("rloo", "lora"), ("group_mean", "lora_ga"), ("reinforce_pp", "lora")])
def test_the_policy_is_all_there_is(tmp_path: Path, advantage: str, init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "response_values", lambda *_: pytest.fail("there are no values to compute"))
    tree = recipe(tmp_path, advantage)
    tree["adapter"]["init"] = init
    summary = run(tree, tmp_path / "run")["ppo"]
    stage = tmp_path / "run" / "ppo"
    lines = read_jsonl(stage / "metrics.jsonl")
    assert not [key for line in lines for key in line if "value" in key or "explained" in key]
    assert ("groups_alike" in lines[0]) == (advantage != "reinforce_pp")
    assert lines[-1]["policy_grad_norm"] > 0
    assert not list((tmp_path / "run").rglob("*value*"))
    for checkpoint in stage.glob("checkpoints/*"):
        assert json.loads((checkpoint / "state.json").read_text())["specs"].keys() == {"policy"}
        assert not [name for name in load_file(checkpoint / "state.safetensors") if "value" in name]
    policy = load_file(stage / "adapter" / "role.safetensors")
    trained = sum(tensor.numel() for name, tensor in policy.items() if "initial" not in name)
    assert summary["trainable_parameters"] == trained
    page = write_report(tmp_path / "run").read_text()
    assert ("Groups that score alike" in page) == (advantage != "reinforce_pp")
    assert "Policy loss" in page
    assert not [title for title in ("Value loss", "Explained variance", "critic") if title in page]
    with raises("missing", key="value"):
        export_role(tmp_path / "run", "lora", tmp_path / "value", "value")
    with raises("missing", key="checkpoint"):
        export_role(tmp_path / "run", "lora", tmp_path / "value", "value", "newest")


def test_a_resumed_run_is_the_one_that_was_never_stopped(tmp_path: Path) -> None:
    tree = recipe(tmp_path, "rloo")
    tree["ppo"]["steps"] = 3
    run(tree, tmp_path / "run")
    stage = tmp_path / "run" / "ppo"
    whole = load_file(stage / "adapter" / "role.safetensors")
    (stage / "summary.json").unlink()
    for name in ("state.json", "state.safetensors"):
        (stage / "checkpoints" / "step-000003" / name).unlink()
    run_recipe(Recipe.model_validate(tree), tmp_path / "run", ["ppo"], "resume")
    again = load_file(stage / "adapter" / "role.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())

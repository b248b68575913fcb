"""The score of an ensemble: how its members are combined, what is missing, and PPO by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pe_rlhf.config import Recipe
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.runs.saved_roles import load_role, save_role
from pe_rlhf.scoring.weighted import make_scorer
from pe_rlhf.types import Sequences
from tests.failures import raises
from tests.runs import read_jsonl
from tests.stage_support import run, write_prompts
from tests.tiny import perturb
from tests.unit.stages.ensembles import recipe


def made(folder: Path, inits: tuple[str, ...] = ("lora", "pissa", "lora")) -> Path:
    """A run with an ensemble whose members are all different; the recipe in it says how many there are."""
    tree = recipe(folder, {"members": len(inits)})
    backbone = load_backbone(tree["model"])
    for number, init in enumerate(inits, 1):
        role, place = ("reward", "adapter") if number == 1 else (f"reward_{number}", f"adapter_{number}")
        backbone.add_adapter(role, rank=number + 1, alpha=4, init=init, seed=number)
        perturb(backbone, role, 0.05 * number)
        backbone.head(role).shift(0.1 * number)
        save_role(backbone, role, folder / "run" / "reward" / place)
    (folder / "run" / "recipe.yaml").write_text(json.dumps(Recipe.model_validate(tree).model_dump(mode="json")))
    return folder / "run"


def scored(run_dir: Path, folder: Path, combine: str, k: float = 0.5) -> tuple[list[float], dict[str, float]]:
    from pe_rlhf.config import RewardSource

    backbone = load_backbone(folder / "model")
    source = RewardSource.model_validate({"ensemble": str(run_dir), "combine": combine, "k": k})
    scorer, roles = make_scorer([source], backbone, folder, 1000)
    assert roles == (["reward"] if combine == "weight_average" else ["reward", "reward_2", "reward_3"])
    return scorer.score([], [], rows(), {}).tolist(), scorer.metrics


def rows() -> Sequences:
    return Sequences.pack([[40, 41], [50], [60, 61, 62]], [[42, 0], [51, 52, 53], [63]], 0)


def one_by_one(run_dir: Path, folder: Path) -> np.ndarray:
    """The scores _MB of each member, each sequence in a pass of its own."""
    backbone = load_backbone(folder / "model")
    found = []
    for number, place in enumerate(("adapter", "adapter_2", "adapter_3"), 1):
        load_role(backbone, f"reward_{number}", run_dir / "reward" / place)
        with backbone.role(f"reward_{number}"), torch.no_grad():
            ids = [[40, 41, 42, 0], [50, 51, 52, 53], [60, 61, 62, 63]]
            found.append([backbone(torch.tensor([row])).logits[0, 0].item() for row in ids])
    return np.array(found)


def test_scores_are_combined_as_the_recipe_says(tmp_path: Path) -> None:
    run_dir = made(tmp_path)
    scores_MB = one_by_one(run_dir, tmp_path)
    mean, std = scores_MB.mean(axis=0), scores_MB.std(axis=0)
    assert std.min() > 0.01
    for combine, expected in {
        "mean": mean,
        "mean_minus_std": mean - 0.5 * std,
        "worst": scores_MB.min(axis=0),
        "uwo": mean - 0.5 * std**2,
    }.items():
        found, metrics = scored(run_dir, tmp_path, combine)
        assert found == pytest.approx(expected.tolist(), abs=1e-5)
        assert metrics == {"source_ensemble_disagreement": pytest.approx(std.mean(), abs=1e-5)}


def test_the_average_of_weights_is_one_adapter_of_the_mean_change(tmp_path: Path) -> None:
    """Against dense weights: W0 plus the mean of the members' ΔW, of inits with and without B0, of other ranks."""
    run_dir = made(tmp_path)
    backbone = load_backbone(tmp_path / "model")
    for number, place in enumerate(("adapter", "adapter_2", "adapter_3"), 1):
        load_role(backbone, f"reward_{number}", run_dir / "reward" / place)
    modules = backbone.adapter_spec("reward_1").modules
    plain = load_backbone(tmp_path / "model")
    with torch.no_grad():
        for name in modules:
            layers: Any = backbone.model.get_submodule(name).adapters
            delta = torch.stack(
                [layers[f"reward_{k}"].delta_weight(backbone.base_weight(name)) for k in (1, 2, 3)]
            ).mean(dim=0)
            plain.model.get_parameter(f"{name}.weight").add_(delta)
        head = torch.stack([backbone.head(f"reward_{k}").weight for k in (1, 2, 3)]).mean(dim=0).flatten()
        decoder = plain.model.get_decoder()
        expected = [
            float(decoder(torch.tensor([ids])).last_hidden_state[0, -1] @ head) + 0.2  # shifts 0.1, 0.2, 0.3
            for ids in ([40, 41, 42, 0], [50, 51, 52, 53], [60, 61, 62, 63])
        ]
    found, metrics = scored(run_dir, tmp_path, "weight_average")
    assert found == pytest.approx(expected, abs=1e-4)
    assert metrics == {}


def test_a_member_that_is_missing(tmp_path: Path) -> None:
    run_dir = made(tmp_path)
    folder = run_dir / "reward" / "adapter_2"
    shutil.move(folder, tmp_path / "away")
    with raises("missing", key="ppo.reward.ensemble", file=folder):
        scored(run_dir, tmp_path, "mean")
    # Also before anything is loaded.
    tree = recipe(tmp_path, None)
    tree["ppo"] = {"prompts": write_prompts(tmp_path / "p.jsonl", ["a", "b"]), "reward": [{"ensemble": str(run_dir)}]}
    tree["ppo"]["batch_size"] = 2
    del tree["reward"]
    with raises("missing", key="ppo.reward.ensemble", file=folder):
        run(tree, tmp_path / "other")


def test_one_adapter_is_no_ensemble(tmp_path: Path) -> None:
    run_dir = made(tmp_path, ("lora",))
    with raises("missing", key="ppo.reward.ensemble", file=run_dir):
        scored(run_dir, tmp_path, "worst")


@pytest.mark.page
def test_ppo_by_an_ensemble(tmp_path: Path) -> None:
    tree = recipe(tmp_path, {"members": 2})
    tree["ppo"] = {
        "prompts": write_prompts(tmp_path / "p.jsonl", ["a", "b", "c"]),
        "reward": [{"ensemble": "reward", "combine": "mean_minus_std", "k": 0.1}],
        "rollout": {"max_new_tokens": 4},
        "steps": 2,
        "batch_size": 3,
    }
    run(tree, tmp_path / "run")
    lines = read_jsonl(tmp_path / "run" / "ppo" / "metrics.jsonl")
    assert all(line["source_ensemble_disagreement"] > 0 for line in lines)
    assert "Disagreement of ensemble" in (tmp_path / "run" / "report.html").read_text()

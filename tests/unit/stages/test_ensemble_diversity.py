"""The diversity term keeps the members of an ensemble apart: its value, its gradient, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pe_rlhf.adapters.lora.init_registry import INITS, register_init
from pe_rlhf.config import Recipe
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.optim.role_optimizer import RoleOptimizer
from pe_rlhf.stages.reward_members import groups_of, members_of
from tests.failures import raises
from tests.runs import read_jsonl
from tests.stage_support import run
from tests.unit.stages.ensembles import recipe, same, state


def spread(run_dir: Path, members: tuple[str, ...] = ("adapter", "adapter_2", "adapter_3")) -> float:
    """numpy's ‖A‖_*/‖A‖_F of the members' factors on disk, mean over layers."""
    states = [state(run_dir, member) for member in members]
    stacks = [np.concatenate([own[name].numpy() for own in states]) for name in states[0] if name.endswith("lora_A")]
    return float(np.mean([np.linalg.norm(A, "nuc") / np.linalg.norm(A) for A in stacks]))


def test_diversity_keeps_members_apart(tmp_path: Path) -> None:
    """Members that start alike: without the term their factors have about the rank of one."""
    apart = {"members": 3, "vary": ["bootstrap"]}
    for name, weight in {"without": None, "zero": 0.0, "with": 3.0}.items():
        run(recipe(tmp_path, apart if weight is None else apart | {"diversity": weight}), tmp_path / name)
    for member in ("adapter", "adapter_2", "adapter_3"):
        assert same(state(tmp_path / "without", member), state(tmp_path / "zero", member))
    lines = [read_jsonl(tmp_path / name / "reward" / "metrics.jsonl") for name in ("without", "zero", "with")]
    assert not any("ensemble_diversity" in line for line in [*lines[0], *lines[1]])
    found = json.loads((tmp_path / "with" / "reward" / "summary.json").read_text())["ensemble_diversity"]
    assert found == pytest.approx(spread(tmp_path / "with"), rel=1e-5)
    assert lines[2][-1]["ensemble_diversity"] == pytest.approx(found, rel=1e-5)
    assert spread(tmp_path / "with") > 1.05 * spread(tmp_path / "without")


def test_the_gradient_of_diversity_is_in_each_members_norm(tmp_path: Path) -> None:
    """With no other gradient, a member's norm is λ times that of its rows of the dense formula's gradient."""
    loaded = Recipe.model_validate(recipe(tmp_path, {"members": 3, "diversity": 0.7}, adapter={"rank": 2}))
    config = loaded.reward
    assert config is not None
    backbone = load_backbone(loaded.model)
    members = members_of(loaded, config, 10)
    for number, member in enumerate(members):
        backbone.add_adapter(member.role, rank=2, alpha=4, seed=number)
    optimizer = RoleOptimizer(groups_of(backbone, members, config), config.optimizer, 1)
    factors = {m.role: {n: v for n, v in backbone.role_state(m.role).items() if "lora_A" in n} for m in members}
    squares = dict.fromkeys(factors, 0.0)
    names = list(factors["reward"])
    for name in names:
        A = np.concatenate([own[name].numpy() for own in factors.values()]).astype(np.float64)
        U, values, V = np.linalg.svd(A, full_matrices=False)
        norm = np.linalg.norm(A)
        gradient = 0.7 * (U @ V / norm - values.sum() * A / norm**3) / len(names)
        for number, role in enumerate(factors):
            squares[role] += float((gradient[2 * number : 2 * number + 2] ** 2).sum())
    assert optimizer.step() == pytest.approx({role: square**0.5 for role, square in squares.items()}, rel=1e-4)


def test_members_whose_factors_a_are_not_trained(tmp_path: Path) -> None:
    if "test_frozen_a" not in INITS:
        register_init("test_frozen_a", frozen=("lora_A",))(INITS["lora"].function)
    apart = {"members": 2, "vary": ["init"], "inits": ["test_frozen_a"], "diversity": 0.1}
    with raises("conflict", key="reward.ensemble.diversity"):
        run(recipe(tmp_path, apart), tmp_path / "frozen")

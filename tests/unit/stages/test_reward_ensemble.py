"""Ensembles of reward adapters: how members differ, the run without one, and what is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from pe_rlhf.config import Recipe
from pe_rlhf.config.load import make_recipe
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.optim.role_optimizer import RoleOptimizer
from pe_rlhf.runs.saved_roles import load_role
from pe_rlhf.stages.pipeline import run_recipe
from pe_rlhf.stages.reward_members import ensemble_metrics, member_rows, members_of
from reward.calibration import expected_calibration_error
from reward.errors import Kind
from tests.failures import raises
from tests.runs import Tree, read_jsonl
from tests.stage_support import run
from tests.unit.stages.ensembles import recipe, same, state


@pytest.mark.page
def test_the_first_member_is_the_model_without_an_ensemble_and_the_others_are_reported(tmp_path: Path) -> None:
    vary = {"members": 3, "vary": ["seed", "init", "bootstrap"], "inits": ["pissa", "lora"]}
    run(recipe(tmp_path, None), tmp_path / "one")
    run(recipe(tmp_path, {"members": 1}), tmp_path / "of_one")
    found = run(recipe(tmp_path, vary), tmp_path / "three")["reward"]
    assert same(state(tmp_path / "one"), state(tmp_path / "of_one"))
    assert same(state(tmp_path / "one"), state(tmp_path / "three"))
    second, third = (state(tmp_path / "three", f"adapter_{k}") for k in (2, 3))
    assert any("initial_B_OR" in name for name in second)
    assert not same(state(tmp_path / "one"), third)

    # What is logged of the first is what is logged without an ensemble.
    lines = [read_jsonl(tmp_path / name / "reward" / "metrics.jsonl") for name in ("one", "three")]
    for one, three in zip(*lines, strict=True):
        assert {k: v for k, v in one.items() if "second" not in k} == {
            k: v for k, v in three.items() if k in one and "second" not in k
        }
    assert [(m["role"], m["init"], m["bootstrap"]) for m in found["members"]] == [
        ("reward", "lora", False),
        ("reward_2", "pissa", True),
        ("reward_3", "lora", True),
    ]

    # Accuracy and loss of each and of the mean, from the adapters on disk with each sequence by itself.
    backbone = load_backbone(tmp_path / "model")
    from pe_rlhf.config import RewardConfig
    from pe_rlhf.stages.context import StageContext
    from pe_rlhf.stages.reward_pairs import load_pairs

    tree = Recipe.model_validate(recipe(tmp_path, vary))
    context: StageContext[RewardConfig] = StageContext(tree, tmp_path / "three", "reward")
    _, held_out = load_pairs(context, context.config, backbone)
    margins = []
    for number, folder in enumerate(("adapter", "adapter_2", "adapter_3"), 1):
        role = "reward" if number == 1 else f"reward_{number}"
        load_role(backbone, role, tmp_path / "three" / "reward" / folder)
        with backbone.role(role), torch.no_grad():
            scores = [
                [backbone(torch.tensor([pair.prompt + side])).logits.item() for side in (pair.chosen, pair.rejected)]
                for pair in held_out.pairs
            ]
        margins.append([chosen - rejected for chosen, rejected in scores])
    margins_MN = np.array(margins)
    for own, member in zip(margins_MN, found["members"], strict=True):
        assert member["eval_accuracy"] == pytest.approx(np.mean(own > 0))
        assert member["eval_loss"] == pytest.approx(np.log1p(np.exp(-own)).mean(), abs=1e-3)
    mean_N = margins_MN.mean(axis=0)
    assert found["ensemble_eval_accuracy"] == pytest.approx(np.mean(mean_N > 0))
    assert found["ensemble_eval_loss"] == pytest.approx(np.log1p(np.exp(-mean_N)).mean(), abs=1e-3)
    assert found["ensemble_disagreement"] == pytest.approx(margins_MN.std(axis=0).mean(), rel=0.01)
    assert "mean of all" in (tmp_path / "three" / "report.html").read_text()


def test_what_members_say_apart_and_together_by_hand(tmp_path: Path) -> None:
    """Margins of three pairs; of the mean they are 2, −1 and 0, of which the last is a tie."""
    margins = [[1.0, -1.0, 0.0], [3.0, -1.0, 0.0]]
    assert ensemble_metrics(margins[:1]) == {}
    found = ensemble_metrics(margins)
    losses = [np.log1p(np.exp(-m)) for m in (2.0, -1.0, 0.0)]
    assert found["ensemble_eval_loss"] == pytest.approx(np.mean(losses))
    assert found["ensemble_eval_accuracy"] == pytest.approx(1.5 / 3)
    assert found["ensemble_disagreement"] == pytest.approx(1 / 3)  # a deviation of 1, 0 and 0
    assert found["eval_accuracy_2"] == pytest.approx(1.5 / 3)
    assert "eval_accuracy_1" not in found
    assert found["ensemble_eval_calibration_error"] == pytest.approx(expected_calibration_error([2.0, -1.0, 0.0]))

    loaded = Recipe.model_validate(recipe(tmp_path, {"members": 2, "vary": ["seed", "bootstrap"]}))
    assert loaded.reward is not None
    first, second = member_rows(members_of(loaded, loaded.reward, 5), [[1.0, -2.0, 0.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
    wilson = binomtest(4, 4).proportion_ci(method="wilson")
    assert (first["eval_accuracy"], second["eval_accuracy"]) == (2.5 / 4, 1.0)
    assert (second["eval_accuracy_low"], second["eval_accuracy_high"]) == pytest.approx((wilson.low, wilson.high))
    assert first["eval_loss"] == pytest.approx(np.mean([np.log1p(np.exp(-m)) for m in (1.0, -2.0, 0.0, 0.5)]))
    assert first["calibration_error"] == pytest.approx(expected_calibration_error([1.0, -2.0, 0.0, 0.5]))
    assert (first["seed"], first["bootstrap"], second["bootstrap"]) == (0, False, True)
    assert second["seed"] != 0


def test_what_members_differ_in(tmp_path: Path) -> None:
    def members(**ensemble: Any) -> list[Any]:
        loaded = Recipe.model_validate(recipe(tmp_path, ensemble))
        assert loaded.reward is not None
        return members_of(loaded, loaded.reward, 50)

    plain, *others = members(members=3, vary=["bootstrap"])
    assert sorted(plain.batch(0, 0, 50)) == list(range(50))
    drawn = [sorted(set(member.batch(0, 0, 50))) for member in others]
    assert all(20 < len(rows) < 40 for rows in drawn)  # 63 % of 50 in the mean
    assert drawn[0] != drawn[1]
    # The pairs that were drawn stay the same from epoch to epoch, in another order.
    assert sorted(others[0].batch(0, 0, 50)) == sorted(others[0].batch(1, 0, 50))
    assert others[0].batch(0, 0, 50) != others[0].batch(1, 0, 50)
    assert {member.seed for member in (plain, *others)} == {0}

    inits = [member.adapter.init for member in members(members=5, vary=["init"], inits=["pissa", "milora"])]
    assert inits == ["lora", "pissa", "milora", "pissa", "milora"]

    plain, *others = members(members=3, vary=["seed"])
    assert len({member.seed for member in (plain, *others)}) == 3
    assert sorted(others[0].batch(0, 0, 50)) == list(range(50))
    assert others[0].batch(0, 0, 50) != plain.batch(0, 0, 50)


def test_members_that_differ_in_their_pairs_only_start_alike(tmp_path: Path) -> None:
    tree = recipe(tmp_path, {"members": 2, "vary": ["bootstrap"]}, learning_rate=1e-30)
    run(tree, tmp_path / "run")
    first, second = state(tmp_path / "run"), state(tmp_path / "run", "adapter_2")
    factors = [name for name in first if name.endswith("lora_A")]
    assert factors
    assert all(torch.equal(first[name], second[name]) for name in factors)


def test_an_ensemble_that_is_stopped_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = recipe(tmp_path, {"members": 2, "vary": ["seed", "bootstrap"], "diversity": 0.1})
    run(tree, tmp_path / "whole")
    step = RoleOptimizer.step

    def failing(self: RoleOptimizer, *again: Any) -> dict[str, float]:
        if self.steps == 3:
            raise KeyboardInterrupt
        return step(self, *again)

    with monkeypatch.context() as patch:
        patch.setattr(RoleOptimizer, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tree, tmp_path / "stopped")
    run_recipe(Recipe.model_validate(tree), tmp_path / "stopped", ["reward"], "resume")
    for member in ("adapter", "adapter_2"):
        assert same(state(tmp_path / "whole", member), state(tmp_path / "stopped", member))


@pytest.mark.parametrize(
    ("changes", "kind", "key"),
    [
        ({"reward": {"ensemble": {"members": 0}}}, "invalid", "reward.ensemble.members"),
        ({"reward": {"ensemble": {"vary": []}}}, "missing", "reward.ensemble.vary"),
        ({"reward": {"ensemble": {"vary": ["init"]}}}, "missing", "reward.ensemble.inits"),
        ({"reward": {"ensemble": {"inits": ["lora"]}}}, "conflict", "reward.ensemble.inits"),
        ({"reward": {"ensemble": {"diversity": -1}}}, "invalid", "reward.ensemble.diversity"),
        ({"reward": {"ensemble": {"members": 1, "diversity": 1}}}, "conflict", "reward.ensemble.diversity"),
        (
            {"reward": {"adapter": {"kind": "miss"}, "ensemble": {"diversity": 1}}},
            "conflict",
            "reward.ensemble.diversity",
        ),
        ({"tuning": "full", "reward": {"ensemble": {}}}, "conflict", "reward.ensemble"),
        ({"ppo": {"prompts": "p", "reward": [{"ensemble": "reward"}]}}, "missing", "ppo.reward"),
        (
            {"ppo": {"prompts": "p", "reward": [{"adapter": "stage", "combine": "worst"}]}},
            "conflict",
            "ppo.reward.0.combine",
        ),
        ({"ppo": {"prompts": "p", "reward": [{"ensemble": "x", "adapter": "y"}]}}, "conflict", "ppo.reward.0"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, changes: Tree, kind: Kind, key: str) -> None:
    tree = {"name": "a", **recipe(tmp_path, None)}
    tree |= {name: tree.get(name, {}) | value if isinstance(value, dict) else value for name, value in changes.items()}
    with raises(kind, key=key):
        make_recipe(tree, tmp_path / "recipe.yaml")


def test_an_init_that_there_is_not(tmp_path: Path) -> None:
    with raises("unknown"):
        run(recipe(tmp_path, {"members": 2, "vary": ["init"], "inits": ["nothing"]}), tmp_path / "run")

"""Ensembles of reward adapters: how members differ, the run without one, what is reported, and PPO by an ensemble."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pe_rlhf.adapters.lora.init_registry import INITS, register_init
from pe_rlhf.config import Recipe
from pe_rlhf.config.load import make_recipe
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.optim.role_optimizer import RoleOptimizer
from pe_rlhf.runs.saved_roles import load_role, save_role
from pe_rlhf.scoring.weighted import make_scorer
from pe_rlhf.stages.pipeline import run_recipe
from pe_rlhf.stages.reward_members import groups_of, members_of
from pe_rlhf.types import Sequences
from reward.errors import Kind
from tests.failures import raises
from tests.runs import Tree, read_jsonl, write_jsonl
from tests.stage_support import byte_model, run, write_prompts
from tests.tiny import perturb


def recipe(folder: Path, ensemble: Tree | None, **settings: Any) -> Tree:
    rows = [{"prompt": f"Prompt {i}:", "chosen": " a" * (i % 5 + 1), "rejected": f" z{i}"} for i in range(24)]
    reward = {
        "data": str(write_jsonl(folder / "pairs.jsonl", rows)),
        "learning_rate": 1e-2,
        "batch_size": 8,
        "eval_share": 0.3,
        "epochs": 2,
        "checkpoint_every": 1,
        **settings,
    }
    if ensemble is not None:
        reward["ensemble"] = ensemble
    return {
        "model": str(byte_model(folder / "model", pad_is_eos=True, initializer_range=0.1)),
        "adapter": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "threads": 1,
        "reward": reward,
    }


def state(run_dir: Path, member: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(run_dir / "reward" / member / "role.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


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

    # Accuracy and loss of each and of the mean, from the adapters on disk with each sequence alone.
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


# ---- in PPO ----------------------------------------------------------------------------------------------------------


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


def alone(run_dir: Path, folder: Path) -> np.ndarray:
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
    scores_MB = alone(run_dir, tmp_path)
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

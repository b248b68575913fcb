"""Mixtures of several tasks' policies: against dense sums, to the bit where one task is all, as PEFT loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from pe_rlhf.adapters.kinds.stacked import parts_of, stacked
from pe_rlhf.adapters.layer import LowRankFactors
from pe_rlhf.config import Recipe
from pe_rlhf.config.load import save_recipe
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.runs.export import export_role
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.saved_roles import find_role, save_role
from pe_rlhf.runs.task_mixture import Parts, Weight, mixed_policy, mixture
from reward.errors import Kind
from tests.failures import raises
from tests.runs import Tree
from tests.stage_support import byte_model
from tests.tiny import IDS_BT, perturb

NAMES = ["a", "b", "c"]
SETTINGS: list[Tree] = [{"init": "pissa", "rank": 2, "alpha": 4}, {"rank": 3, "alpha": 5}, {"rank": 1, "alpha": 2}]


def logits(backbone: Backbone, role: str) -> Tensor:
    with torch.no_grad(), backbone.role(role):
        return backbone(IDS_BT % 250).logits


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three separate policies, of other ranks, scales and inits."""
    folder = tmp_path_factory.mktemp("mix")
    model = byte_model(folder / "model", pad_is_eos=True, initializer_range=0.2)
    tree: Tree = {
        "model": str(model),
        "ppo": {"prompts": "p.jsonl", "reward": [{"function": "reward.scores:length"}]},
        "tasks": [{"name": name} for name in NAMES],
        "continual": {"method": "separate"},
    }
    recipe, files = Recipe.model_validate(tree), RunFiles(folder / "run")
    for number, (name, settings) in enumerate(zip(NAMES, SETTINGS, strict=True)):
        backbone = load_backbone(model)
        backbone.add_adapter("policy", seed=number, **settings)
        perturb(backbone, "policy", 0.05)
        stage = files.task(name).stage("ppo")
        stage.folder.mkdir(parents=True)
        save_recipe(recipe.task_recipe(number), files.task(name).recipe)
        save_role(backbone, "policy", stage.role("policy").folder)
    save_recipe(recipe, files.recipe)
    return files.folder


def recipe_of(run_dir: Path) -> Recipe:
    tree: Tree = {
        "model": str(run_dir.parent / "model"),
        "ppo": {"prompts": "p.jsonl", "reward": [{"function": "reward.scores:length"}]},
        "tasks": [{"name": name} for name in NAMES],
    }
    return Recipe.model_validate(tree | {"continual": {"method": "separate"}})


def own(run_dir: Path, name: str) -> Backbone:
    found = find_role(RunFiles(run_dir).task(name).folder, "policy")
    return found.load("policy", dtype="float32", device="cpu")[0]


def changes(backbone: Backbone) -> dict[str, Tensor]:
    found = {
        name: layer.delta_weight(backbone.base_weight(name)) for name, layer in backbone.role_layers("policy").items()
    }
    return {name: delta.double() for name, delta in found.items() if delta is not None}


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -2.0, 0.0), (0.25, 1.0, 3.0)])
def test_a_mixture_is_the_weighted_sum_of_the_tasks_changes(run_dir: Path, weights: tuple[float, ...]) -> None:
    found = changes(mixed_policy(recipe_of(run_dir), run_dir, dict(zip(NAMES, weights, strict=True))))
    each = [changes(own(run_dir, name)) for name in NAMES]
    for name, delta in found.items():
        wanted = torch.stack([weight * one[name] for weight, one in zip(weights, each, strict=True)]).sum(dim=0)
        torch.testing.assert_close(delta, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_task_is_its_own_policy_to_the_bit(run_dir: Path, name: str) -> None:
    mixed = mixed_policy(recipe_of(run_dir), run_dir, {name: 1})
    assert torch.equal(logits(mixed, "policy"), logits(own(run_dir, name), "policy"))


def test_equal_weights_of_the_parts_are_the_weight_of_the_task(run_dir: Path) -> None:
    recipe = recipe_of(run_dir)
    one = mixed_policy(recipe, run_dir, {"a": 0.5, "b": 0.25})
    other = mixed_policy(recipe, run_dir, {"a": [0.5, 0.5], "b": [0.25, 0.25, 0.25], "c": [0.0]})
    by_layer = mixed_policy(recipe, run_dir, {"a": {"": 0.5}, "b": {"layers.0": 0.25, "layers.1": [0.25] * 3}})
    for each in (other, by_layer):
        assert torch.equal(logits(each, "policy"), logits(one, "policy"))


def test_a_pattern_that_fits_no_layer_is_refused(run_dir: Path) -> None:
    recipe = recipe_of(run_dir)
    with raises("unknown", key="--mix"):
        mixed_policy(recipe, run_dir, {"a": {"layers.7": 0.5}})
    with raises("invalid", key="--mix"):
        mixed_policy(recipe, run_dir, {"a": {"[": 0.5}})


def test_parts_and_layers_have_weights_of_their_own(run_dir: Path) -> None:
    recipe, whole = recipe_of(run_dir), own(run_dir, "b")
    found = changes(mixed_policy(recipe, run_dir, {"b": {"layers.1": [2.0, 0.0, 1.0]}}))
    for name, layer in whole.role_layers("policy").items():
        part = parts_of(layer)[0]
        kept = part.B_OR.double() @ torch.diag(torch.tensor([2.0, 0.0, 1.0]).double()) @ part.A_RI.double()
        wanted = part.scale * kept if "layers.1" in name else torch.zeros_like(kept)
        torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=1e-5)


def test_an_export_is_a_plain_lora_that_peft_loads(run_dir: Path, tmp_path: Path) -> None:
    weights: Mapping[str, Weight] = {"a": 1.0, "c": 0.5}
    export_role(run_dir, "lora", tmp_path / "lora", mix=weights)
    plain = AutoModelForCausalLM.from_pretrained(run_dir.parent / "model")
    loaded = PeftModel.from_pretrained(plain, tmp_path / "lora")
    assert loaded.peft_config["default"].r == 2 * 2 + 1  # type: ignore[union-attr]  # PiSSA's difference has two factors
    with torch.no_grad():
        found = loaded(IDS_BT % 250).logits
    torch.testing.assert_close(
        found, logits(mixed_policy(recipe_of(run_dir), run_dir, weights), "policy"), atol=1e-5, rtol=1e-5
    )
    export_role(run_dir, "merged", tmp_path / "merged", mix=weights)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS_BT % 250).logits
    torch.testing.assert_close(merged, found, atol=1e-5, rtol=1e-5)
    # Without weights: the policy of the last task, here and for whatever else takes a run.
    export_role(run_dir, "lora", tmp_path / "last")
    assert find_role(run_dir).folder == RunFiles(run_dir).task("c").role("policy").folder


def test_the_parts_of_one_policy_are_mixed_by_their_order() -> None:
    """Three tasks on top of each other, as they are trained with `adapter: new`."""
    backbone = load_backbone("random:tiny-llama")
    backbone.add_adapter("policy", rank=2, alpha=4)
    perturb(backbone, "policy", 0.05)
    single = [backbone.role_layers("policy")]
    for number in (1, 2):
        backbone.copy_role("policy", f"before_{number}")
        backbone.add_adapter(f"new_{number}", seed=number, rank=number, alpha=3)
        made = stacked(
            backbone.adapter_spec(f"new_{number}"),
            backbone.role_state(f"new_{number}"),
            backbone.role_layers(f"before_{number}"),
        )
        backbone.load_role("policy", *made)
        perturb(backbone, "policy", 0.05)
    whole = backbone.role_layers("policy")
    parts: Parts = {name: parts_of(layer) for name, layer in whole.items()}
    backbone.load_role("mixed", *mixture(parts, [1.0, 1.0, 1.0], NAMES))
    torch.testing.assert_close(logits(backbone, "mixed"), logits(backbone, "policy"), atol=1e-5, rtol=1e-5)
    backbone.load_role("first", *mixture(parts, [1.0, 0.0, 0.0], NAMES))
    for name, layer in backbone.role_layers("first").items():
        factors, wanted = layer.lora_factors(), single[0][name].lora_factors()
        assert isinstance(factors, LowRankFactors)
        assert wanted is not None
        assert factors.B_OR.shape[1] == 2


@pytest.mark.parametrize(
    ("weights", "kind", "key"),
    [
        ({}, "empty", "--mix"),
        ({"a": 0}, "empty", "--mix"),
        ({"d": 1}, "unknown", "d"),
        ({"a": "much"}, "invalid", "a"),
        ({"a": float("nan")}, "invalid", "a"),
        ({"b": [1, 2]}, "invalid", "b"),
        ({"b": []}, "invalid", "b"),
    ],
    ids=str,
)
def test_what_is_no_weight_is_refused(
    run_dir: Path, tmp_path: Path, weights: Mapping[str, Weight], kind: Kind, key: str
) -> None:
    with raises(kind, key=key):
        export_role(run_dir, "lora", tmp_path / "out", mix=weights)
    assert not (tmp_path / "out").exists()


def test_one_adapter_for_all_tasks_has_no_parts(run_dir: Path) -> None:
    tree = recipe_of(run_dir).model_dump(exclude_unset=True) | {"continual": {"method": "sequential"}}
    with raises("conflict", key="continual.adapter"):
        mixed_policy(Recipe.model_validate(tree), run_dir, {"a": 1})
    with raises("conflict", key="--mix"):
        export_role(RunFiles(run_dir).task("a").folder, "lora", mix={"a": 1})

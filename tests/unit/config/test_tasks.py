"""A recipe with tasks: what each task's own recipe is, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pe_rlhf.config import Recipe
from pe_rlhf.config.load import load_recipe, save_recipe
from pe_rlhf.data.rows import SOURCE
from pe_rlhf.stages.joint_task import joint_recipe
from reward.errors import Kind
from tests.failures import raises
from tests.runs import Tree, write_jsonl, write_recipe

TREE: Tree = {
    "name": "three",
    "model": "random:tiny-llama",
    "adapter": {"kind": "dora", "rank": 4, "alpha": 8},
    "reward": {"data": "pairs.jsonl", "epochs": 2},
    "ppo": {"prompts": "prompts.jsonl", "steps": 3, "kl": {"beta": 0.1}, "rollout": {"max_new_tokens": 4}},
    "evaluate": {"prompts": "held_out.jsonl", "judge": "length"},
    "tasks": [
        {"name": "first"},
        {"name": "second", "reward": {"epochs": 5}, "ppo": {"kl": {"form": "convex"}, "adapter": {"rank": 2}}},
        {"name": "third", "ppo": {"prompts": "others.jsonl"}, "evaluate": {"judge": {"kind": "length"}}},
    ],
    "continual": {"method": "ewc", "strength": 3.0, "anchor": "previous"},
}


def tree(**changes: Any) -> Tree:
    return copy.deepcopy({**TREE, **changes})


def test_a_task_is_the_recipe_with_its_own_keys() -> None:
    written = tree()
    del written["tasks"], written["continual"]
    written["reward"]["epochs"] = 5
    written["ppo"]["kl"]["form"] = "convex"
    written["ppo"]["adapter"] = {"rank": 2}
    continual = {"method": "ewc", "strength": 3.0, "anchor": "previous", "previous": "first"}
    wanted = Recipe.model_validate({**written, "name": "three-second", "continual": continual})
    assert Recipe.model_validate(tree()).task_recipe(1) == wanted
    assert wanted.adapter_for("ppo").model_dump()["alpha"] == 8


def test_the_first_task_has_nothing_before_it_and_the_others_the_one_before() -> None:
    recipe = Recipe.model_validate(tree())
    chain = [recipe.task_recipe(number).continual for number in range(3)]
    assert [each and (each.previous, each.anchor, each.strength) for each in chain] == [
        (None, "base", 3.0),
        ("first", "previous", 3.0),
        ("second", "previous", 3.0),
    ]
    after = Recipe.model_validate(tree(continual={"previous": "earlier", "anchor": "previous"})).task_recipe(0)
    assert after.continual is not None
    assert (after.continual.previous, after.continual.anchor) == ("earlier", "previous")


def test_separate_tasks_go_on_from_nothing() -> None:
    recipe = Recipe.model_validate(tree(continual={"method": "separate"}))
    found = [recipe.task_recipe(number).continual for number in range(3)]
    assert all(each is not None and (each.previous, each.method) == (None, "sequential") for each in found)


def test_a_saved_recipe_is_the_same_and_data_is_found_beside_the_recipe(tmp_path: Path) -> None:
    for name in ("prompts", "held_out", "others", "pairs"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "a"}])
    loaded = load_recipe(write_recipe(tmp_path, tree()))
    third = loaded.task_recipe(2)
    assert third.ppo is not None
    assert third.ppo.prompts.path == str(tmp_path / "others.jsonl")
    save_recipe(loaded, tmp_path / "saved.yaml")
    again = load_recipe(tmp_path / "saved.yaml")
    assert again == loaded
    assert again.task_recipe(1) == loaded.task_recipe(1)
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["ppo"] is None


def test_an_override_is_of_all_tasks(tmp_path: Path) -> None:
    loaded = load_recipe(write_recipe(tmp_path, tree()), ["ppo.steps=7", "continual.strength=1"])
    assert [task.ppo and task.ppo.steps for task in loaded.tasks or []] == [7, 7, 7]


def routed(route: Tree, **changes: Any) -> Tree:
    continual = {"method": "joint", "route": route}
    return {"adapter": {"rank": 4, "alpha": 8}, "continual": continual, **changes}


def test_a_route_gives_the_joint_policy_a_part_for_each_task(tmp_path: Path) -> None:
    values = {"first": {"first": [1, 2, 3, 4], "third": [0, 0, 0, 1]}}
    recipe = Recipe.model_validate(tree(**routed({"weights": "subspace", "values": values, "shared_rank": 3})))
    joint = joint_recipe(recipe, tmp_path)
    adapter = joint.adapter_for("ppo").model_dump(exclude_unset=True)
    assert adapter.pop("values") == values
    wanted = {"kind": "routed", "rank": 4, "alpha": 8, "weights": "subspace", "shared_rank": 3}
    assert adapter == wanted | {"tasks": ["first", "second", "third"]}
    assert joint.adapter.kind == "lora"  # of all other stages


def test_a_joint_policy_is_asked_no_judge_while_it_trains(tmp_path: Path) -> None:
    whole = tree(continual={"method": "joint"}, adapter={"rank": 2})
    whole["ppo"]["eval_every"] = 1
    joint = joint_recipe(Recipe.model_validate(whole), tmp_path)
    assert joint.ppo is not None
    assert joint.ppo.eval_every is None


def test_each_task_s_rewards_score_its_own_prompts(tmp_path: Path) -> None:
    """Under names of their own, and the reward model that a task trains is found where the task lies."""
    first: list[Tree] = [{"adapter": "stage", "weight": 0.5}, {"adapter": "other", "where": {"topic": "a"}}]
    second: list[Tree] = [{"ensemble": "reward", "name": "both"}, {"function": "reward.scores:length"}]
    tasks = [{"name": "1st-task", "ppo": {"reward": first, "steps": 1}}, {"name": "second", "ppo": {"reward": second}}]
    reward = {"data": "pairs.jsonl", "ensemble": {"members": 2}}
    changes: Tree = {"continual": {"method": "joint"}, "adapter": {"rank": 2}, "tasks": tasks, "reward": reward}
    recipe = Recipe.model_validate(tree(**changes))
    joint = joint_recipe(recipe, tmp_path)
    assert joint.ppo is not None
    one, two = (str(tmp_path / "tasks" / name / "reward") for name in ("1st-task", "second"))
    assert [source.model_dump(exclude_unset=True) for source in joint.ppo.reward] == [
        {"adapter": one, "weight": 0.5, "where": {SOURCE: "1st-task"}, "name": "task_1st_task_adapter"},
        {"adapter": "other", "where": {"topic": "a", SOURCE: "1st-task"}, "name": "task_1st_task_adapter_2"},
        {"ensemble": two, "where": {SOURCE: "second"}, "name": "second_both"},
        {"function": "reward.scores:length", "where": {SOURCE: "second"}, "name": "second_length"},
    ]
    assert joint.ppo.steps == 1 + 3
    assert joint.ppo.prompts.mix is not None
    assert [(part.label, part.weight) for part in joint.ppo.prompts.mix] == [("1st-task", 1.0), ("second", 3.0)]


@pytest.mark.parametrize(
    ("changes", "kind", "key"),
    [
        (routed({}, tasks=[{"name": "a"}]), "conflict", "continual.route"),
        (routed({}, tasks=None), "conflict", "continual.method"),
        (routed({}, adapter={"kind": "dora", "rank": 2}), "conflict", "adapter.kind"),
        (routed({"weight": "task"}), "unknown", "continual.route.weight"),
        (routed({"weights": "expert"}), "invalid", "continual.route.weights"),
        (routed({"shared_rank": -1}), "invalid", "continual.route.shared_rank"),
        (routed({"weights": "learned", "values": {"first": {"first": 1}}}), "conflict", "continual.route.values"),
        (routed({"values": {"fourth": {"first": 1}}}), "unknown", "continual.route.values"),
        (routed({"values": {"first": {"fourth": 1}}}), "unknown", "continual.route.values"),
        (routed({"values": {"first": {"first": [1]}}}), "invalid", "continual.route.values.first.first"),
        (routed({"values": {"first": {"first": 0}}}), "empty", "continual.route.values.first"),
        (
            routed({"weights": "subspace", "values": {"first": {"first": [1, 2]}}}),
            "invalid",
            "continual.route.values.first.first",
        ),
        ({"continual": {"method": "sequential", "route": {}}}, "conflict", "continual.route"),
        ({"tasks": []}, "empty", "tasks"),
        ({"tasks": [{"name": "a"}, {"name": "A"}]}, "conflict", "tasks.1.name"),
        ({"tasks": [{"name": "../a"}]}, "invalid", "tasks.0.name"),
        ({"tasks": [{"name": "a", "pppo": {}}]}, "unknown", "tasks.0.pppo"),
        ({"tasks": [{"name": "a", "ppo": {"stepss": 1}}]}, "unknown", "tasks.0.ppo.stepss"),
        ({"tasks": [{"name": "a", "ppo": {"steps": 0}}]}, "invalid", "tasks.0.ppo.steps"),
        ({"tasks": ["a"]}, "invalid", "tasks.0"),
        ({"tasks": [{"name": "a"}], "ppo": None}, "missing", "tasks.0.ppo"),
        ({"tasks": [{"name": "a", "ppo": {"eval_every": 1}}], "evaluate": None}, "missing", "tasks.0.ppo.eval_every"),
        ({"tuning": "full"}, "conflict", "tasks"),
        ({"sft": {"data": "x.jsonl"}}, "conflict", "sft"),
        ({"tasks": None, "continual": {"method": "separate"}}, "conflict", "continual.method"),
        ({"tasks": None, "continual": {"anchor": "previous"}}, "missing", "continual.anchor"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: Tree, kind: Kind, key: str) -> None:
    path = write_recipe(tmp_path, tree(**changes))
    with raises(kind, key=key):
        load_recipe(path)

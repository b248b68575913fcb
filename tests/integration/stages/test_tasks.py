"""Runs of several tasks: each an ordinary run, every policy on every task, stopped and resumed, run anew."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pe_rlhf.config import Recipe
from pe_rlhf.config.load import load_recipe
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.saved_roles import find_role
from pe_rlhf.stages.joint_task import joint_recipe
from pe_rlhf.stages.tasks import run_tasks, task_recipes
from reward.errors import InputError
from tests.failures import raises
from tests.runs import Tree, read_jsonl
from tests.stage_support import byte_model, run, write_prompts

NAMES = ["long", "short", "vowels"]


def tree(folder: Path, **continual: object) -> Tree:
    if not (folder / "model").is_dir():
        byte_model(folder / "model", pad_is_eos=True, initializer_range=0.3, eos_token_id=list(range(0, 258, 12)))
    prompts = write_prompts(folder / "prompts.jsonl", [f"Prompt {i}:" for i in range(6)])
    sampling = {"max_new_tokens": 6}
    functions = ["reward.scores:length", "reward.scores:brevity", "tests.integration.stages.test_tasks:vowels"]
    return {
        "model": str(folder / "model"),
        "adapter": {"rank": 2, "alpha": 4},
        "threads": 1,
        "ppo": {
            "prompts": prompts,
            "rollout": {**sampling, "samples_per_prompt": 2},
            "steps": 2,
            "batch_size": 3,
            "learning_rate": 1e-2,
            "checkpoint_every": 1,
            "advantage": "rloo",
        },
        "evaluate": {"prompts": prompts, "sampling": sampling},
        "tasks": [
            {"name": name, "ppo": {"reward": [{"function": function}]}, "evaluate": {"judge": function}}
            for name, function in zip(NAMES, functions, strict=True)
        ],
        "continual": {"method": "olora", "anchor": "previous", **continual},
    }


def vowels(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in response)) for response in responses]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    run_tasks(Recipe.model_validate(tree(folder)), folder / "whole", None, None)
    return folder / "whole"


def test_the_tasks_are_ordinary_runs_one_on_top_of_the_other(whole: Path) -> None:
    """The same three runs by hand, each named the one before."""
    recipe = Recipe.model_validate(tree(whole.parent))
    for own, name in zip(task_recipes(recipe, whole), NAMES, strict=True):
        run(own.model_dump(exclude_unset=True), whole.parent / "by-hand" / name)
    for name in NAMES:
        one, other = (
            load_file(RunFiles(folder / name).role("policy").tensors)
            for folder in (whole / "tasks", whole.parent / "by-hand")
        )
        assert all((one[key] == other[key]).all() for key in one)
        assert one.keys() == other.keys()
    seeds = [load_recipe(RunFiles(whole).task(name).recipe).seed for name in NAMES]
    assert seeds[0] == 0
    assert len(set(seeds)) == 3


def test_every_policy_is_measured_on_every_task(whole: Path) -> None:
    """The third policy on the first task: what `evaluate` of an ordinary run finds with that task's judge."""
    files = RunFiles(whole)
    with files.task_table.open(newline="") as file:
        rows = {(row["after"], row["on"]): row for row in csv.DictReader(file)}
    assert set(rows) == {(after, on) for after in NAMES for on in NAMES}
    assert json.loads(files.summary.read_text())["average"]["value"] == pytest.approx(
        sum(float(rows["vowels", on]["win_rate"]) for on in NAMES) / 3
    )
    by_hand = whole.parent / "on-first"
    shutil.copytree(files.task("vowels").stage("ppo").folder, by_hand / "ppo")
    first = next(task_recipes(Recipe.model_validate(tree(whole.parent)), whole))
    found = run(first.model_dump(exclude_unset=True), by_hand, "evaluate")["evaluate"]
    assert float(rows["vowels", "long"]["win_rate"]) == pytest.approx(found["win_rate"])
    assert float(rows["vowels", "long"]["kl"]) == pytest.approx(found["kl"])
    assert len(read_jsonl(files.task("vowels").on_task("long").stage("evaluate").samples)) == 6
    page = files.report.read_text()
    assert all(f"on {name}" in page for name in NAMES)
    assert "tasks learnt" in page  # the axis of its plot


def test_a_run_that_was_cut_goes_on_and_what_is_finished_stays(whole: Path) -> None:
    """Cut in the second task's PPO, after its first checkpoint."""
    cut = whole.parent / "cut"
    recipe = Recipe.model_validate(tree(whole.parent))
    run_tasks(recipe, cut, None, "short")
    files = RunFiles(cut)
    shutil.rmtree(files.task("short").on_tasks)
    stage = files.task("short").stage("ppo")
    stage.summary.unlink()
    shutil.rmtree(stage.checkpoint(2).folder)
    shutil.rmtree(stage.role("policy").folder)
    shutil.rmtree(files.task("short").stage("evaluate").folder)
    kept = files.task("long").stage("ppo").summary.stat().st_mtime_ns
    table = run_tasks(recipe, cut, None, None, "resume")
    assert files.task("long").stage("ppo").summary.stat().st_mtime_ns == kept
    assert table.as_json() == json.loads(RunFiles(whole).summary.read_text())
    for name in NAMES:
        one, other = (load_file(RunFiles(each).task(name).role("policy").tensors) for each in (whole, cut))
        assert all((one[key] == other[key]).all() for key in one)


def test_a_task_and_all_after_it_are_run_anew(whole: Path) -> None:
    again = whole.parent / "again"
    shutil.copytree(whole, again)
    changed = tree(whole.parent)
    changed["tasks"][1]["ppo"]["steps"] = 1
    recipe = Recipe.model_validate(changed)
    with raises("changed"):
        run_tasks(recipe, again, None, None, "resume")
    rewritten = tree(whole.parent)
    rewritten["tasks"][0]["ppo"]["steps"] = 1
    before = RunFiles(again).recipe.read_text()
    with raises("changed", key="ppo.steps"):  # of the first task, which is kept
        run_tasks(Recipe.model_validate(rewritten), again, "short", "short", "anew")
    assert RunFiles(again).recipe.read_text() == before
    run_tasks(recipe, again, "short", "short", "anew")
    assert sorted(path.name for path in (again / "tasks").iterdir()) == ["long", "short", "short.old-1", "vowels.old-1"]
    assert len(read_jsonl(RunFiles(again).task("short").stage("ppo").metrics)) == 1


def test_separate_policies_are_measured_each(whole: Path) -> None:
    recipe = Recipe.model_validate(tree(whole.parent) | {"continual": {"method": "separate"}})
    table = run_tasks(recipe, whole.parent / "separate", None, None)
    own = [table.cell(name, name) for name in NAMES]
    assert table.average is not None
    assert table.average.value == pytest.approx(sum(cell.win_rate for cell in own if cell) / 3)
    first, other = (load_file(RunFiles(whole.parent / "separate").task(n).role("policy").tensors) for n in NAMES[:2])
    assert first.keys() == other.keys()  # nothing is below it


def test_what_would_mix_runs_is_refused(whole: Path) -> None:
    recipe = Recipe.model_validate(tree(whole.parent))
    with raises("exists"):
        run_tasks(recipe, whole, None, None)
    with raises("unfinished", key="long"):
        run_tasks(recipe, whole.parent / "later", "short", None, "anew")
    with raises("unknown", key="no-task"):
        run_tasks(recipe, whole.parent / "later", "no-task", None)
    with raises("conflict"):
        run_tasks(recipe, whole.parent / "later", "vowels", "long")
    assert not (whole.parent / "later").exists()


def test_a_mistake_in_the_last_task_is_told_before_the_first_one_runs(whole: Path) -> None:
    wrong = tree(whole.parent)
    wrong["tasks"][2]["ppo"]["reward"] = [{"function": "reward.scores:no_such"}]
    with pytest.raises(InputError):
        run_tasks(Recipe.model_validate(wrong), whole.parent / "wrong", None, None)
    assert not (whole.parent / "wrong").exists()


def test_all_tasks_at_once_are_one_ppo_on_all_prompts(whole: Path) -> None:
    """Every prompt is scored by its own task's reward only."""
    recipe = Recipe.model_validate(tree(whole.parent) | {"continual": {"method": "joint"}})
    run_dir = whole.parent / "joint"
    table = run_tasks(recipe, run_dir, None, None)
    assert [(cell.after, cell.on) for cell in table.cells] == [("joint", name) for name in NAMES]
    assert table.average is not None
    assert table.average.value == pytest.approx(sum(cell.win_rate for cell in table.cells) / 3)
    assert "tasks learnt" not in RunFiles(run_dir).report.read_text()
    stage = RunFiles(run_dir).task("joint").stage("ppo")
    lines = read_jsonl(stage.metrics)
    assert len(lines) == 6
    ppo = load_recipe(stage.recipe).ppo
    assert ppo is not None
    assert [source.where for source in ppo.reward] == [{"source": name} for name in NAMES]
    assert [part.label for part in ppo.prompts.mix or []] == NAMES
    named = {f"source_{task}_{what}" for task, what in zip(NAMES, ("length", "brevity", "vowels"), strict=True)}
    assert named <= {key for line in lines for key in line}
    assert run_tasks(recipe, run_dir, None, None, "resume").as_json() == table.as_json()
    assert find_role(run_dir, "policy").folder == stage.role("policy").folder


@pytest.mark.parametrize("route", [None, {"weights": "learned", "shared_rank": 1}])
def test_tasks_at_once_are_the_same_from_a_resolved_recipe(tmp_path: Path, route: Tree | None) -> None:
    """As a comparison writes it for its runs: with all keys, also those that only a whole data set has."""
    recipe = Recipe.model_validate(tree(tmp_path) | {"continual": {"method": "joint", "route": route}})
    resolved = Recipe.model_validate(recipe.model_dump(mode="json"))
    assert joint_recipe(resolved, tmp_path).model_dump() == joint_recipe(recipe, tmp_path).model_dump()


@pytest.mark.parametrize("whose", ["all", "the second"])
@pytest.mark.parametrize(
    ("adapter", "key"),
    [({"init": "pissa"}, "adapter.init"), ({"init": "lora_ga"}, "adapter.init"), ({"kind": "dora"}, "adapter.kind")],
)
def test_an_adapter_that_the_second_task_cannot_have_is_told_before_the_first_one(
    whole: Path, adapter: Tree, key: str, whose: str
) -> None:
    unfit = tree(whole.parent)
    (unfit if whose == "all" else unfit["tasks"][1]["ppo"])["adapter"] = adapter
    recipe = Recipe.model_validate(unfit)
    with raises("conflict", key=key):
        run_tasks(recipe, whole.parent / "unfit", None, None)
    assert not (whole.parent / "unfit").exists()

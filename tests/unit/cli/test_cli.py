"""`pe-rlhf run`: its help, and what it refuses in arguments, recipes and overrides."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from pe_rlhf.model.names import resolve_model
from reward.errors import Failure, Kind
from tests.paths import ROOT
from tests.runs import Outcome, contents, recipe, write_recipe

Cli = Callable[..., Outcome]
Fails = Callable[..., Failure]
ALL = ("preferences", "reward", "ppo", "evaluate")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["preferences", "PPO", "win-rate", "run", "Run the stages of a recipe"]),
        ([], ["Usage", "run"]),
        (
            ["run", "--help"],
            [
                *("recipe", "overrides", "--run-dir", "--from", "--to", "--resume", "--dry-run", "--debug"),
                *("quickstart", "ppo.kl.beta=0.1", "runs/<recipe's name>", "report.html"),
            ],
        ),
    ],
)
def test_help_names_what_there_is(cli: Cli, arguments: list[str], words: list[str]) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 0
    said = re.sub(r"[\s│]+", " ", outcome.out)
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["run"], "recipe"),
        (["run", "smoke", "--bogus"], "--bogus"),
        (["rnu"], "'run'"),
        (["run", "smoke", "--to"], "--to"),
    ],
)
def test_wrong_arguments_are_named(cli: Cli, arguments: list[str], culprit: str) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert isinstance(outcome.error, typer.TyperException)
    assert [culprit in line for line in outcome.errors] == [True]


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("modle", "model"),
        ("backbone__dtyp", "dtype"),
        ("preferences__sampling__max_tokens", "max_new_tokens"),
        ("reward__adapter__alfa", "alpha"),
        ("ppo__kl__betta", "beta"),
        ("ppo__reward__0__functoin", "function"),
        ("evaluate__sampling__temprature", "temperature"),
        ("tracking__zzz", "wandb_project"),  # near none: all that there are
    ],
)
def test_an_unknown_key_names_the_nearest(fails: Fails, tmp_path: Path, key: str, nearest: str) -> None:
    path = write_recipe(tmp_path, recipe(*ALL, **{key: 1}))
    failure = fails("run", path)
    assert (failure.kind, failure.key, failure.file) == ("unknown", key.replace("__", "."), str(path))
    assert nearest in str(failure)


def test_an_unknown_key_comes_before_the_one_that_is_missing_because_of_it(fails: Fails, tmp_path: Path) -> None:
    tree = recipe("ppo")
    tree["ppo"]["prompt"] = tree["ppo"].pop("prompts")
    path = write_recipe(tmp_path, tree)
    failure = fails("run", path)
    assert str(failure) == f"{path}: unknown key 'ppo.prompt'; did you mean 'prompts'? (and 1 more mistake)"
    path = write_recipe(tmp_path, recipe("ppo", ppo__prompts={"pth": "prompts.jsonl"}))
    assert fails("run", path).fields()["key"] == "ppo.prompts.pth"


@pytest.mark.parametrize(
    ("changed", "value", "kind", "key"),
    [
        ("ppo__steps", "many", "invalid", "ppo.steps"),
        ("ppo__steps", 1.5, "invalid", "ppo.steps"),
        ("ppo__steps", True, "invalid", "ppo.steps"),
        ("ppo__steps", 0, "invalid", "ppo.steps"),
        ("ppo__kl", "high", "invalid", "ppo.kl"),
        ("ppo__prompts", 3, "invalid", "ppo.prompts"),
        ("adapter__targets", 3, "invalid", "adapter.targets"),
        ("adapter", None, "invalid", "adapter"),
        ("backbone__dtype", "fp32", "invalid", "backbone.dtype"),
        ("ppo__kl__beta", 1.5, "conflict", "ppo.kl.beta"),
        ("ppo__kl__beta", float("nan"), "invalid", "ppo.kl.beta"),
        ("ppo__optimizer__betas", [1.5, 0.9], "invalid", "ppo.optimizer.betas.0"),
        ("ppo__optimizer__betas", [0.9], "missing", "ppo.optimizer.betas.1"),
        ("seed", -1, "invalid", "seed"),
        ("name", "..", "invalid", "name"),
        ("reward__max_length", 1, "invalid", "reward.max_length"),
        ("ppo__minibatches", 5, "conflict", "ppo.minibatches"),
        ("ppo__missing_eos_replaces", True, "missing", "ppo.missing_eos_replaces"),
        ("ppo__reward", [], "invalid", "ppo.reward"),
        ("ppo__reward__0__model", "x", "conflict", "ppo.reward.0"),
        ("ppo", None, "missing", "evaluate"),
        ("reward", None, "missing", "ppo.reward"),
    ],
)
def test_a_wrong_value(fails: Fails, tmp_path: Path, changed: str, value: Any, kind: Kind, key: str) -> None:
    tree = recipe(*ALL, **{changed: value})
    if changed == "reward":
        del tree["ppo"]["reward"]
    path = write_recipe(tmp_path, tree)
    failure = fails("run", path)
    assert (failure.kind, failure.key, failure.file) == (kind, key, str(path))


def test_a_penalty_may_weigh_more_than_the_reward(cli: Cli, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo", ppo__kl={"form": "penalty", "beta": 1.5}))
    assert cli("run", path, "--dry-run").code == 0


@pytest.mark.parametrize(
    ("text", "kind", "key", "line"),
    [
        ("# only a remark\n", "empty", None, None),
        ("- model: x\n", "invalid", None, None),
        ("model\n", "invalid", None, None),
        ("model: x\nppo:\n  steps: [1\n", "unreadable", None, 4),
        ("model: x\nppo: steps: 3\n", "unreadable", None, 2),
        ("model: x\n\tseed: 1\n", "unreadable", None, 2),
        ("model: !!python/object:os.system x\n", "unreadable", None, 1),
        ("model: \0\n", "unreadable", None, None),
        ("1: x\n", "invalid", "1", None),
        ("model: random:tiny-llama\n", "missing", None, None),
        ("ppo: {prompts: prompts.jsonl}\n", "missing", "model", None),
        ("model: x\nreward: {}\n", "missing", "reward.data", None),
        ("model: x\nppo: {steps: 1}\nseed: 1\nppo: {steps: 2}\n", "unreadable", None, 4),  # twice
        ("model: x\n? [a]\n: 1\n", "unreadable", None, 2),
        (b"model: \xff\xfe", "unreadable", None, None),
    ],
)
def test_a_file_that_is_no_recipe(
    fails: Fails, tmp_path: Path, text: str | bytes, kind: Kind, key: str | None, line: int | None
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    failure = fails("run", path)
    assert (failure.kind, failure.key, failure.file, failure.row) == (kind, key, str(path), line)


@pytest.mark.parametrize(("name", "nearest"), [("smok", "smoke"), ("smoke.yaml", "smoke"), ("zzz", None)])
def test_a_recipe_that_is_not_there(fails: Fails, name: str, nearest: str | None) -> None:
    failure = fails("run", name)
    assert (failure.kind, failure.key, failure.file) == ("missing", "RECIPE", name)
    assert (failure.fix is None) == (nearest is None)
    assert ", ".join(sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))) in str(failure)


@pytest.mark.parametrize(
    ("override", "kind", "key"),
    [
        ("steps", "invalid", "steps"),
        ("=3", "invalid", "=3"),
        ("ppo..steps=1", "invalid", "ppo..steps=1"),
        ("ppo.steps=[1", "unreadable", "ppo.steps"),
        ("ppo.steps.x=1", "unknown", "ppo.steps.x"),
        ("ppo.reward.0.weight=2", "unknown", "ppo.reward.0.weight"),
        ("ppo.prompts.splt=x", "unknown", "ppo.prompts.splt"),
        ("ppo.steps=", "invalid", "ppo.steps"),
        ("ppo.stps=1", "unknown", "ppo.stps"),
    ],
)
def test_a_wrong_override(fails: Fails, tmp_path: Path, override: str, kind: Kind, key: str) -> None:
    failure = fails("run", write_recipe(tmp_path, recipe("ppo")), override)
    assert (failure.kind, failure.key) == (kind, key)


def test_a_mistake_in_an_override_is_told_as_the_overrides(fails: Fails, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo", ppo__steps=0))
    failure = fails("run", path, "ppo.steps=3", "ppo.stps=1", "seed=1")
    assert str(failure) == "override 'ppo.stps=1': unknown key 'ppo.stps'; did you mean 'steps'?"
    assert str(fails("run", path, "seed=1")).startswith(f"{path}: ppo.steps: ")


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_the_plan_and_leaves_nothing(
    cli: Cli, tmp_path: Path, model_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, recipe(*ALL))
    before, models = contents(tmp_path), contents(model_cache)
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path / "no-models"))
    outcome = cli("run", path, "--dry-run", "--from", "reward", "--to", "ppo")
    assert outcome.code == 0
    plan = "recipe: reward → ppo with random:tiny-llama, into runs/recipe; the recipe is valid"
    first, *stages = outcome.out.splitlines()
    assert first == plan
    # The memory of each phase is planned only where the model is at hand. In an empty cache, none is made.
    assert [line.split(":")[0].strip() for line in stages] == ["reward", "ppo", "memory"]
    assert contents(tmp_path) == before
    assert contents(model_cache) == models


def test_a_dry_run_plans_the_memory_of_a_model_that_is_at_hand(cli: Cli, tmp_path: Path, model_cache: Path) -> None:
    resolve_model("random:tiny-llama")
    path, models = write_recipe(tmp_path, recipe(*ALL)), contents(model_cache)
    outcome = cli("run", path, "--dry-run", "--from", "reward", "--to", "ppo")
    phases = [line.split(":")[0].split("(")[0].strip() for line in outcome.out.splitlines()[3:]]
    assert phases == ["memory", "reward update", "ppo sampling", "ppo update"]
    assert not (tmp_path / "runs").exists()
    assert contents(model_cache) == models


@pytest.mark.parametrize(
    "options",
    [
        ["--from", "evaluate"],
        ["--to", "pppo"],
        ["--from", "ppo", "--to", "reward"],
        ["--from", "ppo", "--run-dir", "out"],  # the reward stage before it has not run
    ],
)
def test_stages_that_cannot_be_run(fails: Fails, tmp_path: Path, options: list[str]) -> None:
    failure = fails("run", write_recipe(tmp_path, recipe("reward", "ppo")), *options)
    assert options[1] in str(failure)


def test_the_judge_may_be_the_reward_model_that_the_run_is_to_make(cli: Cli, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("reward", "ppo", "evaluate", evaluate__judge="reward_model:./out"))
    assert cli("run", path, "--run-dir", "out", "--dry-run").code == 0
    assert cli("run", path, "--run-dir", "out").code == 0

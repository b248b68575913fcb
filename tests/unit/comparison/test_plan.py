"""What a comparison is to run, by its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.comparison.plan import Plan, load_plan
from pe_rlhf.config import LoRAConfig, Recipe
from pe_rlhf.config.load import save_recipe
from reward.errors import InputError, Kind
from tests.failures import raises
from tests.paths import ROOT
from tests.runs import recipe, write_recipe

ALL = ("preferences", "reward", "ppo", "evaluate")
OWN = [{"adapter": "stage"}]


def plan_of(folder: Path, compare: dict[str, Any], *stages: str, **changes: Any) -> Plan:
    tree = recipe(*(stages or ALL), ppo__reward=OWN, **changes) | {"name": "inits", "compare": compare}
    tree.get("reward", {}).pop("data", None) if "preferences" in tree else None
    return load_plan(write_recipe(folder, tree), folder / "out", [])


def init_of(recipe: Recipe) -> str:
    assert isinstance(recipe.adapter, LoRAConfig)
    return recipe.adapter.init


def test_a_grid_is_every_combination_and_arms_are_added(tmp_path: Path) -> None:
    grid = {"init": ["lora", "pissa"], "rank": [2, 4]}
    arms = [{"name": "whole", "tuning": "full", "lr": 1e-5}, {"ppo": {"kl": {"beta": 0.2}}}]
    plan = plan_of(tmp_path, {"grid": grid, "arms": arms, "seeds": [5]})
    assert {arm.name: arm.changes for arm in plan.arms} == {
        "init=lora, rank=2": {"adapter.init": "lora", "adapter.rank": 2},
        "init=lora, rank=4": {"adapter.init": "lora", "adapter.rank": 4},
        "init=pissa, rank=2": {"adapter.init": "pissa", "adapter.rank": 2},
        "init=pissa, rank=4": {"adapter.init": "pissa", "adapter.rank": 4},
        "whole": {"tuning": "full", "ppo.learning_rate": 1e-5},
        "ppo={'kl': {'beta': 0.2}}": {"ppo.kl.beta": 0.2},
    }
    (run,) = plan.runs(plan.arms[4]).values()
    assert (run.recipe.tuning, run.recipe.seed) == ("full", 5)
    assert run.recipe.ppo is not None
    assert run.recipe.ppo.learning_rate == 1e-5
    assert run.folder == tmp_path / "out" / "runs" / "whole" / "seed-5"
    (last,) = plan.runs(plan.arms[5]).values()
    assert last.recipe.ppo is not None
    assert (last.recipe.ppo.kl.beta, last.recipe.ppo.steps) == (0.2, 2)  # the rest of the section stays


def test_kinds_are_an_axis_each_with_the_keys_that_it_has(tmp_path: Path) -> None:
    tree = {"adapter": {"rank": 4, "alpha": 8, "init": "pissa", "last_layers": 1}}
    plan = plan_of(tmp_path, {"grid": {"kind": ["lora", "dora", "adalora", "miss", "shira"]}, "seeds": [1]}, **tree)
    found = {arm.name: plan.runs(arm)[1].recipe.adapter.model_dump() for arm in plan.arms}
    assert list(found) == ["lora", "dora", "adalora", "miss", "shira"]
    assert all(settings["kind"] == kind and settings["last_layers"] == 1 for kind, settings in found.items())
    assert found["dora"]["init"] == "pissa"
    assert (found["adalora"]["rank"], found["adalora"]["alpha"], found["miss"]["rank"]) == (4, 8, 4)
    assert "rank" not in found["shira"]


def test_one_axis_names_its_arms_by_their_values(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"grid": {"lr": [1e-4, 0.001]}})
    assert [arm.name for arm in plan.arms] == ["0.0001", "0.001"]


def test_the_seed_may_be_an_axis(tmp_path: Path) -> None:
    assert plan_of(tmp_path, {"grid": {"init": ["lora"], "seed": [7, 9]}}).config.seeds == [7, 9]


def test_the_reward_model_is_trained_once_with_the_recipes_own_settings(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"grid": {"init": ["pissa"]}, "seeds": [1, 2]}, seed=3)
    assert plan.shared is not None
    assert plan.shared.recipe.stages == ["preferences", "reward"]
    assert (init_of(plan.shared.recipe), plan.shared.recipe.seed) == ("lora", 3)
    for seed, run in plan.runs(plan.arms[0]).items():
        assert run.recipe.stages == ["ppo", "evaluate"]
        assert (init_of(run.recipe), run.recipe.seed) == ("pissa", seed)
        assert run.recipe.ppo is not None
        assert [source.adapter for source in run.recipe.ppo.reward] == [str(tmp_path / "out" / "shared" / "reward")]


def test_other_reward_sources_stay_as_they_are(tmp_path: Path) -> None:
    sources = [{"adapter": "stage", "weight": 0.5}, {"function": "reward.scores:length", "weight": 0.1}]
    tree = recipe("reward", "ppo", ppo__reward=sources) | {"compare": {"grid": {"rank": [2]}}}
    plan = load_plan(write_recipe(tmp_path, tree), tmp_path / "out", [])
    (run, *_) = plan.runs(plan.arms[0]).values()
    assert run.recipe.ppo is not None
    assert [(s.adapter, s.function, s.weight) for s in run.recipe.ppo.reward] == [
        (str(tmp_path / "out" / "shared" / "reward"), None, 0.5),
        (None, "reward.scores:length", 0.1),
    ]


def test_only_the_pairs_are_shared(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"arms": [{"name": "full", "tuning": "full"}], "share": "preferences", "seeds": [1]})
    assert plan.shared is not None
    assert plan.shared.recipe.stages == ["preferences"]
    (run,) = plan.runs(plan.arms[0]).values()
    assert run.recipe.stages == ["reward", "ppo", "evaluate"]
    assert run.recipe.reward is not None
    assert run.recipe.reward.data is not None
    assert run.recipe.reward.data.path == str(tmp_path / "out" / "shared" / "preferences" / "preferences.jsonl")
    assert run.recipe.ppo is not None
    assert [source.adapter for source in run.recipe.ppo.reward] == ["stage"]


def test_nothing_is_shared(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"grid": {"rank": [2]}, "share": "nothing"})
    assert plan.shared is None
    assert all(run.recipe.stages == list(ALL) for run in plan.runs(plan.arms[0]).values())


def test_trials_have_their_own_seed_and_stop_after_ppo(tmp_path: Path) -> None:
    tune = {"lr_factors": [0.5, 1, 4], "seed": 0}
    changes: dict[str, Any] = {"ppo__learning_rate": 1e-3, "ppo__value_learning_rate": 2e-3, "ppo__eval_every": 1}
    plan = plan_of(tmp_path, {"grid": {"init": ["lora", "pissa"]}, "tune": tune}, **changes)
    for arm in plan.arms:
        trials = plan.trials(arm)
        rates = {
            factor: (run.recipe.ppo.learning_rate, run.recipe.ppo.value_learning_rate, run.recipe.ppo.eval_every)
            for factor, run in trials.items()
            if run.recipe.ppo is not None
        }
        assert rates == {0.5: (5e-4, 1e-3, None), 1: (1e-3, 2e-3, None), 4: (4e-3, 8e-3, None)}
        assert all(run.recipe.stages == ["ppo"] and run.recipe.seed == 0 for run in trials.values())
        assert plan.trial_base(arm) is None
    runs = plan.runs(plan.arms[1], 4)
    assert [run.recipe.ppo.learning_rate for run in runs.values() if run.recipe.ppo] == [4e-3] * 3
    assert [run.recipe.ppo.eval_every for run in runs.values() if run.recipe.ppo] == [1] * 3


def test_trials_of_an_arm_with_its_own_reward_model_share_one(tmp_path: Path) -> None:
    tune = {"lr_factors": [0.5, 1], "seed": 0}
    compare = {"arms": [{"name": "full", "tuning": "full"}], "share": "preferences", "tune": tune}
    plan = plan_of(tmp_path, compare)
    base = plan.trial_base(plan.arms[0])
    assert base is not None
    assert (base.recipe.stages, base.recipe.tuning, base.recipe.seed) == (["reward"], "full", 0)
    sources = [run.recipe.ppo.reward[0].adapter for run in plan.trials(plan.arms[0]).values() if run.recipe.ppo]
    assert sources == [str(base.folder / "reward")] * 2


@pytest.mark.parametrize(
    ("compare", "kind", "key"),
    [
        ({"grid": {"init": ["lora", "lora"]}}, "conflict", "compare.arms"),
        ({"arms": [{"name": "a"}, {"name": "b", "rank": 2}]}, "conflict", "compare.arms"),
        ({"grid": {"rnak": [1, 2]}}, "unknown", "rnak"),
        ({"grid": {"model.size": [1]}}, "unknown", "model.size"),
        ({"grid": {"rank": []}}, "empty", "compare.grid.rank"),
        ({"seeds": [1]}, "missing", "compare.grid"),
        ({"grid": {"rank": [1]}, "seeds": [1, 1]}, "invalid", "compare.seeds"),
        (
            {"grid": {"rank": [1]}, "seeds": [1], "tune": {"lr_factors": [1], "seed": 1}},
            "conflict",
            "compare.tune.seed",
        ),
        ({"grid": {"rank": [1]}, "tune": {"lr_factors": [1, -1]}}, "invalid", "compare.tune.lr_factors"),
        ({"grid": {"rank": [1], "seed": [1]}, "seeds": [2]}, "conflict", "compare.grid.seed"),
        ({"grid": {"rank": [-1]}}, "invalid", "adapter.rank"),
        ({"gird": {"rank": [1]}}, "unknown", "compare.gird"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(
    tmp_path: Path, compare: dict[str, Any], kind: Kind, key: str
) -> None:
    with raises(kind, key=key):
        plan_of(tmp_path, compare)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("share", "key", "reason"),
    [
        ("reward", "reward.learning_rate", "compare.share: reward"),
        ("preferences", "preferences.min_margin", "compare.share: preferences"),
        ("nothing", "seed", "seeds are compare.seeds"),
    ],
)
def test_a_setting_that_has_no_effect_is_refused(tmp_path: Path, share: str, key: str, reason: str) -> None:
    arms = [{"name": "a", "init": "pissa", key: 1}, {"name": "b"}]
    with pytest.raises(InputError) as caught:
        plan_of(tmp_path, {"arms": arms, "share": share})
    assert str(caught.value) == f"compare: arm 'a' sets {key}, which has no effect on it ({reason})"


def test_a_recipe_without_arms_or_without_ppo(tmp_path: Path) -> None:
    with raises("missing", key="compare"):
        load_plan(write_recipe(tmp_path, recipe("ppo")), None, [])
    tree = recipe("reward") | {"compare": {"grid": {"rank": [1]}}}
    with raises("missing", key="ppo"):
        load_plan(write_recipe(tmp_path, tree), None, [])


def test_an_sft_model_is_made_once(tmp_path: Path) -> None:
    tree = recipe("ppo") | {"sft": {"data": "pairs.jsonl"}, "compare": {"grid": {"rank": [2]}}}
    plan = load_plan(write_recipe(tmp_path, tree), tmp_path / "out", [])
    assert plan.shared is not None
    assert plan.shared.recipe.stages == ["sft"]
    (run, *_) = plan.runs(plan.arms[0]).values()
    assert run.recipe.model == str(tmp_path / "out" / "shared" / "sft" / "model")
    assert run.recipe.stages == ["ppo"]


def test_every_init_is_an_arm_and_plain_lora_is_the_first(tmp_path: Path) -> None:
    names = [arm.name for arm in plan_of(tmp_path, {"grid": {"init": "all"}}).arms]
    files = {path.stem for path in (ROOT / "pe_rlhf" / "adapters" / "lora" / "inits").glob("*.py")}
    assert names[0] == "lora"
    assert set(names) == files - {"__init__", "svd", "loftq"} | {"rlmo"}  # loftq is for quantised bases only


def test_all_runs_print_one_day(tmp_path: Path) -> None:
    """Also where a comparison is gone on with on another day."""
    plan = plan_of(tmp_path, {"grid": {"adapter.init": ["lora", "pissa"]}, "seeds": [0]})
    days = {run.recipe.date for arm in plan.arms for run in plan.runs(arm).values()}
    assert len(days) == 1
    assert days != {None}
    run = next(iter(plan.runs(plan.arms[0]).values()))
    run.folder.mkdir(parents=True)
    save_recipe(run.recipe.model_copy(update={"date": "2020-01-02"}), run.folder / "recipe.yaml")
    again = plan_of(tmp_path, {"grid": {"adapter.init": ["lora", "pissa"]}, "seeds": [0]})
    assert {run.recipe.date for arm in again.arms for run in again.runs(arm).values()} == {"2020-01-02"}

"""What `compare` reads of a run: its state, and whether it was made with the same recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.comparison.analysis import analyse, to_json
from pe_rlhf.comparison.collect import collect
from pe_rlhf.comparison.plan import PlannedRun, load_plan
from pe_rlhf.comparison.runner import RunState, refuse_changed, state_of
from pe_rlhf.comparison.trials import choose
from pe_rlhf.config.load import make_recipe, save_recipe
from reward.errors import InputError
from tests.runs import recipe, write_recipe


def planned(folder: Path, **changes: Any) -> PlannedRun:
    return PlannedRun("a run", folder / "run", make_recipe(recipe("ppo", **changes), folder / "recipe.yaml"))


def failure(folder: Path, text: str) -> RunState:
    (folder / "run").mkdir()
    (folder / "run" / "failure.json").write_text(text, encoding="utf-8")
    return state_of(planned(folder))


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ({"message": "too much", "kind": "kl_limit", "step": 3, "exit_code": 3}, "kl_limit"),
        ({"message": "too much", "exit_code": 3}, None),  # an older version
    ],
)
def test_a_failed_run_says_why(tmp_path: Path, written: dict[str, Any], kind: str | None) -> None:
    assert failure(tmp_path, json.dumps(written)) == RunState("failed", "too much", kind)


def test_a_run_without_a_readable_failure_has_not_finished(tmp_path: Path) -> None:
    assert state_of(planned(tmp_path)) == RunState("unfinished")
    assert failure(tmp_path, '{"message": "cu') == RunState("unfinished")


def test_a_run_of_another_recipe_is_refused_but_not_one_from_another_place(tmp_path: Path) -> None:
    here = planned(tmp_path, model="/home/a/models/small", ppo__reward=[{"adapter": "/home/a/out/shared/reward"}])
    there = planned(tmp_path, model="/data/small", ppo__reward=[{"adapter": "/data/b/out/shared/reward"}])
    here.folder.mkdir()
    save_recipe(there.recipe, here.folder / "recipe.yaml")
    refuse_changed([here])
    sources = [{"adapter": "/x/out/shared/reward"}]
    for changes in ({"ppo__epochs": 3}, {"model": "/data/large"}):
        with pytest.raises(InputError) as caught:
            refuse_changed([planned(tmp_path, **{"model": "/x/small", "ppo__reward": sources, **changes})])
        assert (caught.value.kind, caught.value.file) == ("changed", str(here.folder / "recipe.yaml"))


def test_what_is_read_from_disk_can_be_written_as_json(tmp_path: Path) -> None:
    tree = recipe("ppo") | {"compare": {"grid": {"rank": [2]}, "seeds": [1]}}
    plan = load_plan(write_recipe(tmp_path, tree), tmp_path / "out", [])
    (run,) = plan.runs(plan.arms[0]).values()
    stage = run.folder / "ppo"
    stage.mkdir(parents=True)
    (stage / "summary.json").write_text('{"steps": 2, "reward_last": 0.5}', encoding="utf-8")
    (stage / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "kl": 0.1}\n', encoding="utf-8")
    found = collect(plan, [choose(plan, arm) for arm in plan.arms])
    tree = to_json(analyse("test", plan.config, found))
    assert json.loads(json.dumps(tree))["runs"][0]["ppo"] == {"steps": 2, "reward_last": 0.5}

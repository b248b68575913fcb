"""Which keys of `ppo` go with which estimator of advantages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.config import PPOConfig, Recipe
from pe_rlhf.config.load import differences, load_recipe, save_recipe
from tests.failures import raises
from tests.runs import recipe, write_recipe


def load(folder: Path, *overrides: str, **changes: Any) -> Recipe:
    path = write_recipe(folder, recipe("ppo", ppo__rollout__samples_per_prompt=2, **changes))
    return load_recipe(path, list(overrides))


def ppo_of(loaded: Recipe) -> PPOConfig:
    assert loaded.ppo is not None
    return loaded.ppo


CRITICS = ("value_init=fresh", "value_learning_rate=1e-4", "value_clip_range=0.2", "lam=0.95")


@pytest.mark.parametrize(
    ("advantage", "setting"),
    [
        *[(name, setting) for name in ("rloo", "group_mean", "reinforce_pp") for setting in CRITICS],
        *[("rloo", "gamma=0.9"), ("group_mean", "gamma=1.0")],
        *[("gae", "group_std=true"), ("rloo", "group_std=false"), ("reinforce_pp", "group_std=true")],
    ],
)
def test_a_key_of_another_estimator_is_refused_whatever_its_value(tmp_path: Path, advantage: str, setting: str) -> None:
    with raises("conflict", key=f"ppo.{setting.partition('=')[0]}"):
        load(tmp_path, f"ppo.advantage={advantage}", f"ppo.{setting}")
    load(tmp_path, f"ppo.advantage={advantage}", f"ppo.{setting.partition('=')[0]}=null")


@pytest.mark.parametrize("advantage", ["gae", "rloo", "group_mean", "reinforce_pp"])
def test_a_recipe_that_was_saved_is_the_same_when_it_is_read(tmp_path: Path, advantage: str) -> None:
    loaded = load(tmp_path, f"ppo.advantage={advantage}")
    save_recipe(loaded, tmp_path / "saved.yaml")
    assert differences(load_recipe(tmp_path / "saved.yaml"), loaded) == {}
    assert ("value_clip_range" in (tmp_path / "saved.yaml").read_text()) == (advantage == "gae")


def test_defaults_follow_the_estimator(tmp_path: Path) -> None:
    whitens = {name: ppo_of(load(tmp_path, f"ppo.advantage={name}")).whiten_advantages for name in NAMES}
    assert whitens == {"gae": True, "rloo": False, "group_mean": False, "reinforce_pp": True}
    assert ppo_of(load(tmp_path, "ppo.advantage=rloo", "ppo.whiten_advantages=true")).whiten_advantages
    assert ppo_of(load(tmp_path)).advantage == "gae"


NAMES = ("gae", "rloo", "group_mean", "reinforce_pp")


def test_groups_of_one_are_refused(tmp_path: Path) -> None:
    for name in ("rloo", "group_mean"):
        with raises("missing", key="ppo.rollout.samples_per_prompt"):
            load(tmp_path, f"ppo.advantage={name}", "ppo.rollout.samples_per_prompt=1")
    one = ("ppo.rollout.samples_per_prompt=1", "ppo.batch_size=1", "ppo.minibatches=1")
    with raises("missing", key="ppo.batch_size"):
        load(tmp_path, "ppo.advantage=reinforce_pp", *one)
    load(tmp_path, *one)
    with raises("invalid", key="ppo.advantage"):
        load(tmp_path, "ppo.advantage=grpo")

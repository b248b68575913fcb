"""Which keys of `ppo.rollout` go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from pe_rlhf.config import RolloutConfig
from pe_rlhf.config.load import load_recipe, save_recipe
from reward.errors import Kind
from tests.failures import raises
from tests.runs import recipe, write_recipe


def rollout(folder: Path, *overrides: str) -> RolloutConfig:
    loaded = load_recipe(write_recipe(folder, recipe("ppo")), [f"ppo.rollout.{setting}" for setting in overrides])
    save_recipe(loaded, folder / "saved.yaml")
    for ppo in (loaded.ppo, load_recipe(folder / "saved.yaml").ppo):
        assert ppo is not None
    assert load_recipe(folder / "saved.yaml").ppo == loaded.ppo
    assert loaded.ppo is not None
    return loaded.ppo.rollout


def test_what_is_sampled_ahead_is_corrected_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    assert (rollout(tmp_path, "engine=vllm").correction, rollout(tmp_path, "engine=vllm").sleep) == ("none", True)
    ahead = rollout(tmp_path, "engine=vllm", "ahead=1")
    assert (ahead.correction, ahead.sleep) == ("truncated_is", False)
    assert rollout(tmp_path, "engine=vllm", "ahead=1", "correction=none").correction == "none"


@pytest.mark.parametrize(
    ("settings", "kind", "key"),
    [
        (["ahead=1"], "conflict", "ahead"),  # with engine: hf
        (["engine=vllm", "ahead=1", "sleep=true"], "conflict", "sleep"),
        (["engine=vllm", "ahead=2"], "invalid", "ahead"),
        (["engine=vllm", "ahead=-1"], "invalid", "ahead"),
    ],
)
def test_what_cannot_be_sampled_ahead(tmp_path: Path, settings: list[str], kind: Kind, key: str) -> None:
    with raises(kind, key=f"ppo.rollout.{key}"):
        rollout(tmp_path, *settings)

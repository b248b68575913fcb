"""What `pe-rlhf compare` does with a recipe: which settings differ, by which seeds, and how runs are judged."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pe_rlhf.config.adapter import INIT_OPTIONS, init_fits
from pe_rlhf.config.section import Positive, Section, Share, refusal

SHORT_KEYS = {
    "kind": "adapter.kind",
    "init": "adapter.init",
    "rank": "adapter.rank",
    "targets": "adapter.targets",
    "lr": "ppo.learning_rate",
    "beta": "ppo.kl.beta",
}


class TuneConfig(Section):
    """Learning-rate trials: the same number for each arm, with a seed that no reported run has."""

    lr_factors: list[float] = Field(min_length=1, description="factors on the arm's ppo.learning_rate, one trial each")
    seed: int = Field(default=0, ge=0, description="seed of all trials; must not be one of seeds")

    @model_validator(mode="after")
    def _positive_factors(self) -> TuneConfig:
        if any(factor <= 0 for factor in self.lr_factors) or len(set(self.lr_factors)) != len(self.lr_factors):
            raise refusal("lr_factors", "positive numbers, each once", "invalid")
        return self


class CollapseConfig(Section):
    """The limits beyond which a run counts as collapsed."""

    kl: float = Field(default=50.0, gt=0, description="collapsed above this KL to the anchor, nats per response")
    entropy_share: Share = Field(default=0.1, description="collapsed below this share of the first step's entropy")


class CompareConfig(Section):
    """Arms that differ in some keys, each run with every seed. Short keys: kind, init, rank, targets, lr, beta."""

    grid: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="key → list of values; every combination is an arm. `seed` here is the same as seeds; `init: all`"
        " is every init that needs no quantised base, lora first",
    )
    arms: list[dict[str, Any]] = Field(
        default_factory=list, description="further arms, each a mapping of keys to values, with an optional name"
    )
    seeds: list[int] = Field(
        default=[1, 2, 3], min_length=1, description="seeds of the reported runs; each arm runs with all of them"
    )
    tune: TuneConfig | None = Field(
        default=None, description="learning-rate trials before the runs; default: no trials"
    )
    share: Literal["reward", "preferences", "nothing"] = Field(
        default="reward",
        description="stages that run once for all arms, with the recipe's own settings and seed: up to the reward"
        " model, up to the preferences, or nothing",
    )
    target_reward: float | None = Field(
        default=None, description="report the time to this reward; default: the final reward of the first arm"
    )
    collapse: CollapseConfig = CollapseConfig()
    nodes: Positive = Field(default=8, description="--submit slurm: tasks of a job array that run at the same time")

    @model_validator(mode="before")
    @classmethod
    def _all_inits(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(grid := tree.get("grid"), dict) and grid.get("init") == "all":
            every = ["lora", *(name for name in sorted(INIT_OPTIONS) if name != "lora" and init_fits(name, "none"))]
            return {**tree, "grid": {key: every if key == "init" else values for key, values in grid.items()}}
        return tree

    @model_validator(mode="before")
    @classmethod
    def _seed_axis(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(grid := tree.get("grid"), dict) and "seed" in grid:
            if "seeds" in tree:
                raise refusal("grid.seed", "give the seeds in seeds or in grid.seed, not in both")
            rest = {key: values for key, values in grid.items() if key != "seed"}
            return {**tree, "grid": rest, "seeds": grid["seed"]}
        return tree

    @model_validator(mode="after")
    def _cross_checks(self) -> CompareConfig:
        if not self.grid and not self.arms:
            raise refusal("grid", "there are no arms: give grid, arms or both", "missing")
        if empty := [key for key, values in self.grid.items() if not values]:
            raise refusal(f"grid.{empty[0]}", "it has no values", "empty")
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise refusal("seeds", "whole numbers from 0 on, each once", "invalid")
        if self.tune and self.tune.seed in self.seeds:
            raise refusal("tune.seed", f"{self.tune.seed} is one of seeds; keep a seed of its own for the trials")
        return self

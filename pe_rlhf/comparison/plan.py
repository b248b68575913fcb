"""What a comparison has to run: what is done once for all arms, trials of learning rates, and a run per arm and seed.

Each is an ordinary recipe for an ordinary run directory. An arm's recipe is the base recipe with the arm's keys set.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from pe_rlhf.config import STAGES, CompareConfig, PPOConfig, Recipe
from pe_rlhf.config.compare import SHORT_KEYS
from pe_rlhf.config.load import load_recipe, make_recipe, read_tree, set_key
from pe_rlhf.config.recipe import inherited_adapter
from pe_rlhf.config.reward_source import OWN_STAGE
from pe_rlhf.runs.layout import ComparisonFiles, RunFiles
from reward.errors import InputError

Tree = dict[str, Any]

BEFORE_PPO = STAGES[: STAGES.index("ppo")]


@dataclass(frozen=True)
class Arm:
    """A name and what it changes: recipe key → value."""

    name: str
    changes: Tree

    @property
    def slug(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^\w.+=-]+", "-", self.name).strip("-.") or "arm"


@dataclass(frozen=True)
class PlannedRun:
    """A run of a recipe in a folder of its own."""

    name: str
    folder: Path
    recipe: Recipe


@dataclass(frozen=True)
class Plan:
    """A comparison as its recipe describes it, in the directory `root`."""

    path: Path
    root: Path
    tree: Tree
    base: Recipe
    config: CompareConfig
    arms: list[Arm]
    overrides: list[str]

    @cached_property
    def shared(self) -> PlannedRun | None:
        """The stages that are run once, with the base recipe as it is; None where there are none to share."""
        stages = {"reward": BEFORE_PPO, "preferences": BEFORE_PPO[:-1], "nothing": ()}[self.config.share]
        if self.base.tasks or not (kept := [stage for stage in stages if self.tree.get(stage) is not None]):
            return None
        tree = _with_stages(self.tree, kept)
        return PlannedRun("shared stages", ComparisonFiles(self.root).shared, _settled(tree, self.path))

    def runs(self, arm: Arm, lr_factor: float = 1.0) -> dict[int, PlannedRun]:
        """An arm's runs by seed, at its learning rate times a factor."""
        return {seed: self._run(arm, seed, lr_factor) for seed in self.config.seeds}

    def trial_base(self, arm: Arm) -> PlannedRun | None:
        """The reward model that an arm's trials share; None where all runs share one."""
        tree = self._tree(arm, self._trial_seed)
        if not (kept := [stage for stage in BEFORE_PPO if tree.get(stage) is not None]):
            return None
        recipe = _settled(_with_stages(tree, kept), self.path)
        folder = ComparisonFiles(self.root).trials / arm.slug / "base"
        return PlannedRun(f"{arm.name}, reward model of the trials", folder, recipe)

    def trials(self, arm: Arm) -> dict[float, PlannedRun]:
        """An arm's trials by factor, up to PPO; empty where none were asked for."""
        if self.config.tune is None:
            return {}
        base, own = self.trial_base(arm), self._tree(arm, self._trial_seed)
        planned: dict[float, PlannedRun] = {}
        for factor in self.config.tune.lr_factors:
            tree = _with_stages(_after(own, base.folder) if base else own, ["ppo"])
            tree["ppo"].pop("eval_every", None)
            _scale_learning_rates(tree, factor)
            folder = ComparisonFiles(self.root).trials / arm.slug / f"lr-x{factor:g}"
            planned[factor] = PlannedRun(f"{arm.name}, lr × {factor:g}", folder, _settled(tree, self.path))
        return planned

    @property
    def _trial_seed(self) -> int:
        return self.config.tune.seed if self.config.tune else 0

    def _run(self, arm: Arm, seed: int, lr_factor: float) -> PlannedRun:
        tree = self._tree(arm, seed)
        _scale_learning_rates(tree, lr_factor)
        folder = ComparisonFiles(self.root).runs / arm.slug / f"seed-{seed}"
        return PlannedRun(f"{arm.name}, seed {seed}", folder, _settled(tree, self.path))

    def _tree(self, arm: Arm, seed: int) -> Tree:
        """An arm's recipe, with what is shared taken from where it lies."""
        tree = copy.deepcopy({key: value for key, value in self.tree.items() if key != "compare"})
        own = {key.removeprefix("adapter."): v for key, v in arm.changes.items() if key.startswith("adapter.")}
        if own and isinstance(adapter := tree.get("adapter"), dict):
            tree["adapter"] = inherited_adapter(adapter, own)
        for key, value in arm.changes.items():
            set_key(tree, key, value, f"compare, arm {arm.name!r}")
        tree["seed"] = seed
        return tree if self.shared is None else _after(tree, self.shared.folder, self.config.share)


def load_plan(path: Path, root: Path | None, overrides: list[str]) -> Plan:
    """The comparison that a recipe describes.

    Raises `InputError` for a recipe without a compare section, a key of an arm that there is not, arms without PPO, and
    two arms that come to the same.
    """
    tree = read_tree(path, overrides)
    if make_recipe(tree, path).compare is None:  # before torch is imported for the device
        raise InputError(
            f"{path}: there is no compare section, which names the arms",
            kind="missing",
            key="compare",
            file=path,
            fix="see compare_inits_small",
        )
    base = _settled(tree, path)
    assert base.compare is not None
    if base.tasks is not None and base.compare.tune is not None:
        message = f"{path}: a learning rate cannot be tried for several tasks at once"
        fix = "give each arm its ppo.learning_rate, found on one task"
        raise InputError(message, kind="conflict", key="compare.tune", file=path, fix=fix)
    if base.ppo is None and base.tasks is None:
        raise InputError(
            f"{path}: arms are compared by their PPO stage, and there is none", kind="missing", key="ppo", file=path
        )
    where = (root or Path("comparisons") / base.name).absolute()
    if base.date is None and (day := _date_of(where)) is not None:
        tree["date"] = day
        base.date = day
    plan = Plan(path, where, tree, base, base.compare, arms_of(base.compare), overrides)
    _refuse_settings_without_effect(plan)
    _refuse_equal_arms(plan)
    return plan


def _date_of(root: Path) -> str | None:
    """The day that chat templates print in all runs: that of the runs which are there, else today."""
    if (first := ComparisonFiles(root).a_recipe()) is not None:
        return load_recipe(first).date
    return date.today().isoformat()


def arms_of(config: CompareConfig) -> list[Arm]:
    """The grid's combinations, then the arms that were named one by one."""
    axes = [[(key, value) for value in values] for key, values in config.grid.items()]
    trees: list[Tree] = [dict(combination) for combination in itertools.product(*axes)] if axes else []
    arms = [_arm(tree, len(config.grid)) for tree in [*trees, *config.arms]]
    for index, arm in enumerate(arms):
        if any(arm.slug == other.slug for other in arms[:index]):
            raise InputError(
                f"compare: there are two arms {arm.name!r}",
                kind="conflict",
                key="compare.arms",
                fix="give one of them another name",
            )
    return arms


def _arm(tree: Tree, axes: int) -> Arm:
    settings = {key: value for key, value in tree.items() if key != "name"}
    shown = [
        _text(value) if axes == 1 and len(settings) == 1 else f"{k}={_text(value)}" for k, value in settings.items()
    ]
    name = str(tree.get("name") or ", ".join(shown))
    return Arm(
        name, {key: v for short, value in settings.items() for key, v in _flat(SHORT_KEYS.get(short, short), value)}
    )


def _flat(key: str, value: Any) -> list[tuple[str, Any]]:
    """A section that an arm gives changes the keys in it, and leaves the others."""
    if not isinstance(value, dict):
        return [(key, value)]
    return [pair for name, sub in value.items() for pair in _flat(f"{key}.{name}", sub)]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _refuse_settings_without_effect(plan: Plan) -> None:
    """Keys of stages that all arms share, and the seed, which `compare.seeds` sets, would be shown and not be used."""
    shared = {"reward": BEFORE_PPO, "preferences": BEFORE_PPO[:-1], "nothing": ()}[plan.config.share]
    for arm in plan.arms:
        for key in arm.changes:
            section = key.partition(".")[0]
            if key == "seed" or (section in shared and plan.tree.get(section) is not None):
                reason = "seeds are compare.seeds" if key == "seed" else f"compare.share: {plan.config.share}"
                raise InputError(
                    f"compare: arm {arm.name!r} sets {key}, which has no effect on it ({reason})",
                    kind="conflict",
                    key=key,
                )


def _refuse_equal_arms(plan: Plan) -> None:
    seen: dict[str, str] = {}
    for arm in plan.arms:
        recipe = next(iter(plan.runs(arm).values())).recipe
        content = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
        if content in seen:
            raise InputError(
                f"compare: the arms {seen[content]!r} and {arm.name!r} come to the same run",
                kind="conflict",
                key="compare.arms",
            )
        seen[content] = arm.name


def _with_stages(tree: Tree, stages: list[str]) -> Tree:
    left_out = {"compare", *STAGES} - set(stages)
    return copy.deepcopy({key: value for key, value in tree.items() if key not in left_out})


def _after(tree: Tree, folder: Path, share: str = "reward") -> Tree:
    """A recipe that goes on from what another run has: model, pairs, and the reward model where that is shared."""
    tree = copy.deepcopy(tree)
    if tree.pop("sft", None) is not None:
        tree["model"] = str(RunFiles(folder).sft_model)
    had_pairs = tree.pop("preferences", None) is not None
    if share == "reward":
        if tree.pop("reward", None) is not None:
            sources = tree["ppo"].get("reward") or [{"adapter": "stage"}]
            own = str(RunFiles(folder).stage("reward").folder)
            named = {"adapter": ("stage",), "ensemble": OWN_STAGE}  # the stage of the run itself
            tree["ppo"]["reward"] = [
                s | {key: own for key, words in named.items() if s.get(key) in words} for s in sources
            ]
    elif had_pairs and tree.get("reward") is not None:
        tree["reward"].setdefault("data", str(RunFiles(folder).stage("preferences").preferences))
    return tree


def _scale_learning_rates(tree: Tree, factor: float) -> None:
    """Both of PPO's learning rates; the critic's is the policy's unless it was given."""
    if factor == 1:
        return
    ppo = tree["ppo"]
    default = PPOConfig.model_fields["learning_rate"].default
    ppo["learning_rate"] = float(f"{factor * float(ppo.get('learning_rate', default)):.6g}")
    if ppo.get("value_learning_rate") is not None:
        ppo["value_learning_rate"] = float(f"{factor * float(ppo['value_learning_rate']):.6g}")


def _settled(tree: dict[str, Any], path: Path) -> Recipe:
    """A recipe with the defaults of this machine's device, which all runs of a comparison have to share."""
    from pe_rlhf.model.device_plan import settle  # here: it imports torch, which takes seconds

    # With the model's config, wherever it is: the runs' recipes have every key, so that none would settle it later.
    return settle(make_recipe(tree, path), fetch=True)

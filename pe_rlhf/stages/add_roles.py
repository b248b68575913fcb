"""Adding a role as a recipe describes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pe_rlhf.adapters.kind import kind_of
from pe_rlhf.adapters.layer_statistics import StatisticsSource
from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.config import AdapterConfig, PPOConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.tensors import without_prefix
from pe_rlhf.runs.checkpoint import load_checkpoint
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.saved_roles import load_role
from pe_rlhf.stages.context import StageContext
from reward.errors import InputError

REWARD = "reward"


def add_role(
    context: StageContext[Any],
    backbone: Backbone,
    role: str,
    adapter: AdapterConfig,
    statistics: StatisticsSource,
    *,
    seed: int | None = None,
) -> None:
    """A role at its initialisation. Where a run goes on, one whose init looks at data comes from the checkpoint.

    seed: of the initial values; default: the recipe's.
    """
    if context.recipe.tuning == "full":
        return backbone.add_own_weights(role)
    needs = kind_of(adapter).needs
    if needs is None or (saved := load_checkpoint(context.folder)) is None:
        own = context.recipe.seed if seed is None else seed
        backbone.add_adapter(role, adapter, seed=own, statistics=None if needs == "original weight" else statistics)
        return None
    return backbone.load_role(role, AdapterSpec.on(backbone.model, adapter), without_prefix(f"{role}/", saved[1]))


def critic_start(context: StageContext[PPOConfig], backbone: Backbone, reward_roles: Sequence[str]) -> str | None:
    """The role that the critic starts from, loaded if it is not there yet; None for a fresh critic, or without one.

    That is the reward role where one of `reward_roles` gives the scores, or where `ppo.value_init` asks for it.
    """
    config = context.config
    if config.value_init == "fresh" or config.value_adapter is not None or not config.has_critic:
        return None
    if reward_roles:
        return reward_roles[0]
    if context.config.value_init is None:
        return None
    load_role(backbone, REWARD, RunFiles(context.run_dir).role(REWARD).folder)  # something else gives the scores
    return REWARD


def add_critic(
    context: StageContext[PPOConfig],
    backbone: Backbone,
    role: str,
    adapter: AdapterConfig,
    statistics: StatisticsSource,
    start_from: str | None,
) -> None:
    """The critic: a copy of the role `start_from`, its head scaled by `critic_scale`, or fresh where that is None."""
    if start_from is None:
        return add_role(context, backbone, role, adapter, statistics)
    if context.recipe.tuning == "full":
        backbone.add_own_weights(role, start_from)
    elif start_from in backbone.own_models:
        raise InputError(
            "ppo.value_init: the reward model was fully tuned, an adapter cannot start there",
            kind="conflict",
            key="ppo.value_init",
            fix="use value_init: fresh",
        )
    else:
        backbone.copy_role(start_from, role)
    with torch.no_grad():
        for parameter in backbone.head(role).parameters():
            parameter.mul_(critic_scale(context.config))
    return None


def critic_scale(config: PPOConfig) -> float:
    """From the reward model's unit to that of PPO's rewards: the source's weight and, with kl.form: convex, 1 − β."""
    weight = next((source.weight for source in config.reward if source.adapter or source.ensemble), 1.0)
    return weight * (1 - config.kl.beta if config.kl.form == "convex" else 1.0)

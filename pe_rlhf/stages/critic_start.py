"""The critic as PPO starts with it: the reward model, fitted to the returns, or fresh.

A reward model is trained at the last token only. What its head gives at the tokens before varies too much, so that as
a critic it would do worse than a constant. The best line from its values to the returns of the first rollout is put
into the head: a scale, which also takes the reward model's unit to that of PPO's rewards, and a shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pe_rlhf.adapters.layer_statistics import StatisticsSource
from pe_rlhf.algo.experience import Shaping, shape_and_estimate
from pe_rlhf.algo.masked import least_squares
from pe_rlhf.config import AdapterConfig, PPOConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.prompt_order import PromptSet
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.passes import for_each_token
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.saved_roles import load_role
from pe_rlhf.scoring.scorers import Scorer
from pe_rlhf.stages.add_roles import REWARD, add_role
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.ppo_collect import shaping_of
from pe_rlhf.system.progress import say
from pe_rlhf.types import Rollout, Sequences
from reward.errors import InputError


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
    """The critic: a copy of the role `start_from`, which `fit_critic` then fits, or fresh where that is None."""
    if start_from is None:
        return add_role(context, backbone, role, adapter, statistics)
    if context.recipe.tuning == "full":
        return backbone.add_own_weights(role, start_from)
    if start_from in backbone.own_models:
        raise InputError(
            "ppo.value_init: the reward model was fully tuned, an adapter cannot start there",
            kind="conflict",
            key="ppo.value_init",
            fix="use value_init: fresh",
        )
    return backbone.copy_role(start_from, role)


@torch.no_grad()
def fit_critic(
    backbone: Backbone,
    role: str,
    scorer: Scorer,
    codec: TextCodec,
    prompts: PromptSet,
    rollout: Rollout,
    config: PPOConfig,
) -> None:
    """Put the best line from the critic's values to the returns of a rollout into its head."""
    sequences = Sequences.of(rollout, backbone.pad_token_id)
    scores_B = scorer.score(prompts.prompts, codec.texts(rollout), sequences, prompts.columns)
    values_BR = for_each_token(backbone, role, sequences, config.micro_batch_tokens, backbone.response_values)
    shaping = shaping_of(config, config.kl.beta)
    scale, shift = fit_to_returns(values_BR, scores_B, sequences.mask_BR, rollout.truncated_B, shaping)
    for parameter in backbone.head(role).parameters():
        parameter.mul_(scale)
    backbone.head(role).shift(shift)
    say(f"ppo: the critic starts as the reward model × {scale:.3g} + {shift:.3g}, by the returns of the first rollout")


def fit_to_returns(
    values_BR: Tensor, scores_B: Tensor, mask_BR: Tensor, truncated_B: Tensor, shaping: Shaping
) -> tuple[float, float]:
    """Scale and shift by which values come nearest to the returns, in the mean square; the scale is at least 0.

    The returns are sums of the rewards to come (γ as it is, λ = 1), so they do not depend on the values. The KL is left
    out of the rewards: the policy starts at the anchor, or near it.
    """
    none_BR = torch.zeros(mask_BR.shape)
    to_go = replace(shaping, options=replace(shaping.options, lam=1.0))
    groups_B = torch.arange(len(scores_B))  # what has a critic compares none
    returns_BR = shape_and_estimate(scores_B, none_BR, none_BR, mask_BR, truncated_B, groups_B, to_go).returns_BR
    assert returns_BR is not None  # with a critic
    scale, shift = least_squares(values_BR, returns_BR, mask_BR)
    if scale > 0:
        return scale, shift
    return least_squares(none_BR, returns_BR, mask_BR)

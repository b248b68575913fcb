"""The members of a reward ensemble: how each differs from the others, and what they say together.

The first member is the reward model that is trained without an ensemble, to the bit. The others differ from it in what
`reward.ensemble.vary` names. Only `reward.ensemble.diversity` lets the members know of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pe_rlhf.algo.ensembles import diversity
from pe_rlhf.config import AdapterConfig, Recipe, RewardConfig
from pe_rlhf.config.adapter import LowRankConfig
from pe_rlhf.data.preference_pairs import Pairs
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.optim.role_optimizer import RoleGroup
from pe_rlhf.runs.peft_roles import load_start
from pe_rlhf.stages.add_roles import REWARD, add_role
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.init_batches import reward_statistics
from pe_rlhf.system.seeding import derive_seed, permutation
from reward.calibration import accuracy_interval, expected_calibration_error
from reward.errors import InputError


@dataclass(frozen=True)
class Member:
    """One reward adapter of the stage. seed: of its init, the order of its pairs, and its dropout.

    resampled: whether it is trained on as many pairs, drawn with replacement.
    """

    role: str
    adapter: AdapterConfig
    seed: int
    resampled: bool
    pairs: int

    def batch(self, epoch: int, number: int, size: int) -> list[int]:
        """The rows of one batch of an epoch."""
        order = permutation(self.pairs, self.seed, "reward", epoch)
        rows = order[number * size : (number + 1) * size]
        return [self._drawn[row] for row in rows] if self.resampled else rows

    @cached_property
    def _drawn(self) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "bootstrap", self.role))
        return torch.randint(self.pairs, (self.pairs,), generator=generator).tolist()


def members_of(recipe: Recipe, config: RewardConfig, pairs: int) -> list[Member]:
    """The members that a recipe asks for; one without an ensemble."""
    adapter, ensemble = recipe.adapter_for("reward"), config.ensemble
    members = [Member(REWARD, adapter, recipe.seed, False, pairs)]
    for number in range(2, ensemble.members + 1 if ensemble is not None else 2):
        assert ensemble is not None
        own = adapter
        if "init" in ensemble.vary:
            if not isinstance(adapter, LowRankConfig):
                message = f"reward.ensemble.vary: an adapter of the kind {adapter.kind} has no init"
                raise InputError(message, kind="conflict", key="reward.ensemble.vary")
            init = ensemble.inits[(number - 2) % len(ensemble.inits)]
            own = adapter.model_copy(update={"init": init, "init_options": {}})
        seed = derive_seed(recipe.seed, "ensemble", number) if "seed" in ensemble.vary else recipe.seed
        members.append(Member(f"{REWARD}_{number}", own, seed, "bootstrap" in ensemble.vary, pairs))
    return members


def add_members(
    context: StageContext[RewardConfig], backbone: Backbone, members: Sequence[Member], train: Pairs
) -> None:
    """Put the members on the backbone at their initialisation; one that has only other pairs starts as the first."""
    first, start = members[0], context.config.start
    for member in members:
        if start is not None:
            load_start(backbone, member.role, start, "reward.start", member.adapter)
            continue
        if member is not first and (member.seed, member.adapter) == (first.seed, first.adapter):
            backbone.copy_role(first.role, member.role)
            continue
        statistics = reward_statistics(backbone, train, member.adapter, context.config, member.seed)
        add_role(context, backbone, member.role, member.adapter, statistics, seed=member.seed)


def groups_of(backbone: Backbone, members: Sequence[Member], config: RewardConfig) -> list[RoleGroup]:
    """What the optimizer trains: a group a member; the first one carries the term that keeps them apart."""
    groups = [RoleGroup.of(backbone, member.role, config.learning_rate) for member in members]
    if not (weight := _diversity_weight(config)):
        return groups
    factors_LMRI = _factors(backbone, members)
    # Its gradient reaches all members, and no group's gradient is clipped before the first one's penalty is added.
    return [replace(groups[0], penalty=lambda: -weight * diversity(factors_LMRI)), *groups[1:]]


def diversity_metrics(backbone: Backbone, members: Sequence[Member], config: RewardConfig) -> dict[str, float]:
    """How far the members' factors are apart, where the loss has a term for it: `ensemble_diversity`."""
    if not _diversity_weight(config):
        return {}
    with torch.no_grad():
        return {"ensemble_diversity": diversity(_factors(backbone, members)).item()}


def _diversity_weight(config: RewardConfig) -> float:
    return config.ensemble.diversity if config.ensemble is not None else 0.0


def _factors(backbone: Backbone, members: Sequence[Member]) -> list[list[Tensor]]:
    """The factor A of each member, layer by layer. Raises `InputError` for one that its init does not train."""
    layers = [(member, backbone.role_layers(member.role)) for member in members]
    for member, own in layers:
        if untrained := next((name for name, layer in own.items() if "lora_A" not in layer._parameters), None):
            init = getattr(member.adapter, "init", member.adapter.kind)
            raise InputError(
                f"reward.ensemble.diversity: the init {init} trains no factor A, on {untrained}",
                kind="conflict",
                key="reward.ensemble.diversity",
                fix="leave it at 0, or use another init",
            )
    return [[own[name].get_parameter("lora_A") for _, own in layers] for name in layers[0][1]]


def ensemble_metrics(margins: Sequence[Sequence[float]]) -> dict[str, float]:
    """What the mean of the members' scores is worth on held-out pairs, from each member's margins; empty for one.

    `ensemble_disagreement` is the deviation of a pair's margin over the members, mean over pairs.
    """
    if len(margins) == 1:
        return {}
    margins_MN = np.array(margins)
    mean_N = margins_MN.mean(axis=0)
    return {
        "ensemble_eval_loss": float(np.logaddexp(0, -mean_N).mean()),
        "ensemble_eval_accuracy": float(((np.sign(mean_N) + 1) / 2).mean()),
        "ensemble_eval_calibration_error": expected_calibration_error(mean_N.tolist()),
        "ensemble_disagreement": float(margins_MN.std(axis=0).mean()),
        **{f"eval_accuracy_{m}": float(((np.sign(own) + 1) / 2).mean()) for m, own in enumerate(margins_MN[1:], 2)},
    }


def member_rows(members: Sequence[Member], margins: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """A row for each member in the summary: how it differs, and what it is worth on held-out pairs."""
    rows: list[dict[str, Any]] = []
    for member, own in zip(members, margins, strict=True):
        accuracy = sum((margin > 0) + (margin == 0) / 2 for margin in own) / len(own)
        low, high = accuracy_interval(accuracy * len(own), len(own))
        rows.append(
            {
                "role": member.role,
                "init": getattr(member.adapter, "init", member.adapter.kind),
                "seed": member.seed,
                "bootstrap": member.resampled,
                "eval_accuracy": accuracy,
                "eval_accuracy_low": low,
                "eval_accuracy_high": high,
                "eval_loss": sum(math.log1p(math.exp(-abs(m))) + max(0.0, -m) for m in own) / len(own),
                "calibration_error": expected_calibration_error(own),
            }
        )
    return rows

"""Adding a role as a recipe describes it."""

from __future__ import annotations

from pe_rlhf.adapters.layer_statistics import StatisticsSource
from pe_rlhf.adapters.lora.init_registry import get_init
from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.config import AdapterConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.tensors import without_prefix
from pe_rlhf.runs.checkpoint import load_checkpoint
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.saved_roles import load_role
from pe_rlhf.stages.context import StageContext
from pe_rlhf.system.distributed import from_main, is_sharded, world_size
from reward.errors import InputError


def add_role(
    context: StageContext, backbone: Backbone, role: str, adapter: AdapterConfig, statistics: StatisticsSource
) -> None:
    """A role at its initialisation. Where a run goes on, one whose init looks at data comes from the checkpoint."""
    if context.recipe.tuning == "full":
        return backbone.add_own_weights(role)
    needs = get_init(adapter.init).needs
    if needs is not None and is_sharded(backbone.model):
        raise InputError(
            f"adapter.init: {adapter.init} looks at data, for which the base has to be whole: not with zero3"
        )
    if needs is None or (saved := load_checkpoint(context.folder)) is None:
        backbone.add_adapter(role, adapter, seed=context.recipe.seed, statistics=statistics)
        if world_size() > 1:  # an SVD may come out with other signs on another machine, and ranks must not differ
            backbone.set_role_state(role, from_main(backbone.role_state(role)))
        return None
    return backbone.load_role(role, AdapterSpec.on(backbone.model, adapter), without_prefix(f"{role}/", saved[1]))


def add_critic(
    context: StageContext, backbone: Backbone, role: str, adapter: AdapterConfig, statistics: StatisticsSource
) -> None:
    """The critic: from the reward role where one gives the scores, or is asked for (`ppo.value_init`), else fresh."""
    ppo = context.recipe.ppo
    assert ppo is not None
    if ppo.value_init == "reward" and "reward" not in backbone.roles:  # it is there, though something else scores
        load_role(backbone, "reward", RunFiles(context.run_dir).role("reward").folder)
    if ppo.value_init == "fresh" or "reward" not in backbone.roles:
        add_role(context, backbone, role, adapter, statistics)
    elif context.recipe.tuning == "full":
        backbone.add_own_weights(role, "reward")
    elif "reward" in backbone.own_models:
        raise InputError("ppo.value_init: the reward model was fully tuned, an adapter cannot start there; use fresh")
    else:
        backbone.copy_role("reward", role)

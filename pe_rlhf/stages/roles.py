"""Adding a role as a recipe describes it."""

from __future__ import annotations

from pe_rlhf.adapters.build import AdapterSpec
from pe_rlhf.adapters.registry import get_init
from pe_rlhf.adapters.statistics import StatisticsSource
from pe_rlhf.adapters.targets import find_targets
from pe_rlhf.backbone import Backbone
from pe_rlhf.checkpoint import load_checkpoint, without_prefix
from pe_rlhf.config import AdapterConfig
from pe_rlhf.distributed import from_main, is_sharded, world_size
from pe_rlhf.stages.context import StageContext
from reward.errors import InputError


def add_role(
    context: StageContext, backbone: Backbone, role: str, adapter: AdapterConfig, statistics: StatisticsSource
) -> None:
    """A role at its initialisation. Where a run goes on, one whose init looks at data comes from the checkpoint."""
    settings = adapter.model_dump()
    if get_init(adapter.init).needs is not None and is_sharded(backbone.model):
        raise InputError(
            f"adapter.init: {adapter.init} looks at data, for which the base has to be whole: not with zero3"
        )
    if get_init(adapter.init).needs is None or (saved := load_checkpoint(context.folder)) is None:
        backbone.add_adapter(role, seed=context.recipe.seed, statistics=statistics, **settings)
        if world_size() > 1:  # an SVD may come out with other signs on another machine, and ranks must not differ
            backbone.set_role_state(role, from_main(backbone.role_state(role)))
        return
    modules = tuple(find_targets(backbone.model, settings.pop("targets"), settings.pop("last_layers")))
    backbone.load_role(role, AdapterSpec(**settings, modules=modules), without_prefix(role, saved[1]))

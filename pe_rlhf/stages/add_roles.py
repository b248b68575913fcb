"""Adding a role as a recipe describes it."""

from __future__ import annotations

from typing import Any

from pe_rlhf.adapters.kind import kind_of
from pe_rlhf.adapters.layer_statistics import StatisticsSource
from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.config import AdapterConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.tensors import without_prefix
from pe_rlhf.runs.checkpoint import load_checkpoint
from pe_rlhf.stages.context import StageContext

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

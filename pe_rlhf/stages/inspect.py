"""`pe-rlhf inspect`: the stage's own batch and loss, every init and kind that was asked for, and a page about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pe_rlhf.adapters.gradients import Probe
from pe_rlhf.adapters.inspection import Inspection, inspect_inits
from pe_rlhf.adapters.lora.init_registry import get_init, init_names
from pe_rlhf.adapters.specs import AdapterSpec, adapter_settings
from pe_rlhf.adapters.targets import numbers_of_experts
from pe_rlhf.config import AdapterConfig, LowRankConfig, PPOConfig, Recipe, RewardConfig
from pe_rlhf.config.adapter import init_fits, kind_names
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.device_plan import settle
from pe_rlhf.report.inspect_page import inspect_page
from pe_rlhf.scoring.weighted import make_scorer
from pe_rlhf.stages.anchor_texts import AnchorTexts
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.critic_start import critic_start
from pe_rlhf.stages.init_batches import AnchorRollouts, reward_statistics
from pe_rlhf.stages.reward_pairs import load_pairs
from pe_rlhf.system.files import write_json, write_whole
from pe_rlhf.system.progress import progress
from pe_rlhf.system.seeding import derive_seed
from reward.errors import InputError

# One pass holds the whole batch: the kernel is between all its samples.
ONE_PASS = 10**9
ROLES = {"reward": "reward", "ppo": "policy"}


def inspect_recipe(
    recipe: Recipe, stage: str, adapters: list[AdapterConfig], run_dir: Path, *, lenient: bool = False
) -> Inspection:
    """Metrics of adapters under the loss of a stage (`reward`, or `ppo`: the policy's). Trains nothing.

    `lenient` leaves out adapters that the model cannot have, and says why in the result.

    Raises `InputError` for a stage that the recipe has not, and for a kind or init that cannot be used.
    """
    there = [name for name in recipe.stages if name in ROLES]
    if stage not in there:
        message = f"--stage {stage}: the recipe has no such stage that can be inspected"
        fix = f"name one of {', '.join(there)}" if there else "add a section reward or ppo"
        raise InputError(message, kind="unknown", key="stage", fix=fix)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    recipe = settle(recipe)
    context: StageContext[RewardConfig | PPOConfig] = StageContext(recipe, run_dir, stage)
    backbone = context.backbone()
    adapter = recipe.adapter_for(stage)
    probe = _probe(context, backbone, adapter)
    names = AdapterSpec.on(backbone.model, adapter).modules
    experts = numbers_of_experts(backbone.model, names)  # hooks do not see what goes into one
    layers = {name: backbone.base_layer(name) for name in names if name not in experts}
    with progress(f"inspecting {len(adapters)} adapters", len(layers), "layers") as advance:
        seed = partial(derive_seed, recipe.seed, ROLES[stage])
        result = inspect_inits(
            layers, probe, adapters, seed, advance, backbone.original_weights().weight, lenient=lenient
        )
    if result.gradient_square == 0:
        raise InputError(
            f"--stage {stage}: the loss of this batch has no gradient, so there is no step to compare adapters by",
            kind="empty",
            key=f"{stage}.batch_size",
            fix="its rewards are all equal: raise ppo.batch_size" if stage == "ppo" else "give it other pairs",
        )
    return result


def adapters_named(inits: str, kinds: str, recipe: Recipe, stage: str) -> list[AdapterConfig]:
    """The adapters to compare, on the layers of the stage's own one; by default that one, beside plain LoRA.

    Args:
        inits: comma-separated, of the stage's kind; `all` that its base can have.
        kinds: comma-separated; `all` whose layers have a change of the weight. The stage's own has its settings, others
            their defaults.

    Raises `InputError` for a name that does not exist, and for inits of a kind that has none.
    """
    own = recipe.adapter_for(stage)
    every = [name for name in init_names() if init_fits(name, recipe.backbone.quantization)]
    named = [_with_init(low_rank(own), name) for name in _names(inits, every)]
    named += [own if name == own.kind else _of_kind(name, own) for name in _names(kinds, kind_names())]
    if named:
        return named
    plain = _with_init(own, "lora") if isinstance(own, LowRankConfig) else _of_kind("lora", own)
    return [own] if own == plain else [own, plain]


def _names(text: str, every: list[str]) -> list[str]:
    """The names of a comma-separated list, each once."""
    return every if text == "all" else list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _of_kind(kind: str, own: AdapterConfig) -> AdapterConfig:
    """An adapter of a kind on the layers of another."""
    return adapter_settings(kind, targets=own.targets, exclude=own.exclude, last_layers=own.last_layers)


def question(recipe: Recipe, stage: str, adapters: Sequence[AdapterConfig]) -> dict[str, Any]:
    """What a page is about: all that its numbers follow from, save the content of data and models."""
    by_number = {str(number): adapter.model_dump(mode="json") for number, adapter in enumerate(adapters, start=1)}
    return {"stage": stage, "adapters": by_number, "recipe": recipe.model_dump(mode="json", exclude={"threads"})}


def write_page(result: Inspection, recipe: Recipe, stage: str, path: Path, asked: Mapping[str, Any]) -> Path:
    """Write the metrics as a self-contained HTML page, and beside it as JSON, with what was asked."""
    adapter, metrics = recipe.adapter_for(stage), result.as_json()
    size = (
        f"rank {adapter.rank}, alpha {adapter.alpha:g} ({adapter.scaling})"
        if isinstance(adapter, LowRankConfig)
        else adapter.kind
    )
    model = recipe.model if recipe.sft is None else f"{recipe.model} after sft"
    subtitle = (
        f"{model}, {size}, targets {adapter.targets};"
        f" the loss of {stage} on {len(result.kernel)} samples, before training"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, inspect_page(metrics, recipe.name, subtitle))
    write_json(path.with_suffix(".json"), metrics | {"asked": asked})
    return path


def low_rank(adapter: AdapterConfig) -> LowRankConfig:
    """The settings of an adapter that is made by an init. Raises `InputError` for a kind without one."""
    if not isinstance(adapter, LowRankConfig):
        raise InputError(
            f"the kind {adapter.kind} has no init",
            kind="conflict",
            key="adapter.kind",
            fix=f"compare kinds instead: --kinds {adapter.kind},lora",
        )
    return adapter


def _with_init(adapter: LowRankConfig, init: str) -> LowRankConfig:
    get_init(init)
    options = adapter.init_options if init == adapter.init else {}
    return adapter.model_copy(update={"init": init, "init_options": options})


def _probe(context: StageContext[RewardConfig | PPOConfig], backbone: Backbone, adapter: AdapterConfig) -> Probe:
    """The stage's batch in two halves, in one pass."""
    # One micro-batch that holds everything: the kernel is between all samples of the pass.
    whole = context.config.model_copy(update={"micro_batch_tokens": ONE_PASS})
    if isinstance(whole, RewardConfig):
        train, _ = load_pairs(context, whole, backbone)
        statistics = reward_statistics(backbone, train, adapter, whole, context.recipe.seed)
    else:
        recipe = context.recipe.model_copy(update={"ppo": whole})
        ppo: StageContext[PPOConfig] = StageContext(recipe, context.run_dir, "ppo")
        codec, new_tokens = context.codec(backbone), whole.rollout.max_new_tokens
        prompts = context.prompts(whole.prompts, codec, backbone, new_tokens, whole.max_prompt_tokens)
        anchor = AnchorTexts(ppo, backbone, codec, whole.rollout, prompts.ids)
        budget, columns = whole.micro_batch_tokens, prompts.columns
        scorer, roles = make_scorer(whole.reward, backbone, context.run_dir, budget, columns, anchor=anchor)
        start = critic_start(ppo, backbone, roles)
        statistics = AnchorRollouts(ppo, backbone, scorer, codec, prompts, adapter, start).policy_statistics()
    (probe,) = statistics.probes("two gradients")
    return probe

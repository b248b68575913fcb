"""What a run's model can be asked before its weights are loaded: by its config and tokenizer, in a second.

Layers are compared by name on a model without memory. Prompts are rendered once for each stage, and shown.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pe_rlhf.adapters.kind import kind_of
from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.adapters.targets import numbers_of_experts, plain_weight
from pe_rlhf.config import Recipe, SamplerConfig
from pe_rlhf.config.reward_source import OWN_STAGE
from pe_rlhf.data.codec import TextCodec, read_template
from pe_rlhf.model.adapter_models import SEQ_CLS
from pe_rlhf.model.device_plan import is_zero3
from pe_rlhf.model.loading import check_known, find_device
from pe_rlhf.model.names import check_model_name, model_at_hand
from pe_rlhf.model.whole import check_config, loading
from pe_rlhf.rollout.make import check_installed
from pe_rlhf.runs.peft_roles import check_start
from pe_rlhf.runs.saved_roles import starting_model
from pe_rlhf.scoring.ensemble import find_ensemble
from pe_rlhf.scoring.judge_scorer import asked_judge, check_against
from pe_rlhf.scoring.model_judges import check_judge, check_server
from pe_rlhf.scoring.remote import RemoteScorer, check_columns
from pe_rlhf.scoring.weighted import check_where
from pe_rlhf.stages.previous_policy import check_adapter, find_previous
from pe_rlhf.system.progress import say
from reward.errors import InputError
from reward.records import Prompt

SHOWN = 300  # characters of a rendered prompt
KnownModel = tuple[PreTrainedConfig, PreTrainedTokenizerBase]


def check_models_and_judges(
    recipe: Recipe, stages: list[str], run_dir: Path | None, columns: Mapping[str, Collection[str]]
) -> None:
    """Raise `InputError` for a model, role, judge, engine or template that is not there or cannot do its part.

    `columns` has those of the prompts of each stage whose responses PPO's rewards score.
    """
    if recipe.chat_template not in ("auto", "none"):
        read_template(recipe.chat_template)
    if recipe.sft is None or "sft" in stages:
        check_model_name(recipe.model)
    for stage in stages:
        section = getattr(recipe, stage)
        check_installed(getattr(section, "rollout", None) or getattr(section, "sampling", None) or SamplerConfig())
        if recipe.ppo is not None and stage in columns:
            check_where(recipe.ppo.reward, columns[stage])
            for source in recipe.ppo.reward:
                check_columns(source.server.columns, columns[stage])
                check_against(source, columns[stage])
        if (judge := getattr(section, "judge", None)) is not None:
            check_judge(judge, run_dir)
    for stage, role in (("reward", "reward"), ("ppo", "policy")):
        if stage in stages and (start := getattr(recipe, stage).start) is not None:
            check_start(start, role, f"{stage}.start", recipe.adapter_for(stage))
    if recipe.ppo is not None and "ppo" in stages:
        check_adapter(recipe)
        find_previous(recipe, run_dir or Path())
        for source in recipe.ppo.reward:
            if source.model is not None:
                check_known(source.model, "ppo.reward.model", source.trust_remote_code, SEQ_CLS)
            if source.adapter not in (None, "stage"):
                check_start(source.adapter, "reward", "ppo.reward.adapter")
            if source.judge is not None:
                check_judge(asked_judge(source), run_dir)
            if source.ensemble is not None and source.ensemble not in OWN_STAGE:
                find_ensemble(source.ensemble, Path())


def check_servers(
    recipe: Recipe, stages: list[str], run_dir: Path | None, known: KnownModel | None, *, wait: bool
) -> None:
    """Raise where a judge's, scorer's or vLLM server cannot work: what it is for may be hours away.

    wait: whether a vLLM server that is not there may still come up.
    """
    sections = {stage: getattr(recipe, stage) for stage in stages}
    if recipe.ppo is not None and "ppo" in stages:
        if recipe.ppo.eval_every is not None and recipe.evaluate is not None:
            sections["evaluate"] = recipe.evaluate  # judges the policy while it is trained, on samples of its engine
        for source in recipe.ppo.reward:
            if source.judge is not None:
                check_server(asked_judge(source))
            if source.url is not None:
                RemoteScorer(source.url, source.server, []).check_server()
    for judge in (getattr(section, "judge", None) for section in sections.values()):
        if judge is not None:
            check_server(judge)
    for stage, section in sections.items():
        sampling = getattr(section, "rollout", None) or getattr(section, "sampling", None)
        if sampling is None or not sampling.urls:
            continue
        if "sft" in stages:
            say(f"{stage}: its vLLM servers are asked after sft, whose model they serve")
            continue
        from pe_rlhf.rollout.vllm.first_look import look_at_servers  # other runs need no client of servers

        look_at_servers(sampling, starting_model(recipe, run_dir or Path()), known, wait=wait)


def check_recipe_model(recipe: Recipe, stages: list[str], prompts: dict[str, Prompt]) -> KnownModel | None:
    """Raise `InputError` for what the model, its tokenizer or this machine cannot do; say how prompts look.

    `prompts` has the first one of each stage that has some. A model that would have to be fetched is not looked at.
    Returns its config and tokenizer.
    """
    find_device(recipe.backbone.device)
    for stage in stages:
        _check_sync(recipe, stage)
    if recipe.backbone.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "backbone.quantization: bitsandbytes is not installed",
            kind="not_installed",
            key="backbone.quantization",
            fix="pip install 'pe-rlhf[quantized]'",
        )
    if (path := model_at_hand(recipe.model)) is None:
        return None
    common: dict[str, Any] = {
        "trust_remote_code": recipe.backbone.trust_remote_code,
        "revision": recipe.backbone.revision,
    }
    with loading(recipe.model, "model"):
        config = AutoConfig.from_pretrained(path, **common)
        check_config(config, recipe.model, "model")
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
    codec = TextCodec(tokenizer, recipe.chat_template, arguments=recipe.chat_template_kwargs, date=recipe.date)
    for stage in stages:
        _check_tokens(recipe, stage, config)
        if stage in prompts:
            say(f"{stage}: the first prompt, as the model reads it: {_shortened(_rendered(codec, prompts[stage]))}")
    if recipe.tuning == "adapter":
        _check_adapters(recipe, stages, config)
    return config, tokenizer


def _check_sync(recipe: Recipe, stage: str) -> None:
    """Raise `InputError` where weights are to be merged that no rank has whole."""
    for name in ("rollout", "sampling"):
        sampler = getattr(getattr(recipe, stage), name, None)
        if getattr(sampler, "sync", None) == "merged" and is_zero3(recipe):
            raise InputError(
                f"{stage}.{name}.sync: merged: with zero3 no rank has the whole base to merge into",
                kind="conflict",
                key=f"{stage}.{name}.sync",
                fix="use adapter",
            )


def _check_tokens(recipe: Recipe, stage: str, config: PreTrainedConfig) -> None:
    """Raise `InputError` where a response leaves no room for a prompt."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    for name in ("rollout", "sampling"):
        sampler = getattr(getattr(recipe, stage), name, None)
        if sampler is not None and limit is not None and sampler.max_new_tokens >= limit:
            raise InputError(
                f"{stage}: max_new_tokens {sampler.max_new_tokens} leaves no room for a prompt,"
                f" {recipe.model} takes {limit} tokens",
                kind="too_long",
                key=f"{stage}.{name}.max_new_tokens",
            )


def _check_adapters(recipe: Recipe, stages: list[str], config: PreTrainedConfig) -> None:
    """Raise `InputError` for targets that the model has not, and for a rank that no layer of it has."""
    trained = [stage for stage in stages if stage in ("sft", "reward", "ppo")]
    if not trained:
        return
    with loading(recipe.model, "model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.backbone.trust_remote_code)
    for adapter in (adapter for stage in trained for adapter in recipe.adapters_of(stage)):
        names = AdapterSpec.on(model, adapter).modules
        highest = max(min(plain_weight(model, name).shape[-2:]) for name in names)
        rank = getattr(adapter, "rank", 0) if kind_of(adapter).rank_of_weight else 0
        if rank > highest:
            raise InputError(
                f"adapter.rank: {rank} is more than {highest}, the highest rank of a layer of {recipe.model}",
                kind="conflict",
                key="adapter.rank",
            )
        stacks = recipe.continual is not None and recipe.continual.stacks
        if stacks and (experts := numbers_of_experts(model, names)):
            raise InputError(
                f"continual: an adapter on fused experts, such as {min(experts)}, cannot be put on top of another",
                kind="conflict",
                key="adapter.targets",
                fix="name targets without the experts, or use continual: {adapter: same}",
            )


def _rendered(codec: TextCodec, prompt: Prompt) -> str:
    """A row that the template refuses is an unusable one; a template that refuses any prompt is an error."""
    try:
        return codec.render(prompt)
    except InputError as error:
        try:
            return f"{codec.render('Hi')} (of another text, since the template refuses the row)"
        except InputError:
            raise error from None


def _shortened(text: str) -> str:
    shown = repr(text)
    half = SHOWN // 2
    return shown if len(shown) <= SHOWN else f"{shown[:half]} … {shown[-half:]}"

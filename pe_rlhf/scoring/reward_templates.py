"""Which prompts the chat templates of reward models take, known before anything is sampled, trained or scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer

from pe_rlhf.config.reward_source import RewardSource
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.adapter_models import SEQ_CLS
from pe_rlhf.model.names import check_model_name, resolve_model
from pe_rlhf.model.whole import loading
from pe_rlhf.runs.saved_roles import SavedRole, role_behind
from pe_rlhf.scoring.classifier import tokenizer_of
from reward.errors import InputError
from reward.judges.judge_registry import judge_settings
from reward.judges.judge_settings import JudgeSettings
from reward.records import NO_COLUMNS, Prompt

PromptCheck = Callable[[Prompt, Mapping[str, Any]], None]
NAME_IT = "name a run's directory or a model: reward_model:RUN"


def template_check(name: str, key: str, trust_remote_code: bool = False) -> Callable[[Prompt], None]:
    """What raises `InputError` for a prompt that a reward model's template refuses: of a run of ours, or of others.

    A role of ours reads the prompt, and the response as it follows; a model of others the conversation of both. No
    weights are loaded.
    """
    found = role_behind(name, "reward")
    if found is None:
        check_model_name(name, key, SEQ_CLS)
        read = TextCodec(tokenizer_of(name, key, trust_remote_code)).check
    else:
        read = _codec_of(found, key).render

    def check(prompt: Prompt) -> None:
        try:
            read(prompt)
        except InputError as error:
            raise error.at(f"the reward model {name}") from error

    return check


def prompt_check(sources: Sequence[RewardSource] = (), judge: str | JudgeSettings | None = None) -> PromptCheck:
    """What raises `InputError` for a prompt, with its columns, that a source's or judge's reward model cannot read."""
    checks: list[tuple[Mapping[str, Any], Callable[[Prompt], None]]] = [
        (source.where, template_check(source.model, "ppo.reward.model", source.trust_remote_code))
        for source in sources
        if source.model is not None
    ]
    for where, asked in [*((source.where, source.judge) for source in sources), (NO_COLUMNS, judge)]:
        settings = None if asked is None else judge_settings(asked)
        if settings is not None and settings.kind == "reward_model":
            target, trust = settings.needed_target(NAME_IT), settings.trust_remote_code
            checks.append((where, template_check(target, "judge.target", trust)))

    def check(prompt: Prompt, columns: Mapping[str, Any]) -> None:
        for where, read in checks:
            if all(columns.get(column) == value for column, value in where.items()):
                read(prompt)

    return check


def _codec_of(found: SavedRole, key: str) -> TextCodec:
    recipe, options = found.recipe, dict[str, Any]()
    if recipe is not None:
        options = {"trust_remote_code": recipe.backbone.trust_remote_code, "revision": recipe.backbone.revision}
    with loading(found.base, key):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(found.base), **options)
    if recipe is None:
        return TextCodec(tokenizer)
    return TextCodec(tokenizer, recipe.chat_template, arguments=recipe.chat_template_kwargs, date=recipe.date)

"""Which prompts the models behind rewards and judges can read, known before anything is sampled, trained or scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pe_rlhf.config.reward_source import RewardSource
from pe_rlhf.scoring.judge_scorer import asked_judge
from pe_rlhf.scoring.reward_templates import template_check
from reward.judges.judge_registry import judge_prompt_check
from reward.judges.judge_settings import JudgeSettings
from reward.records import NO_COLUMNS, Prompt

PromptCheck = Callable[[Prompt, Mapping[str, Any]], None]


def prompt_check(sources: Sequence[RewardSource] = (), judge: str | JudgeSettings | None = None) -> PromptCheck:
    """What raises `InputError` for a prompt, with its columns, that a source or the judge cannot read.

    A jury cannot read what half of its judges or more cannot.
    """
    checks: list[tuple[Mapping[str, Any], Callable[[Prompt], None]]] = []
    for source in sources:
        if source.model is not None:
            read = template_check(source.model, "ppo.reward.model", source.trust_remote_code)
            checks.append((source.where, read))
        if source.judge is not None:
            checks.append((source.where, judge_prompt_check(asked_judge(source))))
    if judge is not None:
        checks.append((NO_COLUMNS, judge_prompt_check(judge)))

    def check(prompt: Prompt, columns: Mapping[str, Any]) -> None:
        for where, read in checks:
            if all(columns.get(column) == value for column, value in where.items()):
                read(prompt)

    return check

"""What is looked at before a stage runs and before a model is loaded: names, data, functions, judges.

Cheap things come first, and what needs torch or transformers is imported after them: they take seconds, and a mistake
in the recipe or the data should be told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TypeVar

from pe_rlhf.adapters.kind import kind_of
from pe_rlhf.adapters.lora.init_registry import init_of
from pe_rlhf.config import STAGES, OptimizerConfig, Recipe
from pe_rlhf.config.adapter import LowRankConfig
from pe_rlhf.config.load import load_deepspeed_config
from pe_rlhf.data.rows import (
    MAX_BAD_SHARE,
    SOURCE,
    PromptRow,
    load_examples,
    load_preferences,
    load_prompt_rows,
    task_numbers,
)
from pe_rlhf.runs.metrics import check_tracking
from pe_rlhf.system.processes import launched
from reward.errors import InputError
from reward.judges import load_score_function
from reward.records import Prompt

T = TypeVar("T")


def check_inputs(
    recipe: Recipe,
    stages: list[str],
    finished: Sequence[str] = (),
    run_dir: Path | None = None,
    *,
    wait: bool = True,
) -> None:
    """Look at everything that can be wrong with names, data, functions and servers before a model is loaded.

    Of the `finished` stages the data is still looked at, but they do not run again. `wait` as in `check_servers`.
    """
    if recipe.deepspeed is not None:
        load_deepspeed_config(recipe.deepspeed)
    check_tracking(recipe.tracking)
    if launched() and "sft" in stages and "sft" not in finished:
        raise InputError(
            "sft: TRL's trainer is for one process",
            kind="conflict",
            key="sft",
            fix="run it first with `pe-rlhf run RECIPE --to sft`, then launch the other stages with --resume",
        )
    check_inits(recipe)
    prompts, columns = _check_data(recipe, stages)

    from pe_rlhf.stages.model_checks import check_models_and_judges, check_recipe_model, check_servers

    check_models_and_judges(recipe, stages, run_dir, columns)
    open_stages = [stage for stage in stages if stage not in finished]
    known = check_recipe_model(recipe, open_stages, prompts)
    check_servers(recipe, open_stages, run_dir, known, wait=wait)


def check_inits(recipe: Recipe) -> None:
    """Raise `InputError` for an init of a stage that there is not, or an option that it has not."""
    for settings in (adapter for stage in recipe.stages for adapter in recipe.adapters_of(stage)):
        if settings.kind == "lora" and isinstance(settings, LowRankConfig):
            init_of(settings)  # all that can be wrong with that kind, and inits import no torch
        else:
            kind_of(settings)
    if recipe.reward is not None and recipe.reward.ensemble is not None:
        from pe_rlhf.stages.reward_members import members_of

        for member in members_of(recipe, recipe.reward, 1):
            kind_of(member.adapter)


def _check_data(recipe: Recipe, stages: list[str]) -> tuple[dict[str, Prompt], dict[str, set[str]]]:
    """Read all data sets. Returns the first prompt of each stage, and the columns of those whose rewards PPO gives."""
    first: dict[str, Prompt] = {}
    columns: dict[str, set[str]] = {}
    for stage in stages:
        section = getattr(recipe, stage)
        if (prompts := getattr(section, "prompts", None)) is not None:
            share = getattr(section, "max_bad_share", MAX_BAD_SHARE)
            names: set[str] = set()
            rows, _ = load_prompt_rows(prompts, f"{stage}.prompts", _columns_into(names), share)
            first[stage] = rows[0]().prompt
            if recipe.ppo is not None and stage in ("ppo", "evaluate"):
                if tasks := recipe.adapter_for("ppo").routes:
                    task_numbers([row().columns.get(SOURCE) for row in rows], tasks, f"{stage}.prompts")
                columns[stage] = names
                for source in recipe.ppo.reward:
                    if source.function is not None:
                        load_score_function(source.function, columns[stage], source.arguments)
    if recipe.sft is not None and "sft" in stages:
        for key in ("data", "eval_data"):
            if (source := getattr(recipe.sft, key)) is not None:
                examples, _ = load_examples(source, f"sft.{key}", recipe.sft.max_bad_share, _first_only())
                if (example := examples[0]) is not None and example.prompt is not None:
                    first.setdefault("sft", example.prompt)
    if recipe.reward is not None and "reward" in stages:
        for key in ("data", "eval_data"):
            if (source := getattr(recipe.reward, key)) is not None:
                share = recipe.reward.max_bad_share
                _, records, _ = load_preferences(source, f"reward.{key}", share, _first_only())
                if (record := records[0]) is not None:
                    first.setdefault("reward", record.prompt)
    return first, columns


def _columns_into(names: set[str]) -> Callable[[PromptRow], Callable[[], PromptRow]]:
    """Note the columns of prompts; of each is kept how it is read again."""

    def note(row: PromptRow) -> Callable[[], PromptRow]:
        names.update(row.columns)
        return row.again

    return note


def _first_only() -> Callable[[T], T | None]:
    """Keep what is given first, and of a million rows no other."""
    number = count()
    return lambda row: None if next(number) else row


def cost_lines(recipe: Recipe, stages: Sequence[str]) -> list[str]:
    """What some stages take more of than usual, a sentence each."""
    optimizers = {stage: getattr(getattr(recipe, stage), "optimizer", None) for stage in stages}
    return [f"{name}: {o.cost}" for name, o in optimizers.items() if isinstance(o, OptimizerConfig) and o.cost]


def select_stages(recipe: Recipe, first: str | None, last: str | None) -> list[str]:
    """The recipe's stages from `first` to `last`, both included. Raises `InputError` for one the recipe hasn't got."""
    for name in (first, last):
        if name is not None and name not in recipe.stages:
            has = ", ".join(recipe.stages)
            raise InputError(f"the recipe has no stage {name!r}; it has {has}", kind="unknown", key=name)
    start = STAGES.index(first) if first else 0
    end = STAGES.index(last) if last else len(STAGES) - 1
    if start > end:
        raise InputError(f"--from {first} comes after --to {last}", kind="conflict", key="from")
    return [stage for stage in recipe.stages if start <= STAGES.index(stage) <= end]

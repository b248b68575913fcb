"""The best of n responses of a run's anchor by the run's reward, which `pe-rlhf evaluate` judges beside its policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pe_rlhf.config import PPOConfig
from pe_rlhf.config.evaluate import EvaluationSettings
from pe_rlhf.data.prompt_order import PromptSet
from pe_rlhf.evaluation.best_of import BestOf, best_of
from pe_rlhf.evaluation.prompting import Prompting, columns_of
from pe_rlhf.evaluation.responses import rows_of
from pe_rlhf.evaluation.sources import find_policy, prompted_codec
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.passes import for_each_token
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.runs.layout import EvaluationFiles, RunFiles, StageFiles
from pe_rlhf.runs.metrics import read_summary
from pe_rlhf.runs.saved_roles import SavedRole, files_of
from pe_rlhf.scoring.ensemble import find_ensemble
from pe_rlhf.scoring.scorers import find_reward
from pe_rlhf.scoring.weighted import make_scorer
from pe_rlhf.system.seeding import derive_seed
from pe_rlhf.types import Rollout, Sequences
from reward.errors import InputError
from reward.records import Columns, Prompt

KEY = "policy.best_of"
POLICY = "policy"


@dataclass(frozen=True)
class RewardedRun:
    """A run's policy, the reward that it was trained by, and which weights both have."""

    policy: SavedRole
    ppo: PPOConfig
    folder: Path
    identity: list[Any]


def rewarded_run(name: str) -> RewardedRun:
    """The run of that name. Raises `InputError` where it is none, or where its reward is not there."""
    policy = find_policy(name)
    recipe = None if policy is None else policy.recipe
    if policy is None or recipe is None or recipe.ppo is None:
        raise InputError(
            f"{KEY}: {name} is no run with a recipe of PPO, by whose reward the best response could be chosen",
            kind="conflict",
            key=KEY,
            fix="evaluate a run's directory, or leave it out",
        )
    folder = policy.files.stage.run.folder
    weights = [files_of(str(policy.folder), small=True)]
    for source in recipe.ppo.reward:
        roles = find_ensemble(source.ensemble, folder) if source.ensemble is not None else []
        roles += [find_reward(source.adapter, folder)] if source.adapter is not None else []
        weights += [files_of(str(role.folder), small=True) for role in roles]
    sources = [source.model_dump(mode="json", exclude_defaults=True) for source in recipe.ppo.reward]
    return RewardedRun(policy, recipe.ppo, folder, [sources, weights])


def best_of_run(
    run: RewardedRun,
    n: int,
    prompts: Sequence[Prompt],
    prompting: Prompting,
    settings: EvaluationSettings,
    folder: Path,
) -> tuple[BestOf, float]:
    """The best of n for each prompt, and the policy's KL to the anchor in nats per response, on samples of its own.

    Both go on from a file in `folder` after an interruption.
    """
    columns = columns_of(prompts, settings)
    identity = [n, run.identity, settings.sampler.model_dump(), settings.seed, prompting.template, prompting.arguments]
    rows = rows_of(
        EvaluationFiles(folder).responses("best_of"),
        json.dumps([*identity, prompting.date]),
        prompts,
        f"sampling the best of {n}",
        lambda start: _sampled(run, n, prompts, columns, start, prompting, settings, folder),
    )
    texts, scores, lengths, kls = ([row[key] for row in rows] for key in ("response", "score", "tokens", "policy_kl"))
    return BestOf(n, texts, scores, lengths), sum(kls) / len(kls)


def _sampled(
    run: RewardedRun,
    n: int,
    prompts: Sequence[Prompt],
    columns: Columns,
    start: int,
    prompting: Prompting,
    settings: EvaluationSettings,
    folder: Path,
) -> Iterator[dict[str, Any]]:
    """Prompt by prompt from `start` on. What is drawn for a response depends on the seed and its number only."""
    backbone, _ = run.policy.load(POLICY, dtype=settings.dtype, device=settings.device)
    codec, budget = prompted_codec(backbone, prompting), run.ppo.micro_batch_tokens

    def drawn(role: str, ids: list[list[int]], what: str, rows: Sequence[int]) -> Rollout:
        return HFRollout(backbone, role, settings.sampler).generate(
            ids, derive_seed(settings.seed, "evaluate", what), rows
        )

    def anchor(ids: list[list[int]]) -> list[str]:
        rows = [int(hashlib.sha256(json.dumps(row).encode()).hexdigest()[:8], 16) for row in ids]
        return codec.texts(drawn(ANCHOR, ids, "anchor response", rows))

    kept: Any = {"files": StageFiles(folder), "anchor": anchor}
    scorer, _ = make_scorer(run.ppo.reward, backbone, run.folder, budget, columns, **kept)
    scorer.set_moments((read_summary(RunFiles(run.folder).stage("ppo")) or {}).get("moments", {}))
    everything = PromptSet(list(prompts), [codec.encode_prompt(prompt) for prompt in prompts], columns)
    size = max(1, settings.sampling.batch_size // n)
    for first in range(start, len(prompts), size):
        numbers = range(first, min(first + size, len(prompts)))
        batch = everything.take(numbers)
        each = [(row, number * n + i) for row, number in zip(batch.ids, numbers, strict=True) for i in range(n)]
        several = drawn(ANCHOR, [row for row, _ in each], "best of", [number for _, number in each])
        best = best_of(scorer, codec, batch, several, n, backbone.pad_token_id)
        own = drawn(POLICY, batch.ids, POLICY, numbers)  # what the candidate says
        kls = _kl(backbone, Sequences.of(own, backbone.pad_token_id), settings.sampling.temperature, budget)
        for response, score, tokens, kl in zip(best.texts, best.scores, best.lengths, kls, strict=True):
            yield {"response": response, "score": score, "tokens": tokens, "policy_kl": kl}


def _kl(backbone: Backbone, sequences: Sequences, temperature: float, budget: int) -> list[float]:
    """log π(y) − log π_anchor(y) of each response y, whose mean over the policy's samples is the KL."""

    def compute(part: Sequences) -> Tensor:
        return backbone.response_logprobs(part, temperature)[0]

    policy_BR, anchor_BR = (for_each_token(backbone, role, sequences, budget, compute) for role in (POLICY, ANCHOR))
    return (policy_BR - anchor_BR).sum(dim=1).tolist()

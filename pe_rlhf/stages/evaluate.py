"""The evaluate stage: the policy against the anchor on held-out prompts, as a win-rate with its interval."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pe_rlhf.config import EvaluateConfig, PPOConfig, SamplingConfig
from pe_rlhf.data.prompt_order import PromptSet
from pe_rlhf.evaluation.best_of import best_of
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.passes import for_each_token
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.report.format import conversation
from pe_rlhf.rollout.by_task import sample
from pe_rlhf.rollout.interface import RolloutEngine
from pe_rlhf.rollout.mismatch_limit import mismatch_metrics
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.metrics import read_summary
from pe_rlhf.runs.saved_roles import load_role
from pe_rlhf.scoring.model_judges import ask_judge, make_judge
from pe_rlhf.scoring.weighted import WeightedScorer, make_scorer
from pe_rlhf.stages.anchor_texts import AnchorTexts
from pe_rlhf.stages.context import StageContext
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.files import append_jsonl, write_json
from pe_rlhf.system.memory import peak_memory
from pe_rlhf.system.processes import is_main
from pe_rlhf.system.progress import progress
from pe_rlhf.system.seeding import derive_seed
from pe_rlhf.types import Rollout, Sequences
from reward.asking import Pair, make_pairs
from reward.summary import Outcome, summarise

RESULTS = ("win_rate", "ci_low", "ci_high", "n", "wins", "ties", "losses", "invalid", "flip_share", "position_bias")
RESULTS += (
    "label_mass",
    "jury_agreement",
    "length_controlled_win_rate",
    "length_controlled_ci_low",
    "length_controlled_ci_high",
)


def run(context: StageContext[EvaluateConfig]) -> dict[str, Any]:
    """Sample both, have them compared, and write `summary.json`, `metrics.jsonl` and `samples.jsonl`."""
    return evaluate_policy(context, RunFiles(context.run_dir).role("policy").folder, with_reward=True)


def evaluate_policy(
    context: StageContext[EvaluateConfig], policy: Path, *, with_reward: bool, task: str | None = None
) -> dict[str, Any]:
    """The policy of a folder as the recipe says.

    task: what a routed policy is asked for; default: what the prompts' column `source` says.
    with_reward: also what the run's reward thinks of both sides and of the best of n, which only the run itself knows.
    """
    config, ppo = context.config, context.section("ppo", PPOConfig)
    start = time.monotonic()
    judge = make_judge(config.judge) if is_main() else None
    backbone = context.backbone()
    codec = context.codec(backbone)
    load_role(backbone, "policy", policy)
    asked = context.prompts(config.prompts, codec, backbone, config.sampling.max_new_tokens)
    asked = asked.routed(backbone.tasks_of("policy"), "evaluate.prompts", task)
    repeated = asked.take([i for i in range(len(asked)) for _ in range(config.samples_per_prompt)])

    n = (config.policy.best_of or 0) if with_reward else 0
    sampler, rollouts, several = _sample(context, backbone, asked.ids, repeated, n)
    texts = {role: codec.texts(rollout) for role, rollout in rollouts.items()}

    def ask(responses: list[str], name: str, title: str, verdicts: Path) -> list[Outcome]:
        names, max_invalid = (name, "anchor"), config.max_invalid_share
        pairs = make_pairs(repeated.prompts, responses, texts["anchor"])
        return on_main(lambda: ask_judge(judge, pairs, verdicts, title=title, names=names, max_invalid=max_invalid))

    outcomes = ask(texts["policy"], "policy", "evaluate: judging", context.files.verdicts)
    result = summarise("policy", outcomes)
    sequences = {role: Sequences.of(rollout, backbone.pad_token_id) for role, rollout in rollouts.items()}
    rewards: dict[str, Any] = {}
    if with_reward:
        # What the reward that was optimised thinks of both, beside what the judge does: they part where it was hacked.
        anchor = AnchorTexts(context, backbone, codec, config.sampling, asked.ids)
        anchor.engine = sampler
        scorer = _scorer_of_ppo(context, backbone, ppo, asked.columns, anchor)
        for role in rollouts:
            scores_B = scorer.score(repeated.prompts, texts[role], sequences[role], repeated.columns)
            rewards[f"reward_{role}"] = scores_B.mean().item()
            rewards |= {f"{name}_{role}": v for name, v in scorer.metrics.items() if not name.endswith("_std")}
        if several is not None:
            best = best_of(scorer, codec, repeated, several, n, backbone.pad_token_id)
            verdicts = context.files.best_of_verdicts
            rewards |= best.metrics(ask(best.texts, "best_of", f"evaluate: judging the best of {n}", verdicts))
    summary = {
        **{key: result[key] for key in RESULTS if key in result},
        **_policy_metrics(backbone, rollouts["policy"], sequences["policy"], config.sampling, ppo),
        **{f"mean_length_{role}": rollout.tokens() / len(rollout.responses) for role, rollout in rollouts.items()},
        **{f"gold_{side}": score for side, score in mean_scores(outcomes).items()},
        **rewards,
        "seconds": round(time.monotonic() - start, 2),
        **peak_memory(),
    }
    writer = context.metrics()
    writer.write(ppo.steps, {name: value for name, value in summary.items() if value is not None})
    writer.close()
    pairs = make_pairs(repeated.prompts, texts["policy"], texts["anchor"])
    on_main(lambda: _write_samples(context, pairs, outcomes, config.table_rows))
    write_json(context.files.summary, summary)
    return summary


def _sample(
    context: StageContext[EvaluateConfig], backbone: Backbone, prompts: Sequence[list[int]], asked: PromptSet, n: int
) -> tuple[RolloutEngine, dict[str, Rollout], Rollout | None]:
    """Responses of the policy and of the anchor, and the anchor's `n` further ones to each prompt; the engine is left
    playing the anchor.

    prompts: all that the engine will be asked, as tokens. asked: one row for each response of the policy.
    """
    sampling, seed = context.config.sampling, partial(derive_seed, context.recipe.seed, "evaluate")
    rollouts: dict[str, Rollout] = {}
    with progress("evaluate: sampling", (2 + n) * len(asked), "responses") as advance:
        sampler = context.sampler(backbone, "policy", sampling, prompts, advance)
        for version, role in enumerate(("policy", ANCHOR)):
            sampler.sync(version, role)
            rollouts[role] = sample(sampler, asked.ids, seed(role), asked.tasks)
        several = [ids for ids in asked.ids for _ in range(n)]
        return sampler, rollouts, sampler.generate(several, seed("best of")) if n else None


def _scorer_of_ppo(
    context: StageContext[EvaluateConfig],
    backbone: Backbone,
    ppo: PPOConfig,
    columns: Collection[str],
    anchor: AnchorTexts,
) -> WeightedScorer:
    """What PPO optimised, as it stood at its end."""
    scorer, _ = make_scorer(
        ppo.reward, backbone, context.run_dir, ppo.micro_batch_tokens, columns, files=context.files, anchor=anchor
    )
    scorer.set_moments((read_summary(RunFiles(context.run_dir).stage("ppo")) or {}).get("moments", {}))
    return scorer


def _policy_metrics(
    backbone: Backbone, rollout: Rollout, sequences: Sequences, sampling: SamplingConfig, ppo: PPOConfig
) -> dict[str, float]:
    """KL(policy ‖ anchor) in nats per response from the policy's own samples, and whether they were the policy's."""

    policy_BR, anchor_BR = logprobs_of(backbone, ("policy", ANCHOR), sequences, sampling, ppo)
    sampler_N = torch.tensor([value for row in rollout.logprobs for value in row])
    policy_N, anchor_N = (values_BR[sequences.mask_BR] - sampler_N for values_BR in (policy_BR, anchor_BR))
    kl = (policy_BR - anchor_BR).sum().item() / len(sequences)
    return {"kl": kl, **mismatch_metrics(policy_N, sampling, backbone.precision, anchor_N)}


def logprobs_of(
    backbone: Backbone, roles: Sequence[str], sequences: Sequences, sampling: SamplingConfig, ppo: PPOConfig
) -> list[Tensor]:
    """The log-probs _BR that each role gives the responses, at the temperature that they were sampled at."""

    def compute(part: Sequences) -> Tensor:
        return backbone.response_logprobs(part, sampling.temperature)[0]

    return [for_each_token(backbone, role, sequences, ppo.micro_batch_tokens, compute) for role in roles]


def mean_scores(outcomes: list[Outcome]) -> dict[str, float | None]:
    """The judge's own mean score of the policy and of the anchor; None where it gives no scores."""
    scores = {"policy": [o.verdict.score_a for o in outcomes], "anchor": [o.verdict.score_b for o in outcomes]}
    known = {side: [score for score in given if score is not None] for side, given in scores.items()}
    return {side: sum(given) / len(given) if given else None for side, given in known.items()}


def _write_samples(
    context: StageContext[EvaluateConfig], pairs: list[Pair], outcomes: list[Outcome], table_rows: int
) -> None:
    """All comparisons to `samples.jsonl`; the first of them side by side to `samples.md`."""
    path = context.files.samples
    path.unlink(missing_ok=True)
    table = ["| prompt | policy | anchor | policy wins |", "|---|---|---|---|"]
    outcome_of = {(outcome.verdict.position, outcome.verdict.sample): outcome for outcome in outcomes}
    for pair in pairs:
        outcome = outcome_of[pair.position, pair.sample]
        preference = None if math.isnan(outcome.preference) else outcome.preference
        row = {
            "prompt": pair.prompt,
            "response_policy": pair.candidate,
            "response_anchor": pair.baseline,
            "preference": preference,
            "score_policy": outcome.verdict.score_a,
            "score_anchor": outcome.verdict.score_b,
        }
        append_jsonl(path, row)
        cells = (conversation(pair.prompt), pair.candidate, pair.baseline, preference)
        table.append("| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |")
    context.files.samples_table.write_text("\n".join(table[: table_rows + 2]) + "\n", encoding="utf-8")

"""The preferences stage: sample two responses for each prompt, have a judge label them, write a preference file.

Nothing is trained here. Any judge will do; one that sees an order is asked both ways, and a pair whose verdict turns
with the order has no winner. Verdicts are on disk as they come: a stage that was interrupted asks nothing twice.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from pe_rlhf.config import PreferencesConfig, SamplingConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.passes import for_each_token
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.rollout.mismatch_limit import mismatch_metrics
from pe_rlhf.scoring.model_judges import ask_judge, make_judge
from pe_rlhf.stages.context import StageContext
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.files import write_json, write_jsonl
from pe_rlhf.system.memory import peak_memory
from pe_rlhf.system.processes import is_main
from pe_rlhf.system.progress import progress
from pe_rlhf.system.seeding import derive_seed
from pe_rlhf.types import Rollout, Sequences
from reward.asking import Pair, make_pairs
from reward.errors import InputError
from reward.summary import Outcome

MICRO_BATCH_TOKENS = 1024  # as the other stages' default; the passes have no gradients


def run(context: StageContext[PreferencesConfig]) -> dict[str, Any]:
    """Write `preferences.jsonl` in TRL's explicit-prompt format. Raises `InputError` where every pair is a tie."""
    config = context.config
    start = time.monotonic()
    judge = make_judge(config.judge) if is_main() else None
    backbone = context.backbone()
    codec = context.codec(backbone)
    asked = context.prompts(config.prompts, codec, backbone, config.sampling.max_new_tokens)
    prompts, prompt_ids = [*asked.prompts] * config.pairs_per_prompt, [*asked.ids] * config.pairs_per_prompt

    # 1. two responses for each prompt, from the anchor
    seed = derive_seed(context.recipe.seed, "preferences")
    with progress("preferences: sampling", 2 * len(prompts), "responses") as advance:
        sampler = context.sampler(backbone, ANCHOR, config.sampling, prompt_ids, advance)
        sampler.sync(0)
        rollout = sampler.generate(prompt_ids * 2, seed)
    mismatch = _mismatch(backbone, rollout, config.sampling)
    texts = codec.texts(rollout)
    first, second = texts[: len(prompts)], texts[len(prompts) :]

    # 2. the judge says which is better
    pairs = make_pairs(prompts, first, second)
    options: Any = {
        "title": "preferences: judging",
        "names": ("first", "second"),
        "max_invalid": config.max_invalid_share,
    }
    outcomes = on_main(lambda: ask_judge(judge, pairs, context.files.verdicts, **options))

    # 3. pairs with a winner go into the file
    cut = rollout.truncated_B.tolist()
    cuts = zip(cut[: len(pairs)], cut[len(pairs) :], strict=True)
    labelled = (_row(pair, outcome, *ends) for pair, outcome, ends in zip(pairs, outcomes, cuts, strict=True))
    rows = [row for row in labelled if row is not None and _margin(row) > config.min_margin]
    if not rows:
        raise InputError(
            f"preferences.judge: {config.judge.kind} found no difference in any of {len(pairs)} pairs",
            kind="empty",
            key="preferences.judge",
        )
    write_jsonl(context.files.preferences, rows)

    summary = {
        "prompts": len(prompts) // config.pairs_per_prompt,
        "pairs": len(rows),
        "pairs_dropped": len(pairs) - len(rows),
        "invalid": sum(math.isnan(outcome.preference) for outcome in outcomes),
        "flips": sum(outcome.flipped for outcome in outcomes),
        **_mean_scores(rows),
        **mismatch,
        "seconds": round(time.monotonic() - start, 2),
        **peak_memory(),
    }
    writer = context.metrics()
    writer.write(1, summary)
    writer.close()
    write_json(context.files.summary, summary)
    return summary


def _mismatch(backbone: Backbone, rollout: Rollout, sampling: SamplingConfig) -> dict[str, float]:
    """Whether the responses were the anchor's, as metrics. Raises `TrainingError` where they were not."""
    sequences = Sequences.of(rollout, backbone.pad_token_id)

    def compute(part: Sequences) -> Tensor:
        return backbone.response_logprobs(part, sampling.temperature)[0]

    with torch.no_grad():
        anchor_BR = for_each_token(backbone, ANCHOR, sequences, MICRO_BATCH_TOKENS, compute)
    sampler_N = torch.tensor([value for row in rollout.logprobs for value in row])
    return mismatch_metrics(anchor_BR[sequences.mask_BR] - sampler_N, sampling, backbone.precision)


def _row(pair: Pair, outcome: Outcome, first_cut: bool, second_cut: bool) -> dict[str, Any] | None:
    """A preference record, or None where there is no winner or nothing to learn from."""
    if math.isnan(outcome.preference) or outcome.preference == 0.5 or outcome.flipped:
        return None
    sides = [
        (pair.candidate, first_cut, outcome.verdict.score_a, outcome.preference),
        (pair.baseline, second_cut, outcome.verdict.score_b, 1 - outcome.preference),
    ]
    winner, loser = sides if outcome.preference > 0.5 else reversed(sides)
    chosen, rejected = winner[0].strip(), loser[0].strip()
    if not chosen or not rejected or chosen == rejected:
        return None
    row: dict[str, Any] = {
        "prompt": pair.prompt,
        "chosen": winner[0],
        "rejected": loser[0],
        "chosen_truncated": winner[1],
        "rejected_truncated": loser[1],
        "preference": winner[3],
    }
    if winner[2] is not None and loser[2] is not None:
        row |= {"score_chosen": winner[2], "score_rejected": loser[2]}
    return row


def _margin(row: dict[str, Any]) -> float:
    """By how much the winner won: of the scores where the judge gives some, else of the probabilities."""
    if "score_chosen" in row:
        return row["score_chosen"] - row["score_rejected"]
    return 2 * row["preference"] - 1


def _mean_scores(rows: list[dict[str, Any]]) -> dict[str, float]:
    scored = [row for row in rows if "score_chosen" in row]
    keys = ("score_chosen", "score_rejected") if scored else ()
    return {f"mean_{key}": sum(row[key] for row in scored) / len(scored) for key in keys}

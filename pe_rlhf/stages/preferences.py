"""The preferences stage: sample two responses for each prompt, have a judge label them, write a preference file.

Left out of it: nothing is trained, and the judge here is a Python function of prompts and responses.
"""

from __future__ import annotations

import json
import time
from typing import Any

from pe_rlhf.distributed import on_main
from pe_rlhf.files import write_whole
from pe_rlhf.metrics import write_json
from pe_rlhf.progress import progress
from pe_rlhf.resources import peak_memory
from pe_rlhf.seeding import derive_seed
from pe_rlhf.stages.context import StageContext
from reward.errors import InputError
from reward.judges import Comparison, FunctionJudge, load_function

FILE = "preferences.jsonl"


def run(context: StageContext) -> dict[str, Any]:
    """Write `preferences.jsonl` in TRL's explicit-prompt format. Raises `InputError` where every pair is a tie."""
    config = context.recipe.preferences
    assert config is not None
    start = time.monotonic()
    judge = FunctionJudge(load_function(config.judge))
    backbone = context.backbone()
    codec = context.codec(backbone)
    prompts, prompt_ids = context.prompts(config.prompts, codec, backbone, config.sampling.max_new_tokens)
    prompts, prompt_ids = prompts * config.pairs_per_prompt, prompt_ids * config.pairs_per_prompt

    # 1. two responses for each prompt, from the anchor
    seed = derive_seed(context.recipe.seed, "preferences")
    with progress("preferences: sampling", 2 * len(prompts), "responses") as advance:
        engine = context.rollout(backbone, "anchor", config.sampling, prompt_ids, advance)
        engine.sync(0)
        rollout = engine.generate(prompt_ids * 2, seed)
    texts = [codec.decode(ids) for ids in rollout.responses]
    first, second = texts[: len(prompts)], texts[len(prompts) :]

    # 2. the judge says which is better
    comparisons = [Comparison(p, a, b) for p, a, b in zip(prompts, first, second, strict=True)]
    verdicts = on_main(lambda: judge.compare(comparisons))

    # 3. pairs with a winner go into the file
    cut = rollout.truncated_B.tolist()
    rows: list[dict[str, Any]] = []
    for i, (comparison, verdict) in enumerate(zip(comparisons, verdicts, strict=True)):
        cuts = {"a": cut[i], "b": cut[i + len(prompts)]}
        row = _row(comparison, verdict.preference, verdict.score_a or 0.0, verdict.score_b or 0.0, cuts)
        chosen, rejected = row["chosen"].strip(), row["rejected"].strip()
        usable = chosen and rejected and chosen != rejected
        if verdict.preference != 0.5 and usable and row["score_chosen"] - row["score_rejected"] > config.min_margin:
            rows.append(row)
    if not rows:
        raise InputError(f"preferences.judge: {config.judge} found no difference in any of {len(comparisons)} pairs")
    write_whole(context.folder / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    summary = {
        "prompts": len(prompts) // config.pairs_per_prompt,
        "pairs": len(rows),
        "pairs_dropped": len(comparisons) - len(rows),
        "mean_score_chosen": sum(row["score_chosen"] for row in rows) / len(rows),
        "mean_score_rejected": sum(row["score_rejected"] for row in rows) / len(rows),
        "seconds": round(time.monotonic() - start, 2),
        **peak_memory(),
    }
    metrics = context.metrics()
    metrics.write(1, summary)
    metrics.close()
    write_json(context.folder / "summary.json", summary)
    return summary


def _row(
    comparison: Comparison, preference: float, score_a: float, score_b: float, cuts: dict[str, bool]
) -> dict[str, Any]:
    a_wins = preference > 0.5
    winner, loser = ("a", "b") if a_wins else ("b", "a")
    text = {"a": comparison.response_a, "b": comparison.response_b}
    score = {"a": score_a, "b": score_b}
    return {
        "prompt": comparison.prompt,
        "chosen": text[winner],
        "rejected": text[loser],
        "chosen_truncated": cuts[winner],
        "rejected_truncated": cuts[loser],
        "score_chosen": score[winner],
        "score_rejected": score[loser],
    }

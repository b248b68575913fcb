"""A reward model on preference pairs: scores, summary and page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

from pe_rlhf.config.evaluate import RewardEvaluationSettings
from pe_rlhf.data.rows import load_preferences, say_bad_rows
from pe_rlhf.report.evaluation_page import write_reward_report
from pe_rlhf.runs.layout import EvaluationFiles
from pe_rlhf.runs.own_output import content_hash, refuse_other_question
from pe_rlhf.runs.saved_roles import weights_of
from pe_rlhf.scoring.reward_judge import RewardScores, load_rewards
from pe_rlhf.scoring.reward_templates import template_check
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.files import write_json, write_whole
from pe_rlhf.system.progress import progress
from reward.agreement import agreement
from reward.errors import InputError
from reward.judges import score_responses
from reward.pair_metrics import ScoredPair, reward_metrics
from reward.records import PreferenceRecord, Prompt, parse_rows


def evaluate_reward_model(
    model: str,
    settings: RewardEvaluationSettings,
    folder: Path,
    *,
    second: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    device: str = "auto",
) -> dict[str, Any]:
    """Write `summary.json` and `report.html` to `folder`; return the summary. Raises `InputError` for bad input."""
    pairs, share = settings.pairs.title, settings.max_bad_share
    _, records, bad = load_preferences(settings.pairs, "PAIRS", share, lambda record: record)
    say_bad_rows("PAIRS", bad)
    records = records[:limit]
    models = [model] if second is None else [model, second]
    asked = {
        "model": model,
        "second": second,
        "pairs": pairs,
        "dtype": dtype,
        "weights": [weights_of(name, "reward") for name in models],
        "content": content_hash([astuple(record) for record in records]),
    }
    refuse_other_question(EvaluationFiles(folder).summary, asked)
    kept, of_models = [*range(len(records))], list[dict[int, tuple[float, float]]]()
    for name in models:  # all of them before the first one scores, which may take hours
        kept = _readable(records, kept, template_check(name, "MODEL"), share)
    for name in models:
        _, _, function = load_rewards(name, dtype, device, as_trained=True)
        scores = _scores(function, [records[i] for i in kept], name, batch_size)
        of_models.append(dict(zip(kept, scores, strict=True)))
    margins: list[list[float]] = []
    summaries: list[dict[str, Any]] = []
    for name, scores in zip(models, of_models, strict=True):
        scored = [
            ScoredPair(*scores[i], len(records[i].chosen), len(records[i].rejected), records[i].subset) for i in kept
        ]
        summaries.append({"model": name, **reward_metrics(scored)})
        margins.append([pair.margin for pair in scored])
    summary = summaries[0] | {"pairs": pairs}
    if second is not None:
        votes = [[(margin > 0) / 2 + (margin >= 0) / 2 for margin in column] for column in margins]
        both = agreement(votes[0], votes[1])
        kappa = None if math.isnan(both.kappa) else both.kappa  # of two that are always of the same opinion
        summary |= {"second": summaries[1], "agreement": both.accuracy, "agreement_kappa": kappa}
    summary["asked"] = asked
    folder.mkdir(parents=True, exist_ok=True)
    write_json(EvaluationFiles(folder).summary, summary)
    write_whole(EvaluationFiles(folder).report, write_reward_report(summary))
    return summary


def _readable(
    records: Sequence[PreferenceRecord], numbers: Sequence[int], check: Callable[[Prompt], None], max_bad_share: float
) -> list[int]:
    """Those of the pairs whose prompt a chat template takes. Raises `InputError` where it refuses too many."""

    def read(row: Mapping[str, object]) -> int:
        number = row["number"]
        assert isinstance(number, int)
        check(records[number].prompt)
        return number

    numbered = ({"number": number} for number in numbers)
    kept, refused = parse_rows(numbered, read, "the pairs", max_bad_share, "PAIRS")
    say_bad_rows("PAIRS", refused)
    return kept


def _scores(
    function: RewardScores, records: Sequence[PreferenceRecord], name: str, batch_size: int
) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    with progress(f"scoring with {name}", len(records), "pairs") as advance:
        for start in range(0, len(records), batch_size):
            batch = records[start : start + batch_size]
            texts = [record.chosen for record in batch] + [record.rejected for record in batch]
            cut = [record.chosen_truncated for record in batch] + [record.rejected_truncated for record in batch]
            try:
                scores = score_responses(partial(function, cut=cut), [record.prompt for record in batch] * 2, texts)
            except InputError as error:
                raise TrainingError(f"{name}: {error}", kind=error.kind, key="MODEL", row=error.row) from error
            found += zip(scores[: len(batch)], scores[len(batch) :], strict=True)
            advance(len(batch))
    return found

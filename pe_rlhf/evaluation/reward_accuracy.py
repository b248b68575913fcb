"""A reward model on preference pairs: scores, summary and page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

from pe_rlhf.config import DataSource
from pe_rlhf.data.data_sources import load_rows
from pe_rlhf.report.evaluation_page import write_reward_report
from pe_rlhf.runs.layout import EvaluationFiles
from pe_rlhf.runs.own_output import content_hash, refuse_other_question
from pe_rlhf.runs.saved_roles import weights_of
from pe_rlhf.scoring.reward_judge import RewardScores, reward_scores
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.files import write_json, write_whole
from pe_rlhf.system.progress import progress, say
from reward.agreement import agreement
from reward.errors import InputError
from reward.judges import score_responses
from reward.pair_metrics import ScoredPair, reward_metrics
from reward.records import PreferenceRecord, parse_record, parse_rows

MAX_BAD_SHARE = 0.05


def evaluate_reward_model(
    model: str,
    pairs: str,
    folder: Path,
    *,
    second: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    device: str = "auto",
) -> dict[str, Any]:
    """Write `summary.json` and `report.html` to `folder`; return the summary. Raises `InputError` for bad input."""
    records, subsets = load_subset_records(pairs, limit)
    models = [model] if second is None else [model, second]
    asked = {
        "model": model,
        "second": second,
        "pairs": pairs,
        "dtype": dtype,
        "weights": [weights_of(name, "reward") for name in models],
        "content": content_hash([[astuple(record) for record in records], subsets]),
    }
    refuse_other_question(EvaluationFiles(folder).summary, asked)
    margins: list[list[float]] = []
    summaries: list[dict[str, Any]] = []
    for name in models:
        scores = _scores(reward_scores(name, dtype, device, as_trained=True), records, name, batch_size)
        scored = [
            ScoredPair(chosen, rejected, len(record.chosen), len(record.rejected), subset)
            for (chosen, rejected), record, subset in zip(scores, records, subsets, strict=True)
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


def load_subset_records(pairs: str, limit: int | None) -> tuple[list[PreferenceRecord], list[str]]:
    """Pairs and the subset of each (`all` without such a column); unusable rows are left out, up to a share of 5 %."""
    rows = load_rows(DataSource(path=pairs), "PAIRS")[:limit]

    def parse(row: Mapping[str, Any]) -> tuple[PreferenceRecord, str]:
        return parse_record(row), str(row.get("subset") or "all")

    found, bad = parse_rows(rows, parse, pairs, MAX_BAD_SHARE, "PAIRS")
    if bad:
        say(f"{pairs}: left out {len(bad)} unusable rows; the first is row {bad[0].row}: {bad[0].reason}")
    return [record for record, _ in found], [subset for _, subset in found]


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

"""`pe-rlhf winrate`: results from a file of verdicts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from reward.summary import Outcome

DIFFICULTY_FILES = ("instruction_difficulty*.csv", "df_gamed.csv")


def winrate(
    verdicts: Annotated[Path, typer.Argument(help="jsonl, json or csv (or .gz), one verdict per row.")],
    difficulty: Annotated[
        Path | None,
        typer.Option(
            help="AlpacaEval's instruction_difficulty.csv or df_gamed.csv, for verdicts that have a `position` but no"
            " `difficulty`. Left out, such a file beside the verdicts is taken."
        ),
    ] = None,
    pairwise: Annotated[
        bool, typer.Option("--pairwise", help="Compare every two candidates on the prompts they share.")
    ] = False,
    ranking: Annotated[
        bool, typer.Option("--ranking", help="Rank all policies, baselines too (Bradley–Terry, in nats).")
    ] = False,
    level: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Win-rate, intervals and length-controlled win-rate of each candidate, one JSON line each.

    Columns: preference (probability that the candidate wins), and optionally candidate, baseline, position, sample,
    order (candidate_first, baseline_first), len_candidate, len_baseline, difficulty, human. AlpacaEval's annotation
    files are read as they are. All rates are shares in [0, 1].
    """
    from reward.summary import group_by_candidate, pair_up
    from reward.verdicts import read_verdicts

    outcomes = pair_up(read_verdicts(verdicts))
    if pairwise or ranking:
        lines = _pairwise(group_by_candidate(outcomes), level) if pairwise else _ranking(outcomes, level)
    else:
        lines = _results(group_by_candidate(outcomes), _difficulty_table(verdicts, difficulty), level)
    for line in lines:
        typer.echo(json.dumps(line, ensure_ascii=False))


def _results(
    groups: dict[str, list[Outcome]], difficulty: list[float] | None, level: float
) -> Iterator[dict[str, Any]]:
    from reward.summary import summarise

    for candidate, outcomes in groups.items():
        yield summarise(candidate, outcomes, difficulty, level)


def _difficulty_table(verdicts: Path, named: Path | None) -> list[float] | None:
    from reward.verdicts import read_difficulty

    beside = (path for pattern in DIFFICULTY_FILES for path in sorted(verdicts.parent.glob(pattern)))
    path = named or next(beside, None)
    return read_difficulty(path) if path is not None and path != verdicts else None


def _pairwise(groups: dict[str, list[Outcome]], level: float) -> Iterator[dict[str, Any]]:
    import math
    from collections import defaultdict
    from dataclasses import asdict

    from reward.errors import InputError
    from reward.winrate import compare_policies

    by_prompt: dict[str, dict[Any, list[float]]] = {}
    for candidate, outcomes in groups.items():
        prompts: dict[Any, list[float]] = defaultdict(list)
        for outcome in outcomes:
            if outcome.row.position is None:
                raise InputError("--pairwise needs the column 'position', to find the same prompts by")
            if not math.isnan(outcome.preference):
                prompts[outcome.row.position].append(outcome.preference)
        by_prompt[candidate] = prompts
    if len(groups) < 2:
        raise InputError("--pairwise needs at least two candidates")
    baselines = sorted({outcome.row.baseline or "" for outcomes in groups.values() for outcome in outcomes})
    if len(baselines) > 1:
        raise InputError(f"--pairwise compares candidates by one baseline; there are {', '.join(map(repr, baselines))}")
    for a, b in itertools.combinations(by_prompt, 2):
        yield {"candidate_a": a, "candidate_b": b, **asdict(compare_policies(by_prompt[a], by_prompt[b], level))}


def _ranking(outcomes: list[Outcome], level: float) -> Iterator[dict[str, Any]]:
    import math
    from dataclasses import asdict

    from reward.ranking import bradley_terry

    valid = [outcome for outcome in outcomes if not math.isnan(outcome.preference)]
    rows = [outcome.row for outcome in valid]
    comparisons = [(row.candidate, row.baseline, o.preference) for row, o in zip(rows, valid, strict=True)]
    clusters = [i if row.position is None else ("position", row.position) for i, row in enumerate(rows)]
    for strength in bradley_terry(comparisons, clusters, level):
        yield asdict(strength)

"""`pe-rlhf winrate`: results from a file of verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

DIFFICULTY_FILES = ("instruction_difficulty*.csv", "df_gamed.csv")


def winrate(
    verdicts: Annotated[Path, typer.Argument(help="jsonl, json or csv (or .gz), one verdict per row.")],
    difficulty: Annotated[
        Path | None,
        typer.Option(
            help="AlpacaEval's instruction_difficulty.csv or df_gamed.csv, for verdicts that have a `position` but no"
            " `difficulty`. Default: such a file beside the verdicts."
        ),
    ] = None,
    level: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Win-rate, intervals and length-controlled win-rate of each candidate (and judge), one JSON line each.

    Columns: preference (probability that the candidate wins), and optionally candidate, baseline, position, sample,
    order (candidate_first, baseline_first), len_candidate, len_baseline, difficulty, human. AlpacaEval's annotation
    files are read as they are. All rates are shares in [0, 1].
    """
    from reward.summary import group_by_candidate, pair_up, summarise
    from reward.verdicts import read_difficulty, read_verdicts

    groups = group_by_candidate(pair_up(read_verdicts(verdicts)))
    beside = (path for pattern in DIFFICULTY_FILES for path in sorted(verdicts.parent.glob(pattern)))
    table = difficulty or next(beside, None)
    known = read_difficulty(table) if table is not None and table != verdicts else None
    several = len({judge for _, judge in groups}) > 1
    for (candidate, judge), outcomes in groups.items():
        line = summarise(candidate, outcomes, known, level) | ({"judge": judge} if several else {})
        typer.echo(json.dumps(line, ensure_ascii=False))

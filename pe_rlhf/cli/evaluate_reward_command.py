"""`pe-rlhf evaluate-reward`: how far a reward model can be trusted, on preference pairs."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate_reward(
    model: Annotated[str, typer.Argument(help="A reward run (its directory), or a model with one label.")],
    pairs: Annotated[
        str, typer.Argument(help="Preference pairs: a file or hub id; a column `subset` splits the results.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings of the pairs, as of reward.data: pairs.format=hh_rlhf pairs.columns.chosen=good"
            " pairs.split=test …, and max_bad_share.",
        ),
    ] = None,
    second: Annotated[str | None, typer.Option(help="Another reward run or model, to see where both agree.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for summary.json and report.html.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take that many pairs, the first ones.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs scored between two lines of progress.")] = 32,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; a run's model is in its recipe's.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    date: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="The day that a chat template prints as today's; a run has its own."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Accuracy with its interval, per subset too, calibration and length bias; one JSON line."""
    from pe_rlhf.config.evaluate import RewardEvaluationSettings
    from pe_rlhf.config.load import apply_overrides, validated

    tree: dict[str, Any] = {"pairs": pairs}
    apply_overrides(tree, overrides or [])
    settings = validated(RewardEvaluationSettings, tree, "settings", overrides or [])

    from pe_rlhf.data.codec import dated
    from pe_rlhf.evaluation.reward_accuracy import evaluate_reward_model
    from pe_rlhf.report.format import slug
    from pe_rlhf.runs.own_output import claim_reward_evaluation

    folder = out or Path("evaluations") / "-".join(("reward", slug(model), slug(pairs)))
    claim_reward_evaluation(folder)
    with dated(None if date is None else date.date().isoformat()):
        summary = evaluate_reward_model(
            model, settings, folder, second=second, limit=limit, batch_size=batch_size, dtype=dtype, device=device
        )
    typer.echo(json.dumps(summary, ensure_ascii=False))
    typer.echo(f"report: {(folder / 'report.html').resolve()}", err=True)

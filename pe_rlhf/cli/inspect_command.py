"""`pe-rlhf inspect`: what an adapter would do, before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of one that comes along.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change, as of run.")] = None,
    inits: Annotated[str, typer.Option(help="Comma-separated inits, or all; the recipe's and lora if left out.")] = "",
    kinds: Annotated[str, typer.Option(help="Comma-separated kinds of adapters, or all, beside the inits.")] = "",
    stage: Annotated[
        str | None, typer.Option(help="Whose loss: reward or ppo; the first of them that the recipe has.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="A run of the recipe: where the pairs that it made are, and for ppo its reward stage."),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="The page; <run dir>/inspect-<stage>.html if left out.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show what adapter inits and kinds would do, before training, on a batch of the recipe's own data.

    For each adapter and layer: norms, where in the weight's spectrum it lies, the cosine between its first step and the
    full gradient beside the best that its rank allows, and its neural tangent kernel against the full model's.
    """
    from pe_rlhf.config.load import find_recipe, load_recipe

    loaded = load_recipe(find_recipe(recipe), overrides)
    chosen = stage or next((name for name in ("reward", "ppo") if name in loaded.stages), "reward")

    from rich.table import Table

    from pe_rlhf.report.format import number
    from pe_rlhf.report.inspect_page import COLUMNS
    from pe_rlhf.runs.own_output import claim_page, refuse_other_question
    from pe_rlhf.stages.inspect import adapters_named, inspect_recipe, question, write_page
    from pe_rlhf.system.progress import console

    folder = run_dir or Path("runs") / loaded.name
    page = to or folder / f"inspect-{chosen}.html"
    claim_page(page)
    named = adapters_named(inits, kinds, loaded, chosen)
    asked = question(loaded, chosen, named)
    refuse_other_question(page.with_suffix(".json"), asked, "--to")
    result = inspect_recipe(loaded, chosen, named, folder, lenient="all" in (inits, kinds))
    for name, reason in result.left_out.items():
        typer.echo(f"left out: {name}: {reason}")
    table = Table(title=f"{loaded.name}: adapters under the loss of {chosen}")
    for heading in ("init", *COLUMNS.values()):
        table.add_column(heading, justify="left" if heading == "init" else "right")
    for total in result.totals():
        table.add_row(total["init"], *(number(total[key]) for key in COLUMNS))
    console.print(table)
    typer.echo(write_page(result, loaded, chosen, page, asked).resolve())

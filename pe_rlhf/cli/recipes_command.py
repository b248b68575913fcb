"""`pe-rlhf recipes`: the recipes that come along, and copies of them to edit."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from reward.errors import InputError

LONGEST = 110  # letters of a sentence in the list


def recipes(
    action: Annotated[str | None, typer.Argument(help="copy: write a recipe to a file; left out: list them.")] = None,
    name: Annotated[str | None, typer.Argument(help="The recipe to copy.")] = None,
    to: Annotated[Path | None, typer.Option(help="Where to; NAME.yaml in this folder if left out.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """List the recipes that come along, a line each, or copy one to edit it.

    A copy finds the data that comes along, too.
    """
    from pe_rlhf.config.load import bundled, find_recipe

    if action is None:
        there = sorted(bundled("recipes").glob("*.yaml"))
        width = max(len(path.stem) for path in there)
        for path in there:
            typer.echo(f"{path.stem:{width}}  {first_sentence(path.read_text(encoding='utf-8'))}")
        return
    if action != "copy":
        message = f"recipes {action}: there is copy only; without a word the recipes are listed"
        raise InputError(message, kind="unknown", key="ACTION")
    if name is None:
        raise InputError(
            "recipes copy: no recipe is named", kind="missing", key="NAME", fix="`pe-rlhf recipes` lists them"
        )
    source = find_recipe(name)
    target = to or Path(f"{source.stem}.yaml")
    if target.is_dir():
        target /= f"{source.stem}.yaml"
    if target.exists():
        raise InputError(f"{target} is there already", kind="exists", key="--to", file=target, fix="name another place")
    text = source.read_text(encoding="utf-8")
    data = source.parent / "data"
    # Data beside the recipe is named from there; a copy is somewhere else.
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(re.sub(r"(?<=path: )data/", f"{data.as_posix()}/", text), encoding="utf-8")
    typer.echo(target)


def first_sentence(text: str) -> str:
    """What a recipe's head begins with, shortened to a line."""
    head = " ".join(line.removeprefix("#").strip() for line in text.split("\n\n", 1)[0].splitlines())
    sentence = re.split(r"\.\s+(?=[A-Z])", head, maxsplit=1)[0].rstrip(".")
    return textwrap.shorten(sentence, LONGEST, placeholder=" …")

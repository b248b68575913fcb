"""The recipes that come along: listed, copied, and dry-run on stand-ins with the columns of their data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pe_rlhf.config.load import bundled, load_recipe
from tests.runs import Outcome, Tree, write_jsonl
from tests.stage_support import byte_model
from tests.unit.data.test_formats import PAIRS

Cli = Callable[..., Outcome]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A row of each hub data set that is read without a format.
ROWS: dict[str, Tree] = {
    "trl-lib/tldr": {"prompt": "SUBREDDIT: r/s\n\nTITLE: T\n\nPOST: P\n\nTL;DR:", "completion": " short"},
    "trl-lib/tldr-preference": {"prompt": "POST: P\n\nTL;DR:", "chosen": " a", "rejected": " b"},
    "openai/gsm8k": {"question": "1 + 1?", "answer": "It is 2.\n#### 2"},
}


def on_the_hub(tree: Any) -> Iterator[Tree]:
    """Every data set of a recipe that is one of the hub."""
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []:
        if isinstance(value, dict) and "/" in value.get("path", "") and not value["path"].startswith("data/"):
            yield value
        else:
            yield from on_the_hub(value)


FOR_THE_HUB = sorted(
    path.stem
    for path in bundled("recipes").glob("*.yaml")
    if any(on_the_hub(yaml.safe_load(path.read_text(encoding="utf-8"))))
)


def test_these_are_for_the_hub() -> None:
    assert {"tldr", "hh_helpful", "hh_harmless", "shp_helpful", "ultrafeedback", "helpsteer3"} <= {*FOR_THE_HUB}


@pytest.mark.parametrize("name", FOR_THE_HUB)
def test_a_recipe_for_hub_data_fits_its_columns(tmp_path: Path, cli: Cli, name: str) -> None:
    tree = yaml.safe_load((bundled("recipes") / f"{name}.yaml").read_text(encoding="utf-8"))
    for number, source in enumerate(on_the_hub(tree)):
        row = ROWS.get(source["path"]) or PAIRS[source["format"]][0]
        stand_in = write_jsonl(tmp_path / f"{number}.jsonl", [row] * 20)
        kept = {key: value for key, value in source.items() if key in ("format", "columns")}
        source.clear()
        source |= {"path": str(stand_in), **kept}
    model = byte_model(tmp_path / "model", pad_is_eos=False, max_position_embeddings=4096)
    tree["model"] = str(model)
    tree["chat_template"] = tree.get("chat_template", CHATML)
    for section in (tree, *tree.get("tasks", [])):
        judge = section.get("evaluate", {}).get("judge")
        if isinstance(judge, dict):
            judge["target"] = str(model)
        elif str(judge).startswith("reward_model:"):
            section["evaluate"]["judge"] = "length"
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    done = cli("run", path, "--dry-run")
    assert done.code == 0, done
    assert "the recipe is valid" in done.out


def test_each_recipe_has_a_line(cli: Cli) -> None:
    listed = cli("recipes").out.splitlines()
    names = sorted(path.stem for path in bundled("recipes").glob("*.yaml"))
    assert [line.split()[0] for line in listed] == names
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in listed)


def test_a_copy_is_the_recipe_wherever_it_is(tmp_path: Path, cli: Cli) -> None:
    assert cli("recipes", "copy", "quickstart").code == 0
    assert cli("recipes", "copy", "smoke", "--to", tmp_path / "there" / "mine.yaml").code == 0
    original = load_recipe(bundled("recipes") / "quickstart.yaml")
    assert load_recipe(tmp_path / "quickstart.yaml") == original
    assert load_recipe(tmp_path / "there" / "mine.yaml").ppo is not None
    again = cli("recipes", "copy", "quickstart")
    assert (again.code, getattr(again.error, "kind", None)) == (2, "exists")


@pytest.mark.parametrize(
    ("arguments", "kind"), [(["copy"], "missing"), (["copy", "quikstart"], "missing"), (["show", "smoke"], "unknown")]
)
def test_what_is_no_recipe(cli: Cli, arguments: list[str], kind: str) -> None:
    refused = cli("recipes", *arguments)
    assert (refused.code, getattr(refused.error, "kind", None)) == (2, kind)

"""The recipes that come along: listed, copied, and dry-run on stand-ins with the columns of their data sets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pe_rlhf.config.load import bundled, load_recipe
from pe_rlhf.model.device_plan import memory_phases
from pe_rlhf.model.memory_plan import GIB, ModelShape
from tests.benchmarks.memory_table import MODELS, shape
from tests.chat_templates import FAMILIES
from tests.documentation import commands
from tests.paths import ROOT
from tests.runs import Outcome, Tree, write_jsonl
from tests.stage_support import byte_model
from tests.unit.data.test_formats import PAIRS
from tests.vllm_routes import Engine, served

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


def for_stand_ins(name: str, folder: Path, *, template: str = CHATML) -> Path:
    """A recipe for rows with the columns of its data sets, and a tiny model with a chat template."""
    tree = yaml.safe_load((bundled("recipes") / f"{name}.yaml").read_text(encoding="utf-8"))
    for number, source in enumerate(on_the_hub(tree)):
        row = ROWS.get(source["path"]) or PAIRS[source["format"]][0]
        stand_in = write_jsonl(folder / f"{number}.jsonl", [row] * 20)
        kept = {key: value for key, value in source.items() if key in ("format", "columns")}
        source.clear()
        source |= {"path": str(stand_in), **kept}
    sizes: Tree = {
        "max_position_embeddings": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
    }  # bitsandbytes takes them
    model = byte_model(folder / "model", pad_is_eos=False, **sizes)
    tree["model"] = str(model)
    tree["chat_template"] = tree.get("chat_template", template)
    for section in (tree, *tree.get("tasks", [])):
        judge = section.get("evaluate", {}).get("judge")
        if isinstance(judge, dict):
            judge["target"] = str(model)
        elif str(judge).startswith("reward_model:"):
            section["evaluate"]["judge"] = "length"
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FOR_THE_HUB)
def test_a_recipe_for_hub_data_fits_its_columns(tmp_path: Path, cli: Cli, name: str) -> None:
    path = for_stand_ins(name, tmp_path)
    compares = "compare" in yaml.safe_load(path.read_text(encoding="utf-8"))
    done = cli("compare" if compares else "run", path, "--dry-run")
    assert done.code == 0, done
    assert "trials and" in done.out if compares else "the recipe is valid" in done.out


@pytest.mark.parametrize("family", ["llama3", "gemma3", "qwen3"])
def test_a_recipe_takes_the_models_that_are_named(tmp_path: Path, cli: Cli, family: str) -> None:
    path = for_stand_ins("hh_helpful", tmp_path, template=FAMILIES[family].template)
    thinks = ["chat_template_kwargs={enable_thinking: false}"] if family == "qwen3" else []
    done = cli("run", path, *thinks, "--dry-run")
    assert done.code == 0, done


ON_THE_PAGE = [command.words[1:] for command in commands() if command.page.name == "recipes.md"]
HARDWARE = [words for words in ON_THE_PAGE if words[0] in ("run", "launch") and words[1] != "RECIPE"]


SERVER = "http://gpu9:8000"


@pytest.mark.parametrize("words", HARDWARE, ids=" ".join)
def test_a_recipe_takes_the_hardware_that_is_named(tmp_path: Path, cli: Cli, words: tuple[str, ...]) -> None:
    command, recipe, *settings = words
    path = for_stand_ins(recipe, tmp_path)
    with served(Engine(str(tmp_path / "model"), length=4096)) as url:  # a dry run asks the servers, too
        settings = [word.replace(SERVER, url) for word in settings if not word.startswith("model=")]
        done = cli(command, path, *settings, "--dry-run")
    assert done.code == 0, done


PLAN = re.compile(r"(\d+) GiB at 1\.5B \(0\.5B: (\d+), 3B: (\d+), 7B: (\d+)\)")
AS_TOLD = ["backbone.dtype=bfloat16", "reward.micro_batch_tokens=8192", "ppo.micro_batch_tokens=8192"]
AS_TOLD += ["ppo.rollout.batch_size=256", "evaluate.sampling.batch_size=256"]


@cache
def shapes() -> dict[str, ModelShape]:
    return {size: shape(*MODELS[size]) for size in ("0.5B", "1.5B", "3B", "7B", "8B")}


def planned(name: str, *settings: str, ranks: int = 1) -> dict[str, int]:
    """GiB of the largest phase on a GPU, for the shapes of real models, as the plan of memory has it."""
    tree = load_recipe(bundled("recipes") / f"{name}.yaml")
    told = [word for word in AS_TOLD if not word.startswith("reward.") or tree.reward is not None]
    recipe = load_recipe(bundled("recipes") / f"{name}.yaml", [*told, *settings])
    recipe = recipe if recipe.tasks is None else recipe.task_recipe(0)
    most = {size: max(phase.total for phase in memory_phases(recipe, one, ranks)) for size, one in shapes().items()}
    return {size: round(total / GIB) for size, total in most.items()}


@pytest.mark.parametrize("name", [name for name in FOR_THE_HUB if name != "hh_small"])  # that is for CPUs
def test_the_memory_in_the_head_is_that_of_the_plan(name: str) -> None:
    head = (bundled("recipes") / f"{name}.yaml").read_text(encoding="utf-8").split("\n\n", 1)[0].replace("\n# ", " ")
    told = PLAN.search(head)
    assert told, head
    plan = planned(name)
    assert list(map(int, told.groups())) == [plan[size] for size in ("1.5B", "0.5B", "3B", "7B")]
    for word in ("Needs:", "Hardware:", "Memory by the plan", "Time:", "Expect:"):
        assert word in head


def test_the_table_of_memory_is_that_of_the_plan() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = page.split("| | 0.5B |")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == 4
    for first, *numbers in rows:
        plan = planned("hh_helpful", *re.findall(r"[\w.]+=\w+", first), ranks=8 if "8 GPUs" in first else 1)
        assert list(map(int, numbers)) == list(plan.values())


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

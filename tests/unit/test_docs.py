"""README and docs say what is true: commands parse, recipes are valid, keys, files, metrics and inits exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from pe_rlhf.adapters.lora.init_registry import init_names
from pe_rlhf.cli.main import app
from pe_rlhf.config import Recipe
from pe_rlhf.config.adapter import AdapterConfig, kind_names, settings_of
from pe_rlhf.config.evaluate import EvaluationSettings
from pe_rlhf.config.load import find_recipe, load_recipe, make_recipe
from reward.errors import KINDS
from tests.benchmarks.results import BEGIN, END
from tests.documentation import OF_A_CHANGED_PACKAGE, PAGES, Block, Command, blocks, commands, inline_code
from tests.paths import ROOT
from tests.unit.test_layering import ORDER

CLI: Any = typer.main.get_command(app)
CODE_FOLDERS = ("pe_rlhf/", "reward/", "tests/", "launch/", "recipes/", "docs/")
RUN_FOLDER = ("runs.md", "reward/")
# A recipe that has every section except sft, which excludes a quantised base: for overrides of recipes of the reader.
WHOLE = """
model: random:tiny-llama
preferences: {prompts: prompts.jsonl, judge: length}
reward: {}
ppo: {prompts: prompts.jsonl}
evaluate: {prompts: prompts.jsonl, judge: length}
"""


def is_placeholder(word: str) -> bool:
    """RECIPE, RUN, seed=N: what the reader fills in."""
    return re.fullmatch(r"(?:[a-z_.]+=)?[A-Z]+", word) is not None


def known_key(key: str, schema: Any = Recipe) -> bool:
    """Whether a recipe can have the key: sections may be optional, in a list, or beside a plain text."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        name, _, rest = key.partition(".")
        if schema is AdapterConfig:  # a key of any kind
            return any(known_key(key, settings_of(kind)) for kind in kind_names())
        field = schema.model_fields.get(name)
        return field is not None and (not rest or known_key(rest, field.annotation))
    if schema is Any:
        return True
    return any(known_key(key, inner) for inner in get_args(schema))


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_every_recipe_is_valid(block: Block) -> None:
    tree = yaml.safe_load(block.text)
    if block.name in OF_A_CHANGED_PACKAGE:
        return
    make_recipe({"name": "example", **tree}, block.page)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_every_python_block_is_python_and_imports_what_there_is(block: Block) -> None:
    made = {other.name.removesuffix(".py").replace("/", ".") for other in blocks("python")}  # by another block
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(("pe_rlhf", "reward")):
            if node.module in made:
                continue
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_every_json_block_is_json(block: Block) -> None:
    for line in block.text.splitlines():
        json.loads(line)


def test_every_block_says_what_it_is() -> None:
    known = {"bash", "python", "yaml", "json", "text", "bibtex", "diff", "toml"}
    assert {str(b) for b in blocks("")} == set()
    assert blocks(*known) != []


@pytest.mark.parametrize("command", commands(), ids=str)
def test_every_command_parses(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A kind of adapter says which keys its section has, so the reader's file has to be there.
    (kinds,) = (block for block in blocks("python") if block.name == "my_kinds.py")
    (tmp_path / kinds.name).write_text(kinds.text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    program, *words = command.words
    CHECKS[program](words, tmp_path)


def _check_own(words: list[str], folder: Path) -> None:
    """Options exist, the recipe does, and what is to be changed in it can be."""
    name, *arguments = words
    command = CLI.commands[name]
    if not arguments:  # only the command's name
        return
    parsed = command.make_context(name, list(arguments))
    if name == "evaluate":
        keys = [word.partition("=")[0] for word in parsed.params["overrides"] or ()]
        assert [key for key in keys if not known_key(key, EvaluationSettings)] == []
    if "recipe" not in parsed.params or is_placeholder(parsed.params["recipe"]):
        return
    # `launch` hands on what it does not know itself, so that overrides are looked for among all words.
    overrides = [w for w in arguments if re.match(r"[a-z_]+[\w.]*=", w) and not is_placeholder(w)]
    named = Path(parsed.params["recipe"])
    if named.name in OF_A_CHANGED_PACKAGE:
        return
    if named.name.startswith("my_"):
        named = folder / named.name
        named.write_text(WHOLE, encoding="utf-8")
    load_recipe(find_recipe(str(named)), overrides)


def _check_make(words: list[str], folder: Path) -> None:
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {word for word in words if "=" not in word} <= targets


def _check_pip(words: list[str], folder: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {extra for word in words for found in re.findall(r"\[(.+)\]", word) for extra in found.split(",")}
    assert named <= extras.keys()


def _check_python(words: list[str], folder: Path) -> None:
    if words[0] == "-m":
        assert words[1] == "build" or importlib.util.find_spec(words[1]) is not None
        return
    if words[0] in {block.name for block in blocks("python")}:
        return
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []


def _check_script(words: list[str], folder: Path) -> None:
    assert (ROOT / next(word for word in words if word.startswith("launch/"))).is_file()


CHECKS: dict[str, Callable[[list[str], Path], None]] = {
    "pe-rlhf": _check_own,
    "make": _check_make,
    "pip": _check_pip,
    ".venv/bin/pre-commit": lambda words, folder: None,
    "python": _check_python,
    "sbatch": _check_script,
    "launch/vllm_server.sh": lambda words, folder: _check_script(["launch/vllm_server.sh"], folder),
}


def test_every_key_of_a_recipe_that_is_named_exists() -> None:
    sections = "|".join(Recipe.model_fields)
    keys = [
        (page.name, match[1])
        for page, code in inline_code()
        if (match := re.fullmatch(rf"((?:{sections})\.[a-z_.]+)(?:(?:: |=).+)?", code))
    ]
    assert len(keys) > 60
    wrong = [(page, key) for page, key in keys if not known_key(key) and not _is_module(key)]
    assert wrong == []


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_every_file_of_the_repository_that_is_named_exists() -> None:
    named = [
        (page.name, code)
        for page, code in inline_code()
        # `reward/` is a package, and a stage's folder in a run.
        if code.startswith(CODE_FOLDERS) and re.fullmatch(r"[\w/.-]+", code) and (page.name, code[:7]) != RUN_FOLDER
    ]
    assert len(named) > 40
    assert [(page, code) for page, code in named if not (ROOT / code).exists()] == []


def test_every_function_that_the_architecture_names_is_in_its_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    text += (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    named = re.findall(r"`([A-Za-z_.]+)`\s+in\s+`(pe_rlhf/[\w/]+\.py)`", text)
    assert len(named) > 5
    wrong = [
        (name, file)
        for name, file in named
        if not re.search(rf"(?:def|class) {name.rpartition('.')[2]}\b", (ROOT / file).read_text(encoding="utf-8"))
    ]
    assert wrong == []


def test_the_links_of_the_readme_lead_somewhere() -> None:
    # Those between the pages of docs/ are checked by `make docs`.
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        text = (ROOT / file).read_bytes()
        slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in _titles(text)}
        assert not anchor or anchor in slugs, target


def _titles(text: bytes) -> list[str]:
    return re.findall(r"^#+ (.+)$", text.decode(errors="ignore"), re.MULTILINE)


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 140
    assert len(text.split()) <= 1000


def test_lists_in_the_docs_are_complete() -> None:
    def first_cells(page: str, heading: str) -> str:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        section = text.split(f"## {heading}\n", 1)[1].split("\n##", 1)[0]
        return "\n".join(line.split("|")[1] for line in section.splitlines() if line.startswith("|"))

    def names(cells: str) -> list[str]:
        return re.findall(r"`([^`]+)`", cells)

    assert [name.rstrip("/").removesuffix(".py") for name in names(first_cells("architecture.md", "Rooms"))] == [*ORDER]
    assert sorted(names(first_cells("adapters.md", "Inits"))) == sorted(["init", *init_names()])
    assert sorted(names(first_cells("adapters.md", "All kinds"))) == sorted(["kind", *kind_names()])
    assert sorted(names(first_cells("runs.md", "failure.json"))) == sorted([*KINDS, "bug"])


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    docs = ROOT / "docs"
    pages = [page.relative_to(docs).as_posix() for page in PAGES if page.is_relative_to(docs)]
    assert [page for page in pages if f": {page}\n" not in menu] == []


RESULTS = sorted(path for path in (ROOT / "docs" / "results").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_every_result_says_where_it_comes_from(folder: Path) -> None:
    index = (folder.parent / "README.md").read_text(encoding="utf-8")
    (line,) = (line for line in index.splitlines() if f"]({folder.name}/README.md)" in line)
    assert re.search(r"\. \| 20\d\d-\d\d-\d\d \|$", line), "a sentence of finding, and a date"
    page = (folder / "README.md").read_text(encoding="utf-8")
    numbers = page.split(BEGIN)[1].split(END)[0]
    origin = r"`(pe-rlhf|python|make) .*`, commits? [0-9a-f]{7,}.*, seeds \d.*, 20\d\d-\d\d-\d\d, \d+ cores, .+"
    assert re.search(origin, numbers)
    assert not re.search(r"[ =]/\w", numbers), "a path of a machine"
    assert "(results.csv)" in numbers
    assert {path.suffix for path in folder.iterdir()} == {".md", ".csv", ".svg"}
    assert all(f"({path.name})" in page for path in folder.glob("*.svg"))

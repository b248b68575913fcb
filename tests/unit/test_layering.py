"""The rooms of the package: one ordered list, from which every import that is allowed follows."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.paths import ROOT

# A room imports only rooms before it. `reward` stands beside the list: it imports nothing of pe_rlhf.
ORDER = (
    *("types", "algo", "system", "config", "adapters", "model", "optim", "data"),
    *("rollout", "runs", "report", "scoring", "evaluation", "comparison", "stages", "cli"),
)
ONLY_IN = {
    "vllm": ("pe_rlhf/rollout/vllm/worker.py",),
    "deepspeed": ("pe_rlhf/optim/zero.py",),
    "trl": ("pe_rlhf/stages/sft_trainer.py",),
    "matplotlib": ("pe_rlhf/report/charts.py",),
    "pe_rlhf.stages": ("pe_rlhf/stages/", "pe_rlhf/cli/"),
}


@cache
def imports(path: Path, root: Path = ROOT) -> frozenset[str]:
    """Full names of what a file imports, anywhere in it: `a.b` and, for `from a import b`, `a.b` too."""
    return frozenset(_imports(path, root))


def _imports(path: Path, root: Path) -> Iterator[str]:
    package = list(path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            argument = node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield str(argument.value)


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"nothing to look at in {folders}"
    return found


def importing(module: str) -> set[str]:
    """The files of the packages that import a module or anything in it."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in files("pe_rlhf", "reward")
        if any(name == module or name.startswith(f"{module}.") for name in imports(path))
    }


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_a_room_imports_only_rooms_before_it() -> None:
    upward = set()
    for path in files(*(f"pe_rlhf/{room}" for room in ORDER if room != "types")):
        own = ORDER.index(path.relative_to(ROOT / "pe_rlhf").parts[0])
        for name in imports(path):
            room = name.split(".")[1] if name.startswith("pe_rlhf.") else None
            if room in ORDER and ORDER.index(room) > own:
                upward.add((path.relative_to(ROOT).as_posix(), name))
    assert upward == set()


def test_every_folder_is_a_room_and_few_files_stand_outside() -> None:
    package = ROOT / "pe_rlhf"
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(ORDER) - {"types"}
    assert {path.name for path in package.glob("*.py")} == {"__init__.py", "__main__.py", "types.py"}


def test_no_circle_of_modules_not_even_for_types() -> None:
    modules = {module_name(path): path for path in files("pe_rlhf", "reward")}
    arrows: dict[str, set[str]] = {}
    for module, path in modules.items():
        named = (name if name in modules else name.rpartition(".")[0] for name in imports(path))
        arrows[module] = {name for name in named if name in modules} - {module}
    free: set[str] = set()
    while ready := {module for module in arrows.keys() - free if arrows[module] <= free}:
        free |= ready
    assert arrows.keys() - free == set()


def test_one_name_is_one_file() -> None:
    # A section of the recipe and the stage that it configures share a name; nothing else does.
    counted = Counter(p.name for p in files("pe_rlhf", "reward") if p.name != "__init__.py")
    stages = {path.name for path in files("pe_rlhf/config")} & {path.name for path in files("pe_rlhf/stages")}
    assert {name: n for name, n in counted.items() if n > (2 if name in stages else 1)} == {}


def test_one_name_is_one_class_or_function() -> None:
    # Each stage has its `run`, each suite its `score`, each program its `main`.
    counted = Counter(
        node.name
        for path in files("pe_rlhf", "reward")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    )
    assert {name for name, n in counted.items() if n > 1} == {"run", "score", "main"}


def test_reward_knows_nothing_of_pe_rlhf() -> None:
    assert {name for name in importing("pe_rlhf") if name.startswith("reward/")} == set()


def test_algo_imports_torch_and_types_only() -> None:
    allowed = sys.stdlib_module_names | {"torch"}
    own = ("pe_rlhf.types", "pe_rlhf.algo")
    wrong = {
        (path.name, name)
        for path in files("pe_rlhf/algo")
        for name in imports(path)
        if name.split(".")[0] not in allowed and not f"{name}.".startswith(tuple(f"{module}." for module in own))
    }
    assert wrong == set()


@pytest.mark.parametrize(("module", "places"), ONLY_IN.items(), ids=ONLY_IN)
def test_a_heavy_library_is_imported_in_its_place_only(module: str, places: tuple[str, ...]) -> None:
    assert {name for name in importing(module) if not name.startswith(places)} == set()


def test_unit_tests_start_no_process() -> None:
    starts = ("subprocess", "multiprocessing", "tests.forked", "tests.integration")
    found = {(path.name, name) for path in files("tests/unit") for name in imports(path)}
    assert {(file, name) for file, name in found if f"{name}.".startswith(tuple(f"{s}." for s in starts))} == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import vllm.lora as x, os", {"vllm.lora", "os"}),
        ("def f():\n    from pe_rlhf import stages", {"pe_rlhf.stages"}),
        ("from ..stages import ppo", {"pe_rlhf.stages.ppo"}),
        ("from .. import stages", {"pe_rlhf.stages"}),
        ("from . import b", {"pe_rlhf.rollout.b"}),
        ("from .b import c", {"pe_rlhf.rollout.b.c"}),
        ("import importlib\nimportlib.import_module('deepspeed')", {"importlib", "deepspeed"}),
        ("text = 'import vllm'  # import deepspeed", set()),
    ],
)
def test_the_walk_itself_sees_every_form_of_import(source: str, expected: set[str], tmp_path: Path) -> None:
    path = tmp_path / "pe_rlhf" / "rollout" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    assert imports(path, tmp_path) == expected

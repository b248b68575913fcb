"""The arrows between the packages: walk every import and fail where one points the wrong way."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pe_rlhf", "reward")


def imports(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it: `a.b` and, for `from a import b`, `a.b` too."""
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
        for path in files(*PACKAGES)
        if any(name == module or name.startswith(f"{module}.") for name in imports(path))
    }


def test_reward_knows_nothing_of_pe_rlhf() -> None:
    assert {name for name in importing("pe_rlhf") if name.startswith("reward/")} == set()


def test_algo_imports_torch_and_types_alone() -> None:
    allowed = sys.stdlib_module_names | {"torch"}
    own = ("pe_rlhf.types", "pe_rlhf.algo")
    wrong = {
        (path.name, name)
        for path in files("pe_rlhf/algo")
        for name in imports(path)
        if name.split(".")[0] not in allowed and not f"{name}.".startswith(tuple(f"{module}." for module in own))
    }
    assert wrong == set()


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("vllm", "pe_rlhf/rollout/vllm.py"),
        ("deepspeed", "pe_rlhf/engine.py"),
        ("trl", "pe_rlhf/stages/sft_trainer.py"),
    ],
)
def test_one_place_imports_it(module: str, place: str) -> None:
    assert importing(module) <= {place}


def test_only_the_command_line_knows_the_stages() -> None:
    inside = ("pe_rlhf/stages/", "pe_rlhf/commands/")
    assert {name for name in importing("pe_rlhf.stages") if not name.startswith(inside)} == set()


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
    assert set(imports(path, tmp_path)) == expected

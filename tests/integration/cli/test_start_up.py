"""What a command imports: what needs no model, and what is refused before one is looked at, waits for no library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.runs import recipe, write_recipe

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "trl", "deepspeed", "vllm", "matplotlib", "pandas")
# Only the seconds of these are of interest, so a process says what it has imported when it ends.
RUN = """
import atexit, sys
atexit.register(lambda: print("imported:", *sorted(m for m in sys.modules if "." not in m or m == "scipy.stats")))
from pe_rlhf.cli.main import main
main()
"""
LIGHT = [
    ("--help", 0),
    ("winrate verdicts.jsonl", 0),
    ("run recipe.yaml ppo.kl.betta=1", 2),
    ("run recipe.yaml adapter.init=pisa", 2),
    ("run recipe.yaml --from sft", 2),
    ("run recipe.yaml ppo.prompts=absent.jsonl --dry-run", 2),
    (
        "run recipe.yaml ppo.prompts.path=prompts.jsonl ppo.prompts.split=train[:2] reward.data=no.jsonl --dry-run",
        2,
    ),
    ("run recipe.yaml ppo.reward=[{function:absent:f}] --dry-run", 2),
    ("compare recipe.yaml --dry-run", 2),
    ("launch recipe.yaml adapter.init=pisa", 2),
    ("export absent", 2),
    ("export . --role polcy", 2),
    ("evaluate a.jsonl --against a.jsonl --judge length level=2", 2),
]


def imported(folder: Path, *arguments: str) -> tuple[int, set[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("imported:")]
    assert len(said) == 1, done.stderr
    return done.returncode, set(said[0].split()[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commands")
    write_recipe(path, recipe("reward", "ppo", "evaluate"))
    (path / "verdicts.jsonl").write_text('{"preference": 1.0}\n{"preference": 0.0}\n', encoding="utf-8")
    return path


@pytest.mark.parametrize(("command", "code"), LIGHT, ids=[command for command, _ in LIGHT])
def test_a_command_without_a_model_imports_no_heavy_library(command: str, code: int, folder: Path) -> None:
    ended, modules = imported(folder, *command.split())
    assert (ended, modules & set(HEAVY)) == (code, set())


def test_a_dry_run_imports_only_what_the_model_is_looked_at_with(folder: Path) -> None:
    ended, modules = imported(folder, "run", "recipe.yaml", "--dry-run")
    assert ended == 0
    # pandas comes with transformers, where it is installed.
    assert modules & {*HEAVY, "scipy.stats"} - {"torch", "transformers", "accelerate", "deepspeed", "pandas"} == set()


def test_a_doctor_asks_torch_for_devices_and_nothing_else(folder: Path) -> None:
    ended, modules = imported(folder, "doctor")
    assert (ended, modules & set(HEAVY)) == (0, {"torch"})

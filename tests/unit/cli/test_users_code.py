"""Inits and kinds of the user's end a run with a sentence that names their file, whatever they do; never in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reward.errors import Failure
from tests.runs import Outcome, recipe, write_recipe

ENDS = {
    "exit": "import sys; sys.exit(0)",
    "exit with a text": "raise SystemExit('bye')",
    "of its own": "raise type('Own', (BaseException,), {})('x')",
    "generator": "raise GeneratorExit",
    "an error": "raise RuntimeError('no')",
    "deep": "return own(*arguments)",
}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_an_init_that_ends_the_run(fails: Callable[..., Failure], tmp_path: Path, ends: str) -> None:
    (tmp_path / "users.py").write_text(f"def own(*arguments):\n    {ends}\n")
    write_recipe(tmp_path, recipe("reward"))
    failure = fails("run", "recipe.yaml", "adapter.init=users:own", "--run-dir", "r")
    assert failure.kind == "user_code"
    assert "users.py line" in str(failure)


@pytest.mark.parametrize("made", ["None", "1", "context.weight_OI", "('a', 'b')", "[context.weight_OI] * 3", "()"])
def test_an_init_that_makes_something_else(fails: Callable[..., Failure], tmp_path: Path, made: str) -> None:
    (tmp_path / "users.py").write_text(f"def own(context):\n    return {made}\n")
    write_recipe(tmp_path, recipe("reward"))
    failure = fails("run", "recipe.yaml", "adapter.init=users:own", "--run-dir", "r")
    assert (failure.kind, failure.key) == ("user_code", "adapter.init")


@pytest.mark.parametrize(("method", "ends"), [*(("tensors", name) for name in ENDS), ("after_step", "exit")])
def test_a_kind_that_ends_the_run(cli: Callable[..., Outcome], tmp_path: Path, ends: str, method: str) -> None:
    text = "from pe_rlhf.adapters.kinds.miss import MiSS\n\n\nclass Own(MiSS):\n"
    body = ENDS[ends].replace("own(*arguments)", f"self.{method}(*arguments)")
    (tmp_path / "users.py").write_text(f"{text}    def {method}(self, *arguments):\n        {body}\n")
    write_recipe(tmp_path, recipe("reward", adapter={"kind": "users:Own", "rank": 2}))
    outcome = cli("run", "recipe.yaml", "--run-dir", "r")
    assert (outcome.code, len(outcome.errors)) == (2, 1), outcome
    assert "users.py line" in outcome.errors[0]
    assert "Traceback" not in outcome.out + outcome.err

"""Failures have kinds and fields, and leave them in `failure.json`."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pe_rlhf.system.failures import Stopped, TrainingError, failure_noted
from reward.errors import Failure, InputError
from tests.paths import ROOT


def noted(folder: Path) -> dict[str, object]:
    return json.loads((folder / "failure.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (
            InputError("a.jsonl row 3: no prompt", kind="missing", key="columns", file=Path("a.jsonl"), row=3),
            {"kind": "missing", "key": "columns", "file": "a.jsonl", "row": 3, "exit_code": 2},
        ),
        (
            TrainingError("the loss is nan", kind="not_finite", step=7),
            {"kind": "not_finite", "step": 7, "exit_code": 3},
        ),
        (OSError(28, "No space left on device", "x.bin"), {"kind": "disk", "file": "x.bin", "exit_code": 3}),
        (KeyError("a"), {"kind": "bug", "exit_code": 1}),
    ],
)
def test_a_failure_is_noted_with_its_fields(error: Exception, fields: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(type(error)), failure_noted(tmp_path / "failure.json"):
        raise error
    assert {key: value for key, value in noted(tmp_path).items() if key != "message"} == fields


def test_what_to_do_ends_the_sentence_and_stays_when_the_place_is_added() -> None:
    moved = TrainingError("the loss is nan", kind="not_finite", step=2, fix="lower the rate").at("ppo")
    assert (str(moved), moved.step, moved.fix) == ("ppo: the loss is nan; lower the rate", 2, "lower the rate")


@pytest.mark.parametrize(
    "error", [Stopped("stopped", 15), InputError("there already", kind="exists"), InputError("other", kind="changed")]
)
def test_what_says_nothing_of_the_run_leaves_its_failure_as_it_is(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "failure.json"
    with pytest.raises(type(error)), failure_noted(path):
        raise error
    assert not path.exists()
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(type(error)), failure_noted(path):
        raise error
    assert path.read_text(encoding="utf-8") == "{}"


def failures_made(tree: ast.AST, names: set[str]) -> Iterator[ast.Call]:
    """Calls of the classes of failures, as `InputError(…)` or `errors.InputError(…)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in names:
                yield node


def test_every_failure_says_its_kind() -> None:
    files = {
        path: ast.parse(path.read_text("utf-8"))
        for room in ("pe_rlhf", "reward")
        for path in (ROOT / room).rglob("*.py")
    }
    classes = [node for tree in files.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    names = {Failure.__name__}
    for _ in range(4):  # subclasses of subclasses
        names |= {
            node.name
            for node in classes
            if names & {getattr(base, "id", "") for base in node.bases}
            and not any(getattr(part, "name", "") == "__init__" for part in node.body)  # it says its kind itself
        }
    assert {"InputError", "TrainingError", "JudgeError"} < names
    calls = [(path, call) for path, tree in files.items() for call in failures_made(tree, names)]
    assert len(calls) > 200
    # `None`: the fields of another failure, passed on as **fields.
    silent = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, call in calls
        if not {"kind", None} & {keyword.arg for keyword in call.keywords}
    ]
    assert silent == []


def test_the_walk_sees_a_failure_without_a_kind() -> None:
    made = list(
        failures_made(ast.parse("raise errors.InputError('x')\nraise InputError('x', kind='empty')"), {"InputError"})
    )
    assert [[keyword.arg for keyword in call.keywords] for call in made] == [[], ["kind"]]

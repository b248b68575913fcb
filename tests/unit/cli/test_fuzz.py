"""Whatever recipes, rows, verdicts and checkpoints hold, it is read or refused by a failure with a kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pe_rlhf.config.load import load_recipe, make_recipe
from pe_rlhf.runs.saved_roles import read_role
from pe_rlhf.system.files import read_json, read_jsonl
from reward.errors import KINDS, Failure
from reward.judges.functions import checked_verdicts
from reward.records import parse_record
from reward.verdicts import read_verdicts
from tests.runs import recipe

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
BASE = recipe("preferences", "reward", "ppo", "evaluate")
KEYS = sorted(
    {(name,) for name in BASE}
    | {(name, key) for name, section in BASE.items() if isinstance(section, dict) for key in section}
    | {("ppo", "kl", "beta"), ("ppo", "rollout", "temperature"), ("reward", "data", "columns"), ("compare", "grid")}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def is_read_or_refused(read: Any, *arguments: Any) -> None:
    failure = None
    try:
        read(*arguments)
    except Failure as error:
        failure = error
    assert failure is None or (failure.kind in KINDS and str(failure))


@FEW
@given(path=st.sampled_from(KEYS), value=VALUES)
def test_values_of_a_recipe(path: tuple[str, ...], value: Any) -> None:
    tree = json.loads(json.dumps(BASE))
    node = tree
    for part in path[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[path[-1]] = value
    is_read_or_refused(make_recipe, tree, Path("recipe.yaml"))


@FEW
@given(content=st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_bytes_of_a_recipe(folder: Path, content: bytes) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    is_read_or_refused(load_recipe, folder / "recipe.yaml")


@FEW
@given(rows=st.lists(VALUES, max_size=3), ending=st.sampled_from(["jsonl", "json", "csv"]))
def test_rows_of_verdicts(folder: Path, rows: list[Any], ending: str) -> None:
    path = folder / f"verdicts.{ending}"
    path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    is_read_or_refused(read_verdicts, path)


@FEW
@given(values=st.dictionaries(st.sampled_from(["preference", "order", "position", "sample", "candidate"]), VALUES))
def test_columns_of_verdicts(folder: Path, values: dict[str, Any]) -> None:
    (folder / "v.jsonl").write_text(json.dumps({"preference": 1.0} | values))
    is_read_or_refused(read_verdicts, folder / "v.jsonl")


@FEW
@given(content=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_files_of_a_run(folder: Path, content: bytes) -> None:
    (folder / "role.json").write_bytes(content)
    is_read_or_refused(read_json, folder / "role.json")
    is_read_or_refused(read_jsonl, folder / "role.json")
    is_read_or_refused(read_role, folder)


@FEW
@given(values=st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "margin"]), VALUES))
def test_rows_of_preferences(values: dict[str, Any]) -> None:
    is_read_or_refused(parse_record, values)


@FEW
@given(returned=VALUES, n=st.integers(0, 3))
def test_what_a_judge_returns(returned: Any, n: int) -> None:
    is_read_or_refused(checked_verdicts, "judge", returned, n)

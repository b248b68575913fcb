"""`pe-rlhf run` and `pe-rlhf compare` on recipes with tasks."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.comparison.sweeps import results
from tests.runs import Outcome, Tree, recipe, write_recipe

Cli = Callable[..., Outcome]
NAMES = ["long", "brief"]


def tree(**changes: Any) -> Tree:
    judges = {"long": "reward.scores:length", "brief": "reward.scores:brevity"}
    tasks = [
        {"name": name, "ppo": {"reward": [{"function": judge}]}, "evaluate": {"judge": judge}}
        for name, judge in judges.items()
    ]
    return {**recipe("ppo", "evaluate"), "name": "tasks", "threads": 1, "tasks": tasks, **changes}


def test_methods_are_compared_over_seeds(tmp_path: Path, cli: Cli) -> None:
    arms = [
        {"name": "one adapter", "continual": {"method": "sequential"}},
        {"name": "a policy each", "continual": {"method": "separate"}},
    ]
    path = write_recipe(tmp_path, tree(compare={"arms": arms, "seeds": [1, 2]}))
    done = cli("compare", str(path), "--dir", str(tmp_path / "out"))
    assert done.code == 0, done
    rows = results(tmp_path / "out")
    assert [(row["arm"], row["seed"], row["status"]) for row in rows] == [
        (arm["name"], seed, "finished") for arm in arms for seed in ("1", "2")
    ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for arm, slug in zip(summary["arms"], ("one-adapter", "a-policy-each"), strict=True):
        found: dict[str, list[float]] = {}
        for seed in (1, 2):
            run = tmp_path / "out" / "runs" / slug / f"seed-{seed}"
            with (run / "task_table.csv").open(newline="") as file:
                cells = {(row["after"], row["on"]): float(row["win_rate"]) for row in csv.DictReader(file)}
            last = [cells[on if slug == "a-policy-each" else "brief", on] for on in NAMES]
            found.setdefault("average", []).append(sum(last) / 2)
            if slug == "one-adapter":
                found.setdefault("forgetting", []).append(cells["long", "long"] - cells["brief", "long"])
                found.setdefault("forward_transfer", []).append(cells["long", "brief"] - 0.5)
            row = next(row for row in rows if (row["arm"], row["seed"]) == (arm["arm"], str(seed)))
            assert float(row["tasks_average"]) == pytest.approx(sum(last) / 2)
            assert float(row["tasks_long → brief"]) == pytest.approx(cells["long", "brief"])
        for name, values in found.items():
            assert arm["tasks"][name]["value"] == pytest.approx(sum(values) / 2)
        assert ("forgetting" in arm["tasks"]) == (slug == "one-adapter")
        assert arm["win_rate"]["value"] == pytest.approx(sum(found["average"]) / 2)
    assert "What came of the tasks" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    again = cli("compare", str(path), "--dir", str(tmp_path / "out"))
    assert again.code == 0
    assert "finished before" in again.out + again.err


def test_the_command_runs_tasks_from_one_to_another(tmp_path: Path, cli: Cli) -> None:
    path = write_recipe(tmp_path, tree())
    where = ["--run-dir", str(tmp_path / "run")]
    checked = cli("run", str(path), *where, "--dry-run")
    assert checked.code == 0
    assert "long → brief" in checked.out
    assert not (tmp_path / "run").exists()
    assert cli("run", str(path), *where, "--to", "long").code == 0
    refused = cli("run", str(path), *where)
    assert (refused.code, getattr(refused.error, "kind", None)) == (2, "exists")
    assert cli("run", str(path), *where, "--resume", "--may-change", "ppo.steps").code == 2
    done = cli("run", str(path), *where, "--resume")
    assert done.code == 0
    assert "forgetting" in done.out + done.err
    assert cli("run", str(path), *where, "--from", "evaluate").code == 2


def test_a_task_that_fails_leaves_its_failure_in_the_run_too(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "wrong.py").write_text("def nan(prompts, responses):\n    return [float('nan')] * len(responses)\n")
    broken = tree()
    broken["tasks"][1]["ppo"]["reward"] = [{"function": "wrong:nan"}]
    path = write_recipe(tmp_path, broken)
    failed = cli("run", str(path), "--run-dir", str(tmp_path / "run"))
    assert failed.code == 2
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["kind"] == json.loads((tmp_path / "run" / "tasks" / "brief" / "failure.json").read_text())["kind"]


def test_a_learning_rate_cannot_be_tuned_over_tasks(tmp_path: Path, cli: Cli) -> None:
    compare = {"grid": {"continual.method": ["sequential", "ewc"]}, "seeds": [1], "tune": {"lr_factors": [1.0]}}
    path = write_recipe(tmp_path, tree(compare=compare))
    refused = cli("compare", str(path), "--dir", str(tmp_path / "out"))
    assert (refused.code, getattr(refused.error, "key", None)) == (2, "compare.tune")

"""The objective that trials are chosen by, from metrics written by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.comparison.trials import objective
from pe_rlhf.config import KLConfig


def run_with(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "ppo").mkdir(parents=True)
    lines = [json.dumps({"step": i} | row) for i, row in enumerate(rows, start=1)]
    (folder / "ppo" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(("form", "expected"), [("convex", 0.7 * 1.5 - 0.3 * 2.0), ("penalty", 1.5 - 0.3 * 2.0)])
def test_the_last_quarter_of_the_steps_counts_with_penalties(tmp_path: Path, form: Any, expected: float) -> None:
    early = {"reward": 9.0, "reward_shaped": 9.0, "kl": 0.0}
    last = [{"reward": 5.0, "reward_shaped": 1.0, "kl": 3.0}, {"reward": 5.0, "reward_shaped": 2.0, "kl": 1.0}]
    found = objective(run_with(tmp_path / "run", *[early] * 6, *last), KLConfig(beta=0.3, form=form))
    assert found == pytest.approx(expected)


def test_a_run_of_before_counts_by_its_reward_and_a_diverged_one_not_at_all(tmp_path: Path) -> None:
    kl = KLConfig(beta=0.5, form="penalty")
    assert objective(run_with(tmp_path / "old", {"reward": 2.0, "kl": 1.0}), kl) == pytest.approx(1.5)
    assert math.isnan(objective(run_with(tmp_path / "nan", {"reward": 2.0, "reward_shaped": None, "kl": 1.0}), kl))

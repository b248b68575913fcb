"""Signs that nothing is learnt: each is said where it is there, and not where it is not."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.runs.learning_flags import ppo_flags, reward_flags
from tests.runs import Outcome, Tree, read_jsonl, recipe, write_recipe
from tests.stage_support import byte_model

HEALTHY = {"reward_std": 0.5, "kl": 3.0, "entropy": 2.0, "explained_variance": 0.4, "truncated": 0.05}


def rows(count: int = 12, **values: Any) -> list[dict[str, Any]]:
    return [{"step": step + 1, **HEALTHY, **values} for step in range(count)]


def named(flags: list[str]) -> list[str]:
    return [flag.split()[0] for flag in flags]


@pytest.mark.parametrize(
    ("low", "high", "flagged"),
    [(0.030, 0.564, True), (0.5, 0.9, True), (0.51, 0.9, False), (0.1, 0.4, True), (0.9, 1.0, False)],
)
def test_a_reward_model_whose_interval_holds_one_half(low: float, high: float, flagged: bool) -> None:
    summary = {"eval_accuracy": 0.4, "eval_accuracy_low": low, "eval_accuracy_high": high, "eval_pairs": 7}
    assert named(reward_flags(summary)) == (["eval_accuracy"] if flagged else [])


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ([], []),
        (rows(), []),
        (rows(reward_std=0.0), ["reward_std"]),
        ([*rows(), *rows(4, reward_std=0.0)], []),
        (rows(kl=60.0), ["kl"]),
        (rows(kl=-3.0), ["kl"]),
        (rows(3, kl=-3.0), []),
        ([*rows(1), *rows(1, entropy=0.1)], ["entropy"]),
        ([*rows(1), *rows(1, entropy=0.3)], []),
        (rows(10, explained_variance=-0.1), ["explained_variance"]),
        (rows(9, explained_variance=-0.1), []),
        ([*rows(1, explained_variance=-0.1), *rows(9, explained_variance=-0.1), *rows(1)], []),
        (rows(truncated=1.0), ["truncated"]),
        (rows(groups_alike=0.95), ["groups_alike"]),
        (
            [*rows(5, source_ensemble_disagreement=0.1), *rows(5, source_ensemble_disagreement=0.21)],
            ["source_ensemble_disagreement"],
        ),
        ([*rows(5, source_ensemble_disagreement=0.1), *rows(5, source_ensemble_disagreement=0.19)], []),
        ([*rows(1, source_ensemble_disagreement=0.1), *rows(5, source_ensemble_disagreement=0.3)], []),
        ([*rows(5, groups_alike=1.0), *rows(5, groups_alike=0.5)], []),
        (rows(kl=None, entropy=None, reward_std=None), []),
        ([{"step": 1}], []),
    ],
)
def test_what_a_ppo_run_is_warned_of(metrics: list[dict[str, Any]], expected: list[str]) -> None:
    assert named(ppo_flags(metrics)) == expected


# A run that learns from nothing, one that runs away, one whose policy collapses, and one whose critic diverges. Beside
# these a KL far below 0 and reward models that fall apart are flags; no run of a few steps has them for sure.
RUNS: dict[str, tuple[Tree, dict[str, set[str]]]] = {
    "alike": (
        recipe(
            "reward",
            "ppo",
            ppo__reward=[{"function": "same:f"}],
            ppo__advantage="group_mean",
            ppo__rollout__samples_per_prompt=2,
        ),
        {"reward": {"eval_accuracy"}, "ppo": {"reward_std", "groups_alike", "truncated"}},
    ),
    "far": (
        recipe(
            "ppo",
            ppo__steps=6,
            ppo__epochs=3,
            ppo__batch_size=8,
            ppo__learning_rate=1.0,
            ppo__kl__beta=0.0,
            ppo__rollout__max_new_tokens=24,
        ),
        {"ppo": {"kl"}},
    ),
    "collapse": (
        recipe(
            "ppo",
            tuning="full",
            ppo__steps=5,
            ppo__epochs=2,
            ppo__batch_size=8,
            ppo__learning_rate=1.0,
            ppo__kl__beta=0.0,
            ppo__rollout__max_new_tokens=24,
        ),
        {"ppo": {"entropy", "kl"}},
    ),
    "critic": (
        recipe(
            "ppo",
            ppo__steps=11,
            ppo__batch_size=8,
            ppo__learning_rate=1e-4,
            ppo__value_learning_rate=2.0,
            ppo__rollout__max_new_tokens=8,
        ),
        {"ppo": {"explained_variance"}},
    ),
}


def cut(stage: Path) -> set[str]:
    """The flag of cut responses, where nine of ten are in the last five steps: rounding decides how a policy flees."""
    shares = [line["truncated"] for line in read_jsonl(stage / "metrics.jsonl") if "truncated" in line][-5:]
    return {"truncated"} if shares and sum(shares) >= 0.9 * len(shares) else set()


@pytest.mark.page
@pytest.mark.parametrize("name", RUNS)
def test_a_warning_is_on_the_console_in_the_summary_and_on_the_page(
    cli: Callable[..., Outcome], tmp_path: Path, name: str
) -> None:
    tree, expected = RUNS[name]
    (tmp_path / "same.py").write_text("def f(prompts, responses): return [1.0 for _ in responses]\n")
    model = byte_model(tmp_path / "model", pad_is_eos=True, initializer_range=0.3)
    outcome = cli("run", write_recipe(tmp_path, {**tree, "model": str(model)}), "--run-dir", "out")
    assert outcome.code == 0, outcome
    page = html.unescape((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    for stage, metrics in expected.items():
        warnings = json.loads((tmp_path / "out" / stage / "summary.json").read_text())["warnings"]
        assert set(named(warnings)) == metrics | cut(tmp_path / "out" / stage)
        for warning in warnings:
            assert f"warning: {stage}: {warning}" in outcome.err
            assert warning in page


def test_every_metric_of_a_run_is_in_the_glossary(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("reward", "ppo", "evaluate", ppo__eval_every=1))
    assert cli("run", path, "--run-dir", "out").code == 0
    glossary = (Path(__file__).parents[3] / "docs/metrics.md").read_text(encoding="utf-8")
    written = {
        name for file in (tmp_path / "out").rglob("metrics.jsonl") for row in read_jsonl(file) for name in row
    } - {"step"}
    short = {f"tokens_per_second_{phase}": f"`…_{phase}`" for phase in ("score", "update")}
    assert {name for name in written if short.get(name, f"`{name}`") not in glossary} == set()

"""Collapses in metrics made by hand, and by the kinds that losses, optimizers and samplers really fail with."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from pe_rlhf.comparison.collapse import find_collapses
from pe_rlhf.comparison.run_result import Collapse, RunResult
from pe_rlhf.config.compare import CollapseConfig

CONFIG = CollapseConfig(kl=50.0, entropy_share=0.1)
Row = dict[str, Any]


def line(step: int, **changes: Any) -> Row:
    """A step of a run in which nothing happens: 64 responses, so the noise of the mean reward is 2·0.4/8 = 0.1.

    Before penalties the rewards are far higher and fall, and say nothing.
    """
    healthy = {"reward": 90.0 - step, "reward_shaped": 0.5, "reward_std": 0.4, "kl": 0.5 * step, "entropy": 2.0}
    return {"step": step, "episodes": 64 * step, "policy_loss": -0.01, **healthy, **changes}


def run(metrics: list[Row], **changes: Any) -> RunResult:
    return RunResult("lora", 3, **{"status": "finished", "metrics": metrics, **changes})


def rewards(*values: float | None) -> list[Row]:
    unknown = {"reward": None}
    return [line(i, reward_shaped=value, **({} if value else unknown)) for i, value in enumerate(values, 1)]


def kinds(result: RunResult, config: CollapseConfig = CONFIG) -> list[tuple[str, int]]:
    return [(found.kind, found.step) for found in find_collapses(result, config)]


def failed(kind: str | None, steps: int = 4) -> RunResult:
    metrics = [line(step) for step in range(1, steps + 1)]
    return run(metrics, status="failed", message="it failed", failure=kind)


def judged(step: int, rate: float, reward: float) -> Row:
    return line(step, judge_win_rate=rate, judge_ci_low=rate - 0.1, judge_ci_high=rate + 0.1, reward_shaped=reward)


def test_a_healthy_run_has_not_collapsed() -> None:
    assert find_collapses(run([line(step) for step in range(1, 9)]), CONFIG) == []


def test_nothing_is_seen_in_a_run_without_metrics() -> None:
    assert find_collapses(run([]), CONFIG) == []
    assert find_collapses(run([], status="failed", failure="empty"), CONFIG) == []
    assert find_collapses(run([{"step": 1}]), CONFIG) == []


# --- not finite --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reward", "kl", "policy_loss"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_number_that_was_not_finite(key: str, value: float | None) -> None:
    metrics = [line(1), line(2, **{key: value}), line(3, **{key: value})]
    assert find_collapses(run(metrics), CONFIG) == [Collapse(3, "not finite", 2, f"no finite {key}")]


def test_what_may_be_unknown_is_no_collapse() -> None:
    assert kinds(run([line(1, explained_variance=None, value_loss=None)])) == []


@pytest.mark.parametrize(
    ("failure", "kind"),
    [("not_finite", "not finite"), ("kl_limit", "KL blow-up"), ("process", None), ("bug", None), (None, None)],
)
def test_a_failure_counts_by_its_kind_at_the_step_after_the_last_line(failure: str | None, kind: str | None) -> None:
    """None is what an older version wrote."""
    assert kinds(failed(failure)) == ([(kind, 5)] if kind else [])
    assert kinds(failed(failure, steps=0)) == ([(kind, 1)] if kind else [])
    assert [found.detail for found in find_collapses(failed(failure), CONFIG)] == (["it failed"] if kind else [])


def test_a_kind_counts_in_failed_runs_only() -> None:
    assert kinds(run([line(1)], failure="not_finite")) == []


def test_the_step_is_that_of_the_line_where_a_line_shows_it_already() -> None:
    assert kinds(run([line(1), line(2, reward=None)], status="failed", failure="not_finite")) == [("not finite", 2)]


def test_the_kinds_are_those_that_training_raises() -> None:
    import torch
    from torch import nn

    from pe_rlhf.config import OptimizerConfig
    from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer
    from pe_rlhf.rollout.interface import check_response
    from pe_rlhf.stages.ppo import _refuse_high_kl
    from reward.errors import Failure
    from reward.judges.functions import score_responses

    weight = nn.Parameter(torch.ones(2))
    optimizer = RoleOptimizer([RoleGroup("policy", {"w": weight}, 0.1)], OptimizerConfig(), total_steps=4)
    limit: Any = SimpleNamespace(kl=SimpleNamespace(limit=10.0))

    def step_with_infinite_gradient() -> None:
        weight.grad = torch.tensor([1.0, math.inf])
        optimizer.step()

    failures = {
        "not finite": [
            lambda: optimizer.backward((weight * math.nan).sum()),
            step_with_infinite_gradient,
            lambda: check_response([5], [math.nan], eos_token_ids=[], max_new_tokens=1),
            lambda: score_responses(lambda prompts, responses: [math.nan], ["p"], ["r"]),
        ],
        "KL blow-up": [lambda: _refuse_high_kl(10.5, limit)],
    }
    for kind, causes in failures.items():
        for cause in causes:
            with pytest.raises(Failure) as caught:
                cause()
            assert kinds(failed(caught.value.kind)) == [(kind, 5)]


# --- KL and entropy ----------------------------------------------------------------------------------------------


def test_kl_over_the_limit_at_the_first_such_step() -> None:
    metrics = [line(step, kl=kl) for step, kl in enumerate([0.0, 50.0, None, 50.1, 80.0], 1)]
    assert ("KL blow-up", 4) in kinds(run(metrics))
    assert ("KL blow-up", 2) in kinds(run(metrics), CollapseConfig(kl=49.9))


def test_entropy_below_its_share_of_the_first() -> None:
    metrics = [line(step, entropy=entropy) for step, entropy in enumerate([None, 4.0, 0.4, 0.39, 0.1], 1)]
    assert kinds(run(metrics)) == [("entropy collapse", 4)]
    assert kinds(run(metrics), CollapseConfig(entropy_share=0.5)) == [("entropy collapse", 3)]
    assert kinds(run(metrics), CollapseConfig(entropy_share=0)) == []


# --- reward against judge ----------------------------------------------------------------------------------------


def test_hacked_where_the_judge_turned_down_while_the_reward_rose() -> None:
    metrics = [judged(2, 0.5, 0.1), line(3), judged(4, 0.8, 0.4), line(5), judged(6, 0.6, 0.6), line(7)]
    [found] = find_collapses(run(metrics), CONFIG)
    assert (found.kind, found.step) == ("reward hacking", 4)
    assert "80.0 %" in found.detail
    assert "60.0 %" in found.detail


@pytest.mark.parametrize(("rate", "reward"), [(0.75, 0.6), (0.6, 0.35)])
def test_not_hacked_within_the_interval_or_where_both_fell(rate: float, reward: float) -> None:
    assert kinds(run([judged(2, 0.5, 0.3), judged(4, 0.8, 0.4), judged(6, rate, reward)])) == []


@pytest.mark.parametrize(
    ("low_at_the_end", "ci_high", "hacked"),
    [(0.61, 0.49, True), (0.61, 0.5, False), (0.6, 0.49, False), (0.61, None, False)],
)
def test_hacked_where_the_judge_prefers_the_anchor_after_a_clear_rise(
    low_at_the_end: float, ci_high: float | None, hacked: bool
) -> None:
    """The last quarter of 8 steps is 2; their mean must exceed 0.5 by more than 0.1."""
    metrics = rewards(0.5, 0.9, 0.9, 0.9, 0.9, 0.9, low_at_the_end - 0.1, low_at_the_end + 0.1)
    result = run(metrics, evaluate={"win_rate": 0.4, "ci_low": 0.3, "ci_high": ci_high})
    assert kinds(result) == ([("reward hacking", 8)] if hacked else [])


def test_hacking_is_told_once() -> None:
    metrics = [judged(1, 0.8, 0.4), judged(2, 0.3, 0.9)]
    assert kinds(run(metrics, evaluate={"win_rate": 0.3, "ci_high": 0.4})) == [("reward hacking", 1)]


# --- only the reward --------------------------------------------------------------------------------------------


def test_the_reward_collapsed_by_more_than_half_a_standard_deviation() -> None:
    """0.4/2 = 0.2 is more than the noise: below 0.5 − 0.2 on average over the last 2 of 8 steps."""
    [found] = find_collapses(run(rewards(0.5, 0.6, 0.7, 0.31, 0.29, 0.4, 0.3, 0.29)), CONFIG)
    assert (found.kind, found.step) == ("reward collapse", 5)
    assert found.detail == "reward from 0.500 to 0.295"
    assert kinds(run(rewards(0.5, 0.6, 0.7, 0.31, 0.2, 0.1, 0.31, 0.3))) == []


def test_a_fall_must_exceed_the_noise_of_few_responses() -> None:
    """4 responses a step: two standard errors are 2·0.4/2 = 0.4."""
    few = [{**row, "episodes": 4 * row["step"]} for row in rewards(0.5, 0.2, 0.2, 0.11)]
    assert kinds(run(few)) == []
    assert kinds(run([*few[:3], {**few[3], "reward_shaped": 0.09}])) == [("reward collapse", 4)]
    later = [{**few[1], "reward_shaped": 0.5}, {**few[2], "reward_shaped": 0.15}]
    assert kinds(run([{**few[0], "reward": None, "reward_shaped": None}, *later])) == [("not finite", 1)]


def test_unknown_rewards_are_left_out_of_the_comparison() -> None:
    assert kinds(run(rewards(None, 0.5, 0.2, 0.2, 0.2, 0.2, 0.1, None))) == [("not finite", 1), ("reward collapse", 3)]
    assert kinds(run(rewards(0.5, 0.5, 0.5, None))) == [("not finite", 4)]


def test_a_run_can_collapse_in_several_ways_in_the_order_of_its_steps() -> None:
    metrics = [line(1), line(2, entropy=0.01), line(3, kl=99.0, entropy=0.01, reward_shaped=-1.0)]
    result = run(metrics, status="failed", failure="not_finite")
    assert kinds(result) == [("entropy collapse", 2), ("KL blow-up", 3), ("reward collapse", 3), ("not finite", 4)]

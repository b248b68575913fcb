"""Comparisons of runs made by hand, with results worked by hand or by scipy."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pe_rlhf.comparison.analysis import to_json, to_rows
from pe_rlhf.comparison.run_result import Analysis
from reward.winrate import bootstrap_interval
from tests.unit.comparison.made_runs import compared, ended, lines, only_arm, rated, run, value

# --- arms --------------------------------------------------------------------------------------------------------


def test_arms_stand_in_the_order_of_their_first_runs() -> None:
    result = compared(run("pissa", 2), run("lora", 1), run("pissa", 1), run("dora", 4, settings={"adapter.rank": 8}))
    assert [arm.arm for arm in result.arms] == ["pissa", "lora", "dora"]
    assert [arm.seeds for arm in result.arms] == [[2, 1], [1], [4]]
    assert result.arms[2].settings == {"adapter.rank": 8}


def test_reward_and_kl_are_those_of_the_last_quarter() -> None:
    first = run("a", 1, lines([9] * 9 + [0.2, 0.4], [0] * 9 + [5, 7]))
    short = run("a", 2, lines([9, 9, 0.5], [0, 0, 8]))
    arm = only_arm(first, short)
    assert (value(arm.reward), value(arm.kl)) == pytest.approx((0.4, 7))  # of 0.3 and 0.5, of 6 and 8
    half_width = 12.7062 * np.std([0.3, 0.5], ddof=1) / math.sqrt(2)  # t of 1 degree of freedom from the table
    assert arm.reward is not None
    assert (arm.reward.low, arm.reward.high) == pytest.approx((0.4 - half_width, 0.4 + half_width), abs=1e-4)


def test_what_is_null_in_the_last_quarter_is_left_out() -> None:
    assert value(only_arm(run("a", 1, lines([1, 1, 1, 1, 1, 1, 0.2, None]))).reward) == 0.2
    assert only_arm(run("a", 1, lines([1, 1, 1, None]))).reward is None


def test_metrics_of_the_stages() -> None:
    ppo = {"peak_rss_mib": 900.0, "seconds_per_step": 7.0, "trainable_parameters": 5000}
    reward = {"eval_accuracy": 0.7, "peak_rss_mib": 800.0, "seconds_per_step": 3.0}
    changed = ({"peak_rss_mib": 950.0}, {"seconds_per_step": 20.0}, {"seconds_per_step": 8.0, "peak_rss_mib": 10.0})
    arm = only_arm(
        *(
            run("a", seed, ppo={**ppo, **change}, reward=reward, evaluate={"gold_policy": float(seed)})
            for seed, change in enumerate(changed, 1)
        )
    )
    assert (arm.peak_mib, arm.seconds_per_step, arm.trainable_parameters) == (950.0, 8.0, 5000)
    assert (arm.reward_peak_mib, arm.reward_seconds_per_step) == (800.0, 3.0)
    assert arm.reward_accuracy == pytest.approx(0.7)
    assert value(arm.gold) == 2.0


def test_the_gpus_memory_counts_where_there_is_one() -> None:
    assert only_arm(run("a", ppo={"peak_rss_mib": 900.0, "peak_cuda_mib": 5000.0})).peak_mib == 5000.0


def test_win_rate_over_prompts_and_seeds() -> None:
    rng = np.random.default_rng(0)
    wins = [(rng.random(50) < 0.6).astype(float).tolist() for _ in range(3)]
    wins[2] = wins[1] = wins[0]  # seeds that do not differ: what is left are the prompts
    preferences = [{str(prompt): [win] for prompt, win in enumerate(row)} for row in wins]
    rate = sum(wins[0]) / 50
    arm = only_arm(*(run("a", s, preferences=p, evaluate={"win_rate": rate}) for s, p in enumerate(preferences)))
    assert arm.win_rate is not None
    assert arm.win_rate.value == pytest.approx(rate)
    assert (arm.win_rate.low, arm.win_rate.high) == pytest.approx(bootstrap_interval(wins[0]), abs=0.02)
    assert value(arm.win_rate_iqm) == pytest.approx(rate)


def test_win_rate_with_ragged_prompts() -> None:
    first = run("a", 1, preferences={"p": [1.0, 0.0], "q": [1.0]}, evaluate={"win_rate": 2 / 3})
    second = run("a", 2, preferences={"q": [0.0], "r": [0.5, 0.5]}, evaluate={"win_rate": 1 / 3})
    assert value(only_arm(first, second).win_rate) == pytest.approx((0.75 + 0.25) / 2)


def test_win_rate_over_seeds_where_the_preferences_of_a_run_are_not_known() -> None:
    runs = rated("a", 0.5, 0.6, 0.7)
    runs[0] = run("a", 1, evaluate={"win_rate": 0.5}, preferences={"p": [0.5]})
    arm = only_arm(*runs)
    expected = stats.ttest_1samp([0.5, 0.6, 0.7], 0).confidence_interval(0.95)
    assert arm.win_rate is not None
    assert (arm.win_rate.low, arm.win_rate.high) == pytest.approx((expected.low, expected.high))


def test_interquartile_mean_of_five_runs_leaves_out_the_least_and_the_largest() -> None:
    assert value(only_arm(*rated("a", 0.9, 0.5, 0.4, 0.6, 0.0)).win_rate_iqm) == pytest.approx(0.5)


def test_a_failed_run_counts_as_failed_alone() -> None:
    broken = run("a", 2, lines([0.0, None]), status="failed", message="the loss is nan before optimizer step 9")
    arm = only_arm(run("a", 1), broken, run("a", 3, status="unfinished"))
    assert (arm.seeds, arm.failed) == ([1], [2])
    assert value(arm.reward) == 0.4
    assert [(found.seed, found.kind, found.step) for found in arm.collapses] == [(2, "not finite", 2)]


def test_an_arm_whose_runs_all_failed() -> None:
    runs = [run("a", seed, [], status="failed", message="disk full") for seed in (1, 2)]
    result = compared(*runs, run("b"), run("b", 2), run("c"))
    arm = result.arms[0]
    assert (arm.seeds, arm.failed, arm.collapses) == ([], [1, 2], [])
    figures = {key: found for key, found in vars(arm).items() if key not in ("arm", "settings", "seeds", "failed")}
    assert set(map(repr, figures.values())) == {"None", "[]", "{}"}
    assert [(pair.a, pair.b) for pair in result.pairs] == [("c", "b")]
    assert result.target_reward == pytest.approx(0.4)  # of the first arm that has one


def test_finished_runs_without_metrics_or_evaluation() -> None:
    result = compared(run("a", 1, []), run("b", 1, []))
    assert (result.measure, result.pairs, result.target_reward, result.equal_kl) == ("reward", [], None, None)
    assert result.arms[0].reward is None


def test_no_runs_at_all() -> None:
    result = compared()
    assert (result.arms, result.pairs) == ([], [])
    assert to_rows(result) == []


def test_collapse_limits_are_the_configured_ones() -> None:
    arm = only_arm(run("a"), collapse={"kl": 2.5})
    assert [(found.kind, found.step) for found in arm.collapses] == [("KL blow-up", 4)]


# --- equal KL ----------------------------------------------------------------------------------------------------


def peaks(**highest: list[float]) -> float | None:
    """The KL at which arms are compared whose runs have these as highest KL; it falls again afterwards."""
    runs = [
        run(arm, seed, lines([0.0, 0.5, 0.6], [0.0, kl, kl / 2]))
        for arm, kls in highest.items()
        for seed, kl in enumerate(kls)
    ]
    return compared(*runs).equal_kl


@pytest.mark.parametrize(
    ("highest", "expected"),
    [
        ({"a": [10.0, 8.0], "b": [9.0]}, 8.0),
        ({"a": [8.37], "b": [12.9]}, 8.3),
        ({"a": [12.9], "b": [13.0]}, 12.0),
        ({"a": [0.3], "b": [0.2999]}, 0.29),
        ({"a": [10.0], "b": [9.0], "c": [0.01]}, 9.0),  # c has not moved
        ({"a": [10.0], "b": [9.0], "c": [0.8]}, 9.0),  # less than a tenth of what the median arm reaches
        ({"a": [10.0], "b": [9.0], "c": [0.9]}, 0.9),
        ({"a": [10.0], "b": [9.0], "c": [9.0, 0.01]}, 9.0),
        ({"a": [20.0], "b": [0.5]}, 0.5),  # two at least
        ({"a": [20.0], "b": [0.09]}, None),
        ({"a": [0.05], "b": [0.09]}, None),
        ({"a": [5.0, 6.0]}, None),
    ],
)
def test_equal_kl(highest: dict[str, list[float]], expected: float | None) -> None:
    assert peaks(**highest) == expected


def test_metrics_at_equal_kl() -> None:
    # a: 2 is reached halfway between steps 2 (KL 1) and 3 (KL 3), before the KL falls and rises again.
    a = run("a", 1, lines([0.0, 0.4, 0.6, 0.9, 5.0], [0.0, 1.0, 3.0, 1.5, 3.0]))
    # b: 2 is its highest.
    b = run("b", 1, lines([0.0, 0.2, 0.7, 0.8], [0.0, 0.5, 2.0, 1.0]))
    still = run("still", 1, lines([0.0, 0.0], [0.0, 0.01]))
    result = compared(a, b, still)
    assert result.equal_kl == 2.0
    assert [value(arm.at_equal_kl) for arm in result.arms[:2]] == pytest.approx([0.5, 0.7])
    assert result.arms[2].at_equal_kl is None


def test_the_kl_between_two_steps_is_not_always_in_the_middle() -> None:
    a = run("a", 1, lines([0.0, 1.0], [0.0, 8.0]))
    assert value(compared(a, run("b", 1, lines([0.0, 0.3], [0.0, 2.0]))).arms[0].at_equal_kl) == pytest.approx(0.25)


def test_the_judge_at_equal_kl_is_read_between_the_steps_that_have_it() -> None:
    metrics = lines([0.0] * 6)  # the KL of step s is s − 1: that of the policy after s − 1 updates
    for step, rate in ((2, 0.5), (5, 0.8), (6, 0.1)):  # of the policy after s updates
        metrics[step - 1]["judge_win_rate"] = rate
    other = run("b", 1, lines([0.0, 0.0, 0.0], [0.0, 1.0, 2.5]))
    result = compared(run("a", 1, metrics), other)
    assert result.equal_kl == 2.5  # which a has after 2.5 updates, a sixth of the way from 2 to 5
    assert value(result.arms[0].judge_at_equal_kl) == pytest.approx(0.55)
    assert result.arms[1].judge_at_equal_kl is None


def test_the_judge_is_not_guessed_before_it_was_first_asked() -> None:
    metrics = lines([0.0] * 6)
    metrics[4]["judge_win_rate"] = metrics[5]["judge_win_rate"] = 0.7
    result = compared(run("a", 1, metrics), run("b", 1, lines([0.0, 0.0], [0.0, 2.0])))
    assert result.arms[0].judge_at_equal_kl is None


# --- a set reward ------------------------------------------------------------------------------------------------


def test_steps_and_seconds_to_a_set_reward() -> None:
    first, second = run("a", 1, lines([0.1, 0.5, 0.2, 0.6])), run("a", 2, lines([0.1, None, 0.3, 0.5]))
    arm = only_arm(first, second, target_reward=0.5)
    assert (arm.steps_to_target, arm.seconds_to_target) == (3.0, 21.0)  # of 2 and 4 steps of 7 seconds
    assert compared(first, second, target_reward=0.5).target_reward == 0.5


def test_one_run_that_never_gets_there_leaves_no_mean() -> None:
    arm = only_arm(run("a", 1, lines([0.1, 0.5])), run("a", 2, lines([0.1, 0.49])), target_reward=0.5)
    assert (arm.steps_to_target, arm.seconds_to_target) == (None, None)


def test_unknown_seconds_leave_the_steps() -> None:
    metrics = lines([0.1, 0.5])
    del metrics[0]["seconds_score"]
    arm = only_arm(run("a", 1, metrics), target_reward=0.5)
    assert (arm.steps_to_target, arm.seconds_to_target) == (2.0, None)


def test_the_first_arms_end_is_the_target() -> None:
    result = compared(*ended("a", 0.3, 0.5), *ended("b", 0.9))
    assert result.target_reward == pytest.approx(0.4)
    assert result.arms[1].steps_to_target == 4.0


# --- files -------------------------------------------------------------------------------------------------------


def full() -> Analysis:
    settings = {"adapter.init": "pissa", "adapter.targets": ["q_proj", "v_proj"]}
    broken = run("b", 2, lines([0.0, None]), status="failed", message="the loss is nan before optimizer step 9")
    first = run(
        "a",
        1,
        settings=settings,
        folder=Path("runs/a/1"),
        ppo={"steps": 4, "reward_last": 0.4, "peak_rss_mib": 900.5},
        reward={"eval_accuracy": 0.7, "reliability": [{"count": 3}]},
        evaluate={"win_rate": 0.6, "gold_policy": None},
        drift={"update_norm": math.nan, "principal_share": 0.25, "spectrum": [1.0, 0.5]},
        preferences={"a prompt": [1.0]},
    )
    return compared(first, run("b", 1, settings={"ppo.learning_rate": 1e-4}), broken)


def test_json_holds_no_nan_and_no_metrics() -> None:
    analysis = full()
    tree = to_json(analysis)
    assert tree == json.loads(json.dumps(tree, allow_nan=False))
    assert (tree["name"], tree["measure"], len(tree["arms"]), len(tree["pairs"])) == ("test", "reward", 2, 1)
    assert tree["pairs"][0]["p_value"] is None
    assert tree["pairs"][0]["sentence"] == analysis.pairs[0].sentence
    assert tree["arms"][0]["reward"] == {"value": pytest.approx(0.4), "low": None, "high": None}
    assert tree["arms"][1]["collapses"][0]["kind"] == "not finite"
    first = tree["runs"][0]
    assert first["drift"]["update_norm"] is None
    assert "folder" not in first  # another machine's paths are of no use
    assert {"metrics", "preferences"}.isdisjoint(first)
    assert len(analysis.runs[0].metrics) == 4  # it is a copy that was cut


def test_rows_are_flat_and_have_the_same_columns() -> None:
    rows = to_rows(full())
    assert [row.keys() for row in rows] == [rows[0].keys()] * 3
    assert {type(cell) for row in rows for cell in row.values()} <= {str, int, float, type(None)}
    first, second, third = rows
    assert (first["arm"], first["seed"], first["status"], first["message"]) == ("a", 1, "finished", "")
    assert (first["adapter.init"], first["adapter.targets"]) == ("pissa", '["q_proj", "v_proj"]')
    assert (first["ppo.learning_rate"], second["ppo.learning_rate"]) == (None, 1e-4)
    assert (first["ppo_reward_last"], first["ppo_peak_rss_mib"], first["reward_eval_accuracy"]) == (0.4, 900.5, 0.7)
    assert (first["evaluate_win_rate"], first["evaluate_gold_policy"], first["evaluate_ci_low"]) == (0.6, None, None)
    assert (first["drift_update_norm"], first["drift_principal_share"]) == (None, 0.25)
    assert (first["reward"], first["kl"], first["collapses"]) == (0.4, 3, "")
    assert (third["status"], third["collapses"]) == ("failed", "not finite at step 2")
    assert third["message"] == "the loss is nan before optimizer step 9"
    table = io.StringIO()
    writer = csv.DictWriter(table, list(first))
    writer.writeheader()
    writer.writerows(rows)
    assert len(table.getvalue().splitlines()) == 4

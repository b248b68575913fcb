"""The plots of a comparison: what is drawn are affine images of the numbers, and what is told are the numbers."""

import math
import re
from html import unescape
from typing import Any

import numpy as np
import pytest

from pe_rlhf.comparison.page.bars import draw_cost, draw_drift, draw_win_rates, wrapped
from pe_rlhf.comparison.page.comparison_plots import draw_frontier, draw_metric, draw_spectra, looks
from pe_rlhf.comparison.page.tables import gibibytes, seconds
from pe_rlhf.comparison.run_result import Analysis, Estimate, Row
from pe_rlhf.report.charts import Plot
from tests.unit.comparison.analyses import NAN, STEPS, analysis_of, arm_result, metrics, run_result


def drawn(plot: Plot | None) -> tuple[str, str]:
    """A plot's data in words, and its SVG."""
    assert plot
    label = re.search(r'aria-label="([^"]*)"', plot.svg)
    assert label
    return unescape(label[1]).partition(". ")[2], str(plot.svg)


def path_of(svg: str, style: str) -> np.ndarray:
    """The points of the first path whose style has this."""
    found = re.search(rf'<path d="([^"]+)"[^>]*style="[^"]*{style}', svg)
    assert found, style
    return np.array([[float(x), float(y)] for x, y in re.findall(r"[ML] (\S+) (\S+)", found[1])])


def assert_affine(drawn: np.ndarray, values: Any) -> tuple[float, float]:
    """The drawn coordinates are `slope · values + offset`, which are returned."""
    slope, offset = np.polyfit(values, drawn, 1)
    np.testing.assert_allclose(slope * np.asarray(values) + offset, drawn, atol=1e-3)
    return float(slope), float(offset)


def reward_curves(analysis: Analysis) -> Plot | None:
    return draw_metric(analysis, "Reward", "reward", "mean score")


def test_curves_are_means_over_runs_in_bands_from_the_lowest_to_the_highest() -> None:
    plot = reward_curves(analysis_of("lora"))
    _, svg = drawn(plot)
    line = path_of(svg, r"fill: none; stroke: var\(--c1\)")
    assert_affine(line[:, 0], list(STEPS))
    slope, offset = assert_affine(line[:, 1], [0.34 + 0.01 * step for step in STEPS])
    assert slope < 0  # y of an SVG points down
    outline, place = svg.split("FillBetween")[1].split("<use")[:2]
    shift = re.search(r' y="(\S+)"', place)
    assert shift
    ys = [float(y) + float(shift[1]) for y in re.findall(r"[ML] \S+ (\S+)", outline)]
    band = (np.array(ys) - offset) / slope
    assert min(band) == pytest.approx(0.3 + 0.01 + 0.02, abs=1e-4)  # seed 1 at step 1
    assert max(band) == pytest.approx(0.3 + 0.4 + 0.06, abs=1e-4)  # seed 3 at step 40
    assert plot
    assert plot.note == "mean of an arm's runs; band: lowest to highest run"


def test_a_failed_run_counts_as_far_as_it_came_and_an_unfinished_one_does_not() -> None:
    runs = [
        run_result("lora", 0, 1),
        run_result("lora", 0, 2, "failed", metrics=metrics(0, 6, range(1, 6))),
        run_result("lora", 0, 3, "unfinished", metrics=metrics(0, 1000)),
    ]
    analysis = analysis_of("lora", runs=runs)
    plot = reward_curves(analysis)
    # At step 1 the mean of the curves of seeds 1 and 6, at step 40 that of seed 1 alone.
    assert drawn(plot)[0] == "lora: 0.38 at step 1, 0.72 at step 40."
    assert plot
    assert "×: a run failed here" in plot.note
    # The frontier shows the finished run alone, from running means over steps 1…3 and 38…40.
    assert drawn(draw_frontier(analysis))[0] == "lora: 0.34 at KL 0.25, 0.71 at KL 3.95."


def test_values_that_are_not_finite_are_left_out() -> None:
    rows = metrics(0, 1)
    rows[0] |= {"reward": None, "kl": math.inf}
    rows[-1] |= {"reward": NAN, "entropy": None}
    analysis = analysis_of("lora", runs=[run_result("lora", 0, 1, metrics=rows)])
    assert drawn(reward_curves(analysis))[0] == "lora: 0.34 at step 2, 0.71 at step 39."
    assert drawn(draw_metric(analysis, "KL", "kl", ""))[0] == "lora: 0.25 at step 2, 4.05 at step 40."


def test_the_frontier_is_marked_at_the_equal_kl() -> None:
    few = range(1, 20)  # so few steps are not smoothed
    runs = [run_result("lora", 0, seed, metrics=metrics(0, seed, few)) for seed in (1, 3)]
    _, svg = drawn(draw_frontier(analysis_of("lora", runs=runs, equal_kl=1.25)))
    line = path_of(svg, r"fill: none; stroke: var\(--c1\)")
    slope, offset = assert_affine(line[:, 0], [0.1 * step + 0.1 for step in few])
    assert_affine(line[:, 1], [0.34 + 0.01 * step for step in few])
    mark = path_of(svg, r"stroke-dasharray: [^\"]*stroke: var\(--ink\)")
    np.testing.assert_allclose(mark[:, 0], slope * 1.25 + offset, atol=1e-3)
    assert "equal KL: 1.25" in svg
    assert "equal KL" not in drawn(draw_frontier(analysis_of("lora", runs=runs, equal_kl=None)))[1]


def test_an_arm_that_blows_up_makes_the_scale_logarithmic() -> None:
    wild = [run_result("wild", 2, 1, metrics=metrics(2, 1, kl=10.0))]
    tame = [run_result(arm, 0, 1) for arm in ("a", "b")]
    for runs, noted in ((tame, False), ([*tame, *wild], True)):
        analysis = analysis_of("a", "b", "wild", runs=runs)
        curves, frontier = draw_metric(analysis, "KL", "kl", ""), draw_frontier(analysis)
        assert curves
        assert frontier
        assert ("logarithmic at the top" in curves.note) is noted
        assert ("logarithmic at the right" in frontier.note) is noted


def bar_widths(svg: str) -> list[float]:
    """Widths of the bars; grid lines and whiskers are not filled."""
    paths = re.findall(r'<path d="([^"]+)"[^>]*style="fill: var\(--c\d+\)', svg)
    xs = [[float(x) for x in re.findall(r"[ML] (\S+) \S+", path)] for path in paths]
    return [max(x) - min(x) for x in xs]


def test_costs_are_shares_of_what_full_tuning_takes() -> None:
    analysis = analysis_of("lora", "full", "pissa")
    plot = draw_cost(analysis, "Memory", "peak_mib", gibibytes)
    told, svg = drawn(plot)
    assert told == "lora: 33 %. full: 100 %. pissa: 35 %."  # 2048, 6144 and 2176 MiB
    assert plot
    assert plot.note == "100 %: full tuning (full), 6.00 GiB"
    widths = np.array(bar_widths(svg))
    np.testing.assert_allclose(widths / widths[1], [2048 / 6144, 1, 2176 / 6144], atol=1e-4)
    told, _ = drawn(draw_cost(analysis, "Time", "reward_seconds_per_step", seconds))
    assert told == "lora: 41 %. full: 100 %. pissa: 41 %."  # 3.25 of 8 s


def test_costs_without_full_tuning_are_absolute() -> None:
    told, svg = drawn(draw_cost(analysis_of("lora", "pissa"), "Time", "seconds_per_step", seconds))
    assert told == "lora: 12.5 s. pissa: 13.5 s."
    widths = bar_widths(svg)
    assert widths[1] / widths[0] == pytest.approx(13.5 / 12.5, abs=1e-4)


def test_win_rates_stand_with_their_intervals_beside_50_percent() -> None:
    alone = Estimate(0.54, NAN, NAN)
    arms = [arm_result("a", 5), arm_result("b", 0, win_rate=None), arm_result("c", 2, win_rate=alone)]
    told, svg = drawn(draw_win_rates(analysis_of("a", "b", "c", arms=arms)))
    assert told == "a: 60.0 %, 95 % interval 50.0 % to 68.0 %. b: not measured. c: 54.0 %."
    widths = bar_widths(svg)
    assert widths[0] / widths[1] == pytest.approx(0.60 / 0.54, abs=1e-4)
    left, per_share = path_of(svg, r"fill: var\(--c1\)")[:, 0].min(), widths[0] / 0.60
    whisker = path_of(svg, r"fill: none; stroke: var\(--ink\); stroke-width: 1\.3")
    np.testing.assert_allclose((whisker[:, 0] - left) / per_share, [0.5, 0.68], atol=1e-4)
    half = path_of(svg, r"fill: none; stroke: var\(--ink\); stroke-linecap")
    np.testing.assert_allclose((half[:, 0] - left) / per_share, 0.5, atol=1e-4)


def test_spectra_and_drift_are_means_over_runs() -> None:
    drifts = [
        {"update_norm": 0.01, "principal_share": 0.4, "minor_share": 0.1, "spectrum": [1.0, 0.5, 0.1, 0.0, 0.0]},
        {"update_norm": 0.03, "principal_share": 0.6, "minor_share": 0.2, "spectrum": [1.0, 0.7, 0.3, 0.0, 0.0]},
        {},
    ]
    runs = [run_result("lora", 0, seed, drift=drift) for seed, drift in enumerate(drifts)]
    analysis = analysis_of("lora", runs=runs)
    # Where the update has no rank any more the line ends.
    assert drawn(draw_spectra(analysis))[0] == "lora: 1 at singular value 1, 0.2 at singular value 3."
    assert drawn(draw_drift(analysis))[0] == "lora: 50.0 % principal, 15.0 % minor, ‖ΔW‖/‖W‖ 0.0200."


@pytest.mark.parametrize("drift", [{}, {"update_norm": 0.0}, {"spectrum": [0.0, 0.0]}, {"spectrum": [None, NAN]}])
def test_an_update_that_is_nothing_or_unknown_has_no_plot(drift: Row) -> None:
    analysis = analysis_of("lora", runs=[run_result("lora", 0, 1, drift=drift)])
    assert draw_spectra(analysis) is None
    assert draw_drift(analysis) is None


def test_more_arms_than_colours_still_look_different() -> None:
    found = looks([str(i) for i in range(48)])
    assert len({(look.number, look.dashes) for look in found}) == 48


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("pissa", ["pissa"]),
        ("init=lora_ga, rank=16, lr=0.0003", ["init=lora_ga, rank=16,", "lr=0.0003"]),
        ("x" * 50, ["x" * 22, "x" * 22, "x" * 6]),
        ("y" * 67, ["y" * 22, "y" * 22, "y" * 22 + "…"]),
    ],
)
def test_long_names_are_cut_into_lines(name: str, lines: list[str]) -> None:
    assert wrapped(name).split("\n") == lines

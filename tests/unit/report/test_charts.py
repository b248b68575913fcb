"""What is drawn are affine images of the numbers."""

import math
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
import pytest

from pe_rlhf.report.charts import (
    COLOURS,
    GREY,
    Bar,
    Line,
    draw_bars,
    draw_lines,
    draw_matrix,
    draw_reliability,
    looks,
    points,
)
from pe_rlhf.report.page import Plot
from tests.unit.report.parsed import parse, path_of

BEFORE = dict(matplotlib.rcParams)


def svg_of(plot: Plot | None) -> str:
    assert plot
    assert parse(str(plot.svg)).tag == "svg"
    return str(plot.svg)


def affine(drawn: np.ndarray, values: Sequence[float]) -> tuple[float, float]:
    """Slope and offset of the drawn coordinates over the values, which they must follow exactly."""
    slope, offset = np.polyfit(values, drawn, 1)
    np.testing.assert_allclose(slope * np.asarray(values) + offset, drawn, atol=1e-3)
    return float(slope), float(offset)


def test_lines_and_bands_are_where_the_numbers_are() -> None:
    steps, values = list(range(1, 21)), [0.25 + 0.03 * math.sin(step) for step in range(1, 21)]
    low, high = ([value + shift for value in values] for shift in (-0.1, 0.1))
    svg = svg_of(draw_lines("Reward", "score", [Line("reward", steps, values, low, high)], x_label="PPO step"))
    line = path_of(svg, f"fill: none; stroke: {COLOURS[0]}")
    assert affine(line[:, 0], steps)[0] > 0
    slope, offset = affine(line[:, 1], values)
    assert slope < 0  # y of an SVG points down
    outline = re.search(
        r'<path id="m\w+" d="([^"]+)"/>\s*</defs>\s*<g [^>]*>\s*<use [^>]*y="(\S+)"[^>]*fill-opacity', svg
    )
    assert outline
    ys = [float(y) + float(outline[2]) for y in re.findall(r"[ML] \S+ (\S+)", outline[1])]
    found = (np.array(ys) - offset) / slope
    assert (min(found), max(found)) == pytest.approx((min(low), max(high)), abs=1e-4)


@pytest.mark.filterwarnings("error")
def test_a_curve_of_nothing_but_zeros_is_drawn_where_others_have_powers_of_ten() -> None:
    """A mismatch of 0 has no logarithm; matplotlib would warn of it on the console."""
    values = [0.0, 0.0, 0.0]
    svg = svg_of(draw_lines("Mismatch", "nats", [Line("mismatch", [1, 2, 3], values)], x_label="PPO step", log=True))
    assert len(set(path_of(svg, f"fill: none; stroke: {COLOURS[0]}")[:, 1])) == 1


def test_a_metric_that_is_null_leaves_its_step_out() -> None:
    rows = [{"step": 1, "a": None}, {"step": 2, "a": 0.5, "low": 0.1}, {"step": 3, "a": 0.7}]
    assert points(rows, "a", "A") == Line("A", [2, 3], [0.5, 0.7], [], [])
    assert points(rows, "a", "A", "low", "a") == Line("A", [2], [0.5], [0.1], [0.5])
    assert draw_lines("A", "", [points(rows, "b", "B")], x_label="PPO step") is None


def test_a_mark_is_on_its_value_and_named() -> None:
    line = Line("a", [0.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    svg = svg_of(draw_lines("F", "", [line], x_label="KL", mark=(1.25, "equal KL: 1.25"), reference=1.5))
    drawn = path_of(svg, f"fill: none; stroke: {COLOURS[0]}")
    slope, offset = affine(drawn[:, 0], [0.0, 2.0, 4.0])
    mark = path_of(svg, f'stroke-dasharray[^"]*stroke: {GREY}')
    np.testing.assert_allclose(mark[:, 0], slope * 1.25 + offset, atol=1e-3)
    up, base = affine(drawn[:, 1], [1.0, 2.0, 3.0])
    level = path_of(svg, f"fill: none; stroke: {GREY}; stroke-width: 0.9")
    np.testing.assert_allclose(level[:, 1], up * 1.5 + base, atol=1e-3)
    assert "equal KL: 1.25" in svg


def test_bars_are_as_long_as_their_numbers() -> None:
    bars = [Bar("a", "60 %", (0.6,), (0.5, 0.68)), Bar("b", "–"), Bar("c", "x", (0.3, 0.15)), Bar("<i>$x$" * 9, "9")]
    svg = svg_of(draw_bars("Win-rate", bars, reference=0.5, end=1.0))
    drawn = [path_of(svg, f"fill: {looks(row)[0]}", i)[:, 0] for row, i in ((0, 0), (2, 0), (2, 1))]
    widths = [float(np.ptp(xs)) for xs in drawn]
    np.testing.assert_allclose(np.array(widths) / widths[0], [1, 0.5, 0.25], atol=1e-4)
    left, whole = drawn[0].min(), widths[0] / 0.6
    whisker = path_of(svg, f"fill: none; stroke: {GREY}; stroke-width: 1.5")
    np.testing.assert_allclose((whisker[:, 0] - left) / whole, [0.5, 0.68], atol=1e-4)
    half = path_of(svg, f"fill: none; stroke: {GREY}; stroke-linecap")
    np.testing.assert_allclose((half[:, 0] - left) / whole, 0.5, atol=1e-4)
    assert "&lt;i&gt;$x$&lt;i&gt;$x$" in svg  # a name, neither markup nor a formula
    assert draw_bars("Win-rate", [Bar("b", "–")]) is None


def test_reliability_is_drawn_for_bins_with_pairs() -> None:
    edges = [0.5, 0.6, 0.7, 0.8, 0.9]
    counts, confidence, accuracy = [30, 25, 0, 15, 10], [0.53, 0.66, None, 0.84, 0.96], [0.5, 0.7, None, 0.8, 0.9]
    bins = [
        {"lower": low, "upper": low + 0.1, "count": n, "mean_confidence": c, "accuracy": a}
        for low, n, c, a in zip(edges, counts, confidence, accuracy, strict=True)
    ]
    line = path_of(svg_of(draw_reliability(bins)), f"fill: none; stroke: {COLOURS[0]}")
    affine(line[:, 0], [0.53, 0.66, 0.84, 0.96])
    affine(line[:, 1], [0.5, 0.7, 0.8, 0.9])
    assert draw_reliability([row | {"count": 0} for row in bins]) is None


def test_a_matrix_of_zeros_is_drawn() -> None:
    assert "data:image/png" in svg_of(draw_matrix("Kernel", [[0.0, 0.0], [0.0, 0.0]], "sample"))


def test_eighteen_lines_look_different_and_are_seen_on_white_and_on_black() -> None:
    assert len({looks(number) for number in range(18)}) == 18
    for colour in (*COLOURS, GREY):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (light + 0.05) > 3, colour  # WCAG 2.2, graphics
        assert (light + 0.05) / 0.05 > 3, colour


def test_the_same_data_gives_the_same_text_and_leaves_global_settings() -> None:
    drawn = [draw_lines("A", "", [Line("a", [1, 2], [1, 2])], x_label="PPO step") for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert dict(matplotlib.rcParams) == BEFORE

"""From verdicts to a line: what makes a pair, clusters, and each figure against the function that it is of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from reward.length_control import length_controlled_win_rate
from reward.summary import Outcome, group_by_candidate, pair_up, summarise
from reward.verdicts import FIRST, SECOND, Verdict, read_difficulty
from reward.winrate import bootstrap_interval, win_rate
from tests.failures import raises


def single(preference: float, **columns: Any) -> Outcome:
    return Outcome((Verdict(preference, **columns),))


def test_a_pair_is_both_orders_of_one_question() -> None:
    rows = [
        Verdict(0.9, position=0, order=SECOND),
        Verdict(0.5, position=0, sample=1, order=FIRST),  # whose other order is missing
        Verdict(0.7, position=0, order=FIRST),
        Verdict(0.1, position=0, order=FIRST, candidate="other"),
        Verdict(0.2, position=0, order=FIRST, baseline="other"),
        Verdict(0.3, position=0, order=FIRST, judge="other"),
        Verdict(0.4, position=1, order=FIRST),
        Verdict(0.6),
    ]
    single, both = pair_up(rows)
    assert single.preference == 0.6
    assert [(v.order, v.preference) for v in both.verdicts] == [(FIRST, 0.7), (SECOND, 0.9)]
    assert both.first_wins == pytest.approx((0.7 + 1 - 0.9) / 2)
    assert single.first_wins is None
    with raises("conflict", key="order"):
        pair_up([*rows, rows[2]])
    with raises("missing", key="position"):
        pair_up([Verdict(0.5, order=FIRST)])


def test_candidates_and_judges_have_a_group_each() -> None:
    outcomes = [single(1.0, candidate="a"), single(0.0, candidate="b"), single(0.5, candidate="a", judge="j")]
    outcomes.append(single(0.0, candidate="a"))
    groups = group_by_candidate(outcomes)
    assert [*groups] == [("a", None), ("b", None), ("a", "j")]
    assert [o.preference for o in groups["a", None]] == [1.0, 0.0]


def test_comparisons_of_a_prompt_are_one_cluster_everywhere() -> None:
    """Ten wins on prompt 0, two losses on 1 and 2, and two wins without a position, which are clusters of their own."""
    outcomes = [single(1.0, position=0, sample=i) for i in range(10)]
    outcomes += [single(0.0, position=1), single(0.0, position=2), single(1.0), single(1.0)]
    preferences = [o.preference for o in outcomes]
    clusters = [*[0] * 10, 1, 2, 3, 4]
    line = summarise("candidate", [*outcomes, single(math.nan, position=3)], level=0.8)
    expected = win_rate(preferences, clusters, 0.8)
    assert (line["win_rate"], line["n"], line["invalid"]) == (12 / 14, 14, 1)
    assert (line["wins"], line["ties"], line["losses"]) == (12, 0, 2)
    assert (line["ci_low"], line["ci_high"]) == (expected.ci_low, expected.ci_high)
    assert line["standard_error"] == expected.standard_error
    assert (line["bootstrap_low"], line["bootstrap_high"]) == bootstrap_interval(preferences, clusters, 0.8)
    assert line["sign_test_p"] == pytest.approx(binomtest(3, 5).pvalue)  # of five prompts
    assert "flips" not in line
    assert "length_controlled_win_rate" not in line
    with raises("empty", key="preference"):
        summarise("candidate", [single(math.nan)])


def test_flips_are_counted_among_the_pairs_that_were_asked_twice() -> None:
    def both(first: float, second: float, position: int) -> Outcome:
        verdicts = (Verdict(p, position=position, order=o) for p, o in ((first, FIRST), (second, SECOND)))
        return Outcome((*verdicts,))

    line = summarise("candidate", [both(1.0, 0.0, 0), both(1.0, 1.0, 1), both(0.75, 0.75, 2), single(1.0, position=3)])
    # Shown first it won in (1 + 1)/2, (1 + 0)/2 and (0.75 + 0.25)/2.
    assert (line["flips"], line["flip_share"], line["position_bias"]) == (1, pytest.approx(1 / 3), pytest.approx(1 / 6))


def test_lengths_and_difficulties_go_to_the_length_control() -> None:
    rows = [(1.0, 30, 10), (1.0, 25, 20), (0.0, 10, 40), (1.0, 30, 20), (0.0, 20, 22), (math.nan, 7, 9)]
    table = [0.1, -0.2, 0.3, 0.4, -0.5, 0.6]
    outcomes = [
        single(p, position=i, len_candidate=float(a), len_baseline=float(b)) for i, (p, a, b) in enumerate(rows)
    ]
    preferences, mine, theirs = zip(*rows, strict=True)
    for difficulty in (None, table):
        line = summarise("candidate", outcomes, difficulty, level=0.9)
        expected = length_controlled_win_rate(preferences, mine, theirs, difficulty, [*range(6)], level=0.9)
        assert line["length_controlled_win_rate"] == expected.win_rate
        assert line["length_controlled_standard_error"] == expected.standard_error
        assert (line["length_controlled_ci_low"], line["length_controlled_ci_high"]) == (
            expected.ci_low,
            expected.ci_high,
        )
        assert ("difficulty" in line["length_controlled_for"]) == (difficulty is not None)
        assert (line["mean_len_candidate"], line["mean_len_baseline"]) == (122 / 6, 121 / 6)
    # Those of the rows go before a table's.
    own = [Outcome((Verdict(**{**vars(o.verdict), "difficulty": d}),)) for o, d in zip(outcomes, table, strict=True)]
    assert summarise("candidate", own, [9.0] * 6, level=0.9) == line
    some = [*own[:3], *outcomes[3:]]  # of which three have none
    assert summarise("candidate", some, table, level=0.9) == line
    assert "difficulty" not in summarise("candidate", some)["length_controlled_for"]
    with raises("missing", key="difficulty"):
        summarise("candidate", outcomes, table[:5])
    with raises("missing", key="difficulty"):
        summarise("candidate", [single(1.0, len_candidate=2.0, len_baseline=1.0)], table)
    assert "length_controlled_win_rate" not in summarise("candidate", [*outcomes, single(1.0, len_candidate=3.0)])


def test_a_kappa_that_does_not_exist_is_null() -> None:
    line = summarise("candidate", [single(1.0, human=1.0), single(0.9, human=1.0), single(0.2)])
    assert (line["human_accuracy"], line["human_kappa"], line["human_n"]) == (1.0, None, 2)
    assert line["human_accuracy_low"] == pytest.approx(binomtest(2, 2).proportion_ci(method="wilson").low)
    assert line["human_accuracy_high"] == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("index,instruction_difficulty\n1,0.5\n0,-0.25\n1,9\n", [-0.25, 0.5]),  # of several rows the first one counts
        ("instruction_difficulty\n0.5\n-0.25\n", [0.5, -0.25]),
    ],
)
def test_difficulties_by_position(tmp_path: Path, text: str, expected: list[float]) -> None:
    (tmp_path / "d.csv").write_text(text)
    assert read_difficulty(tmp_path / "d.csv") == expected


@pytest.mark.parametrize(
    ("text", "kind", "key", "row"),
    [
        ("index,instruction_difficulty\n0,0.5\n2,0.5\n", "invalid", "index", None),
        ("index,instruction_difficulty\n0,\n", "missing", "instruction_difficulty", 2),
        ("index,instruction_difficulty\n0,hard\n", "invalid", "instruction_difficulty", 2),
    ],
)
def test_difficulties_that_are_none(tmp_path: Path, text: str, kind: Any, key: str, row: int | None) -> None:
    (tmp_path / "d.csv").write_text(text)
    with raises(kind, key=key, file=tmp_path / "d.csv", row=row):
        read_difficulty(tmp_path / "d.csv")

"""The pages of `evaluate` and `evaluate-reward`: numbers, kinds of outcome, damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.report.evaluation_page import write_evaluation_report, write_reward_report
from reward.asking import Pair
from reward.errors import InputError
from reward.verdicts import FIRST, SECOND
from tests.unit.report.parsed import assert_fetches_nothing, parse, plots, section, table, text

Row = dict[str, Any]

SUMMARY = {"candidate": "a", "baseline": "b", "judge": "j", "n": 4, "wins": 1, "ties": 1, "losses": 2, "invalid": 1} | {
    "win_rate": 0.375,
    "ci_low": 0.1,
    "ci_high": 0.8,
    "flips": 1,
    "flip_share": 0.25,
    "position_bias": -0.125,
}
REWARD = (
    {"model": "m", "pairs": "p.jsonl", "n": 50, "accuracy": 0.7, "ci_low": 0.56, "ci_high": 0.81, "reliability": []}
    | {"calibration_error": 0.05, "length": {"longer_wins": 0.6, "standard_error": 0.05}}
    | {"subsets": {"chat": {"n": 50, "accuracy": 0.7, "ci_low": 0.56, "ci_high": 0.81, "margin": 0.5}}}
)
# What the judge says with the candidate first and with the baseline first, as the candidate's share; the outcome.
OUTCOMES = [(1.0, 0.5, "win"), (0.0, 0.0, "loss"), (0.5, 0.5, "tie"), (0.9, 0.2, "flip"), (None, 1.0, "invalid")]


def verdict(position: int, order: str, preference: float | None, **changes: Any) -> Row:
    answers = {"preference": preference, "reason": "", "raw": "", "invalid": None if preference is not None else "?"}
    responses = {"prompt": f"p{position}", "response_candidate": "<b>yes</b>", "response_baseline": "no"}
    return {"position": position, "sample": 0, "order": order, "judge": "j"} | responses | answers | changes


def write(folder: Path, summary: Row, verdicts: list[Row]) -> list[Pair]:
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in verdicts))
    return [Pair(f"p{i}", "<b>yes</b>", "no", i) for i in range(len(OUTCOMES))]


def test_each_pair_of_this_evaluation_is_there_with_its_outcome(tmp_path: Path) -> None:
    verdicts = [
        row
        for i, (first, second, _) in enumerate(OUTCOMES)
        for row in (verdict(i, FIRST, first, reason="because"), verdict(i, SECOND, second))
    ]
    others = [verdict(0, FIRST, 1.0, judge="another"), verdict(1, FIRST, 1.0, response_candidate="another")]
    path = write_evaluation_report(tmp_path, write(tmp_path, SUMMARY, others + verdicts))
    page = parse(path)
    shown = list(page.iter("article"))
    assert [article.get("data-kind") for article in shown] == [kind for _, _, kind in OUTCOMES]
    assert [text(side) for side in shown[0][2]] == ["a<b>yes</b>", "bno"]
    assert "because" in text(shown[0][3])
    counts = {button.get("data-show"): text(button) for button in page.iter("button")}
    assert counts == {"all": "all (5)"} | {kind: f"{kind} (1)" for _, _, kind in OUTCOMES}
    tiles = {text(tile[0]): text(tile[1]) for tile in next(page.iter("dl"))}
    assert tiles == {"Win-rate": "37.5 %", "Flips": "25.0 %", "Position bias": "−12.5 points", "Invalid": "1"}
    assert_fetches_nothing(page, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "content", "row", "key"),
    [
        ("summary.json", "{", None, None),
        ("summary.json", "{}", None, "candidate"),
        ("verdicts.jsonl", "{}\n{", 2, None),
        ("verdicts.jsonl", '{"prompt": "p"}\n', 1, "response_candidate"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str, row: int | None, key: str | None) -> None:
    pairs = write(tmp_path, SUMMARY, [])
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError) as caught:
        write_evaluation_report(tmp_path, pairs)
    found = caught.value
    assert (found.kind, found.file, found.row, found.key) == ("unreadable", str(tmp_path / file), row, key)


def test_a_reward_model_has_its_numbers_by_subset() -> None:
    bins = [{"lower": 0.5, "upper": 1.0, "count": 50, "mean_confidence": 0.7, "accuracy": 0.7}]
    page = parse(write_reward_report(REWARD | {"reliability": bins}))
    assert table(section(page, "Subsets"))["chat"] == {
        "Pairs": "50",
        "Accuracy, 95 % interval": "70.0 %|56.0 % – 81.0 %",
        "Mean margin": "0.500",
    }
    assert list(plots(page)) == ["Reliability"]
    styles = [span.get("style") for span in page.iter("span") if span.get("class") == "range"]
    assert styles == ["left: 56.00%; width: 25.00%", "left: 50.20%; width: 19.60%"]  # 0.6 ± 1.96 · 0.05
    assert section(parse(write_reward_report(REWARD)), "Calibration") is None

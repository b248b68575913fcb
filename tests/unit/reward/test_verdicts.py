"""Files of verdicts: formats, both orders, refusals; `pe-rlhf winrate` on them."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reward.asking import Pair, judge_pairs
from reward.errors import InputError
from reward.judges import CompareJudge, FunctionJudge
from reward.judges.length import length_judge
from reward.summary import combine_orders, pair_up, summarise
from reward.verdicts import FIRST, SECOND, Verdict, read_verdicts
from tests.runs import Outcome, write_jsonl


def results(outcome: Outcome) -> dict[str, dict[str, Any]]:
    assert outcome.code == 0, outcome
    return {line["candidate"]: line for line in map(json.loads, outcome.out.splitlines())}


def published(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "leaderboard.csv").open(encoding="utf-8") as lines:
        return {row[""]: row for row in csv.DictReader(lines)}


@pytest.mark.shared
def test_all_15_models_of_alpaca_eval(cli: Callable[..., Outcome], shared_data: Path) -> None:
    known = published(shared_data / "alpaca_eval")
    found = results(cli("winrate", shared_data / "alpaca_eval" / "preferences.csv.gz"))
    assert found.keys() == known.keys()
    for model, line in found.items():
        assert 100 * line["win_rate"] == pytest.approx(float(known[model]["win_rate"]), abs=1e-6)
        assert 100 * line["standard_error"] == pytest.approx(float(known[model]["standard_error"]), abs=1e-6)
        expected = float(known[model]["length_controlled_winrate"])
        assert 100 * line["length_controlled_win_rate"] == pytest.approx(expected, abs=0.2)


@pytest.mark.shared
def test_our_columns_give_the_same_as_alpaca_evals(
    cli: Callable[..., Outcome], shared_data: Path, tmp_path: Path
) -> None:
    folder = shared_data / "alpaca_eval"
    with gzip.open(folder / "preferences.csv.gz", "rt", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["model"] == "vicuna-13b"]
    ours = [
        {
            "candidate": row["model"],
            "preference": float(row["preference"]) - 1,
            "position": int(row["position"]),
            "len_candidate": int(row["len_output_2"]),
            "len_baseline": int(row["len_output_1"]),
        }
        for row in rows
    ]
    table = folder / "instruction_difficulty_recovered.csv"
    found = results(cli("winrate", write_jsonl(tmp_path / "v.jsonl", ours), "--difficulty", table))["vicuna-13b"]
    expected = float(published(folder)["vicuna-13b"]["length_controlled_winrate"])
    assert 100 * found["length_controlled_win_rate"] == pytest.approx(expected, abs=0.2)
    with table.open(encoding="utf-8") as lines:
        difficulty = [float(row["instruction_difficulty"]) for row in csv.DictReader(lines)]
    with (tmp_path / "v.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*ours[0], "difficulty"])
        writer.writeheader()
        writer.writerows([row | {"difficulty": difficulty[row["position"]]} for row in ours])
    assert results(cli("winrate", tmp_path / "v.csv"))["vicuna-13b"] == found


def test_alpaca_evals_annotations_as_they_are(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    def row(preference: float | None, output_2: str) -> dict[str, Any]:
        names = {"generator_1": "base", "generator_2": "mine", "annotator": "judge"}
        return {"instruction": "i", "output_1": "xxxx", "output_2": output_2, "preference": preference, **names}

    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([row(1.9, "ab"), row(1.2, "abc"), row(0, "a"), row(None, "abcd")]))
    verdicts = read_verdicts(path)
    assert [v.preference for v in verdicts[:3]] == pytest.approx([0.9, 0.2, 0.5])
    assert [(v.candidate, v.baseline, v.position) for v in verdicts] == [("mine", "base", i) for i in range(4)]
    assert [(v.len_candidate, v.len_baseline) for v in verdicts] == [(2, 4), (3, 4), (1, 4), (4, 4)]
    line = results(cli("winrate", path))["mine"]
    assert (line["n"], line["invalid"], line["ties"]) == (3, 1, 1)
    assert line["win_rate"] == pytest.approx(1.6 / 3)


@pytest.mark.parametrize(
    ("first", "second", "expected", "flipped"),
    [(1, 1, 1, False), (1, 0, 0.5, True), (0.7, 0.3, 0.5, True), (0.9, 0.6, 0.75, False), (0.9, 0.2, 0.55, True),
     (0.95, 0.49, 0.72, True), (0.95, 0.51, 0.73, False)],
)  # fmt: skip
def test_both_orders_are_averaged_and_a_flip_is_seen(
    first: float, second: float, expected: float, flipped: bool
) -> None:
    assert combine_orders(first, second) == (pytest.approx(expected), flipped)


def test_a_tie_in_one_order_is_no_flip_and_an_invalid_order_makes_the_pair_invalid() -> None:
    assert combine_orders(0.5, 1.0) == (0.75, False)
    assert math.isnan(combine_orders(math.nan, 1.0)[0])


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_a_planted_position_bias_cancels_and_is_reported(share: float) -> None:
    """A judge that says A with that probability whatever the responses: 50 %, and the bias is share − 1/2."""
    rng = np.random.default_rng(0)
    rows = [
        Verdict(float(a_wins) if order == FIRST else 1 - float(a_wins), position=i, order=order)
        for i in range(4000)
        for order, a_wins in ((o, rng.random() < share) for o in (FIRST, SECOND))
    ]
    line = summarise("candidate", pair_up(rows))
    assert line["win_rate"] == pytest.approx(0.5, abs=0.02)
    assert line["position_bias"] == pytest.approx(share - 0.5, abs=0.02)
    assert line["flip_share"] == pytest.approx(share**2 + (1 - share) ** 2, abs=0.03)
    assert line["n"] == 4000


def test_only_the_newest_version_of_a_judge_counts(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    """A score judge that preferred the wrong side, and was mended: by hand 1.0 before, 0.0 after."""
    pairs = [Pair(f"p{i}", "mine", "theirs", i) for i in range(10)]
    path = tmp_path / "v.jsonl"
    for version, winner in (("1", "mine"), ("2", "theirs")):
        mended = FunctionJudge(
            lambda _, said, w=winner: [float(text == w) for text in said], "mine:score", version=version
        )
        judge_pairs(mended, pairs, path)
    line = results(cli("winrate", path))["candidate"]
    assert (line["win_rate"], line["n"]) == (0.0, 10)
    assert [row["judge_version"] for row in map(json.loads, path.read_text().splitlines())] == ["1"] * 10 + ["2"] * 10
    # Stopped after 4 of the questions to a third version: the other six verdicts are of an older one.
    rows = [json.loads(line) | {"judge_version": "3", "preference": 1.0} for line in path.read_text().splitlines()[:4]]
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    line = results(cli("winrate", path))["candidate"]
    assert (line["win_rate"], line["n"]) == (1.0, 4)


def test_two_judges_in_a_file_have_a_line_each(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    pairs = [Pair(f"p{i}", "long one", "short", i) for i in range(3)]
    for judge in (
        length_judge(),
        CompareJudge(lambda p, a, b: [float(len(x) < len(y)) for x, y in zip(a, b, strict=True)]),
    ):
        judge_pairs(judge, pairs, tmp_path / "v.jsonl")
    outcome = cli("winrate", tmp_path / "v.jsonl")
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert [(line["judge"], line["win_rate"], line["n"]) for line in lines] == [
        ("length", 1.0, 3),
        ("function", 0.0, 3),
    ]


def test_the_mean_mass_of_labels_is_over_all_questions() -> None:
    rows = [Verdict(1.0, position=i, order=o, label_mass=m) for i, o, m in ((0, FIRST, 0.9), (0, SECOND, 0.7))]
    rows += [Verdict.not_understood("x"), Verdict(0.5)]
    assert summarise("candidate", pair_up(rows))["label_mass"] == pytest.approx(0.8)
    assert "label_mass" not in summarise("candidate", pair_up(rows[2:]))


def test_agreement_with_people(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    rows = [{"preference": p, "human": h} for p, h in ((0.9, 1), (0.8, 1), (0.7, 0), (0.2, 0))]
    line = results(cli("winrate", write_jsonl(tmp_path / "v.jsonl", rows)))["candidate"]
    assert (line["human_accuracy"], line["human_kappa"], line["human_n"]) == (0.75, pytest.approx(0.5), 4)


@pytest.mark.parametrize(
    ("name", "text", "kind", "key", "row"),
    [
        ("v.jsonl", "", "empty", None, None),
        ("v.jsonl", '{"preference": 0.5}\n{"preference": 1.5}\n', "invalid", "preference", 2),
        ("v.jsonl", '{"preference": 0.5}\n{"prefer', "unreadable", None, 2),
        ("v.jsonl", '{"score": 1}\n', "missing", "preference", 1),
        ("v.jsonl", '{"preference": 0.5, "order": "first"}\n', "invalid", "order", 1),
        ("v.csv", "preference\nmany\n", "invalid", "preference", 2),
        ("v.csv", "preference,position\n0.5,-1\n", "invalid", "position", 2),
        ("v.txt", "0.5", "unreadable", None, None),
        ("v.json", "[1]", "unreadable", None, None),
        ("v.json", '[{"output_2": "a", "preference": 2.5}]', "invalid", "preference", 1),
        ("v.jsonl.gz", "not gzip", "unreadable", None, None),
    ],
)
def test_refusals(tmp_path: Path, name: str, text: str, kind: str, key: str | None, row: int | None) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_verdicts(path)
    error = caught.value
    assert (error.kind, error.key, error.file, error.row) == (kind, key, str(path), row)


def test_no_valid_verdict(refused: Callable[..., str], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "v.jsonl", [{"preference": None}])
    assert refused("winrate", path) == "all 1 verdicts on candidate are invalid"


def test_a_gzip_file_that_is_damaged_inside_and_a_very_long_cell(
    cli: Callable[..., Outcome], refused: Callable[..., str], tmp_path: Path
) -> None:
    whole = gzip.compress(b'{"preference": 0.5}\n' * 200)
    (tmp_path / "v.jsonl.gz").write_bytes(whole[:12] + bytes(255 - byte for byte in whole[12:-8]) + whole[-8:])
    assert refused("winrate", tmp_path / "v.jsonl.gz").startswith(str(tmp_path / "v.jsonl.gz"))
    (tmp_path / "v.csv").write_text(f"preference,response\n0.5,{'x' * 200_000}\n")
    assert results(cli("winrate", tmp_path / "v.csv"))["candidate"]["n"] == 1


def test_a_users_own_column_key_loses_no_row(tmp_path: Path) -> None:
    """Only an answer to the very question whose first answer was not valid takes its place."""
    rows = [
        {"key": "p0", "position": 0, "order": FIRST, "preference": 1.0},
        {"key": "p0", "position": 0, "order": SECOND, "preference": 0.5},
        {"key": 0, "position": 1, "order": FIRST, "preference": None},
        {"key": 1, "position": 1, "order": SECOND, "preference": 0.0},
        {"key": ["a"], "position": 2, "order": FIRST, "preference": 0.25},
        {"key": 0, "position": 1, "order": FIRST, "preference": 0.75},
    ]
    path = tmp_path / "verdicts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.preference for row in read_verdicts(path)] == [1.0, 0.5, 0.75, 0.0, 0.25]


def test_a_row_is_the_verdict_and_back() -> None:
    """With every column, and as versions before this one wrote it, without the labels of people."""
    row = {
        "preference": 0.25, "score_candidate": 1.0, "score_baseline": 2.0, "raw": "B", "reason": None, "invalid": None,
        "candidate": "mine", "baseline": "theirs", "position": 3, "order": SECOND, "sample": 1, "len_candidate": 4.0,
        "len_baseline": 5.0, "prompt": [{"role": "user", "content": "p"}], "response_candidate": "r",
        "response_baseline": "s", "judge": "llm", "key": "abc",
    }  # fmt: skip
    for columns in (row, row | {"difficulty": 0.5, "human": 1.0}, row | {"preference": None, "invalid": "no letter"}):
        assert Verdict.from_json(columns).to_json() == columns


def test_a_missing_file_is_named(refused: Callable[..., str]) -> None:
    assert refused("winrate", "nowhere.jsonl") == "there is no file nowhere.jsonl"

"""A jury: votes by hand, agreement against counts by hand, settings in a word and in sections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.scoring.model_judges import check_judge, make_judge
from reward.asking import Pair, judge_pairs
from reward.judges import CompareJudge, Comparison, Verdict
from reward.judges.judge_settings import JudgeSettings
from reward.judges.jury import Jury
from reward.judges.length import length_judge
from reward.summary import summarise
from reward.verdicts import read_verdicts
from tests.failures import raises


def fixed(name: str, *answers: float) -> CompareJudge:
    """Says these, one for each comparison; NaN: no valid verdict."""

    def compare(prompts: Any, a: Any, b: Any) -> list[Verdict]:
        return [Verdict.not_understood("hm") if math.isnan(p) else Verdict(p) for p in answers[: len(prompts)]]

    return CompareJudge(compare, name)  # type: ignore[arg-type]


def asked(vote: Any, *judges: CompareJudge, n: int = 4) -> list[Verdict]:
    return Jury(judges, vote).compare([Comparison("p", "a", "b")] * n)


def test_the_mean_and_the_majority_of_votes() -> None:
    judges = (fixed("x", 0.9, 0.9, 0.2, 1.0), fixed("y", 0.6, 0.2, 0.4, 0.0), fixed("z", 0.3, 0.4, 0.9, 0.5))
    assert [v.preference for v in asked("mean", *judges)] == pytest.approx([0.6, 0.5, 0.5, 0.5])
    assert [v.preference for v in asked("majority", *judges)] == [1.0, 0.0, 0.0, 0.5]
    assert asked("mean", *judges)[0].votes == {"x": 0.9, "y": 0.6, "z": 0.3}


def test_a_vote_that_is_missing_does_not_count_and_half_a_jury_is_none() -> None:
    nan = math.nan
    verdicts = asked("mean", fixed("x", 0.8, nan, nan), fixed("y", 0.6, 0.4, nan), fixed("z", nan, 0.2, 1.0), n=3)
    assert [v.preference for v in verdicts[:2]] == pytest.approx([0.7, 0.3])
    assert not verdicts[2].is_valid
    assert verdicts[0].votes == {"x": 0.8, "y": 0.6, "z": None}


def test_the_version_of_a_jury_changes_with_that_of_each_member() -> None:
    """Also where the others have none: verdicts of a member that was mended are not used again."""

    def version(*of_members: str) -> str:
        members = [CompareJudge(likes, f"member {i}", each) for i, each in enumerate(of_members)]
        return Jury([length_judge(), *members]).version

    found = [version("1", ""), version("2", ""), version("", "1"), version("1", "1")]
    assert len({*found, ""}) == 5
    assert version("", "") == ""


def test_what_a_jury_is_told_its_judges_are_told() -> None:
    told: list[str] = []

    class Told:
        sees_order, batch_size, concurrency = False, 4, 2

        def __init__(self, identity: str) -> None:
            self.identity = identity

        def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
            return [Verdict(0.5) for _ in comparisons]

        def stop(self) -> None:
            told.append(f"{self.identity} stop")

        def rest(self) -> None:
            told.append(f"{self.identity} rest")

    jury = Jury([Told("a"), length_judge(), Told("b")])
    assert (jury.batch_size, jury.sees_order) == (64, False)  # what the length judge takes at a time
    jury.stop()
    jury.rest()
    assert told == ["a stop", "b stop", "a rest", "b rest"]
    assert (Jury([Told("a"), Told("b")]).batch_size, Jury([Told("a"), fixed("x", 0.5)]).sees_order) == (8, True)


def likes(prompts: Any, mine: Any, other: Any) -> list[float]:
    """0.9 for two texts that it knows, 0.3 for others, against a text of ten characters."""

    def of(text: str) -> float:
        return 0.9 if text in ("long enough", "x") else 0.3

    return [of(a) if b == "ten chars." else 1 - of(b) for a, b in zip(mine, other, strict=True)]


def test_votes_follow_the_order_and_agreement_is_counted(tmp_path: Path) -> None:
    """Of 4 pairs the candidate is longer in 3; the other judge likes it in 1 of them and in the fourth."""
    texts = ("long enough", "a long text!", "as long as it", "x")
    pairs = [Pair(f"p{i}", text, "ten chars.", i) for i, text in enumerate(texts)]
    jury = Jury([length_judge(), CompareJudge(likes, "taste")])
    assert jury.sees_order
    outcomes = judge_pairs(jury, pairs, tmp_path / "v.jsonl")
    line = summarise("candidate", outcomes)
    assert line["win_rate"] == pytest.approx(((1 + 0.9) / 2 + 2 * (1 + 0.3) / 2 + 0.9 / 2) / 4)
    assert line["jury_win_rates"] == pytest.approx({"length": 0.75, "taste": (0.9 + 0.3 + 0.3 + 0.9) / 4})
    assert line["jury_agreement"] == pytest.approx(1 / 4)
    # Cohen's kappa by hand: they agree by chance in 3/4·1/2 + 1/4·1/2 = 1/2 of the pairs.
    assert line["jury_kappa"] == pytest.approx((1 / 4 - 1 / 2) / (1 - 1 / 2))
    read = [v.votes for v in read_verdicts(tmp_path / "v.jsonl")]
    assert read == [v.votes for o in outcomes for v in o.verdicts]


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "jury:length,reward.scores:vader"},
        {"kind": "jury", "members": ["length", {"kind": "function", "target": "reward.scores:vader"}]},
    ],
)
def test_members_are_named_in_a_word_or_in_sections(settings: dict[str, Any]) -> None:
    judge = make_judge(JudgeSettings.model_validate(settings))
    assert judge.identity == "jury mean of length, reward.scores:vader"
    assert not judge.sees_order


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("jury", "missing"),
        ("jury:length", "missing"),
        ("jury:length,jury:a", "conflict"),
        ("jury:length,nonsense", "unknown"),
    ],
)
def test_a_jury_that_is_none_is_refused(name: str, kind: Any) -> None:
    with raises(kind):
        check_judge(name)

"""Many pairs through a judge: what is asked, in which order it comes back, what a file keeps, and when it ends."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from reward.asking import Pair, VerdictFile, judge_pairs, make_pairs, number_prompts
from reward.errors import JudgeError
from reward.judges import Comparison, Verdict
from tests.failures import raises
from tests.runs import read_jsonl

PAIRS = [Pair(f"p{i}", f"mine {i}", f"theirs {i}", i) for i in range(4)]


class Asked:
    """A judge that prefers what it is made to, and keeps what it was asked."""

    def __init__(
        self,
        prefers: Callable[[Comparison], float] = lambda _: 1.0,
        *,
        sees_order: bool = True,
        batch_size: int = 1,
        concurrency: int = 1,
        identity: str = "asked",
        version: str = "1",
    ) -> None:
        self.prefers, self.sees_order, self.identity, self.version = prefers, sees_order, identity, version
        self.batch_size, self.concurrency = batch_size, concurrency
        self.batches: list[list[Comparison]] = []
        self.stopped = self.rested = 0

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.batches.append(list(comparisons))
        return [
            Verdict.not_understood("hm") if math.isnan(p := self.prefers(one)) else Verdict(p, 3.0, 4.0)
            for one in comparisons
        ]

    @property
    def asked(self) -> list[Comparison]:
        return [one for batch in self.batches for one in batch]

    def stop(self) -> None:
        self.stopped += 1

    def rest(self) -> None:
        self.rested += 1


def mine_of(comparison: Comparison) -> float:
    """The candidate wins wherever it stands, by 0.75."""
    return 0.75 if comparison.response_a.startswith("mine") else 0.25


def test_equal_prompts_are_samples_of_one_position() -> None:
    chat = [{"role": "user", "content": "p"}]
    assert number_prompts(["p", "q", "p", chat, "p", [*chat]]) == [(0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (2, 1)]
    assert make_pairs(["p", "q", "p"], ["a", "b", "c"], ["x", "y", "z"]) == [
        Pair("p", "a", "x", 0, 0),
        Pair("q", "b", "y", 1, 0),
        Pair("p", "c", "z", 0, 1),
    ]


def test_both_orders_are_asked_and_the_candidate_is_a_in_the_file(tmp_path: Path) -> None:
    judge = Asked(mine_of, batch_size=3)
    outcomes = judge_pairs(judge, PAIRS, tmp_path / "deep" / "v.jsonl", candidate="new", baseline="old")
    assert judge.asked == [
        one for p in PAIRS for c in [Comparison(p.prompt, p.candidate, p.baseline)] for one in (c, c.swap())
    ]
    assert [len(batch) for batch in judge.batches] == [3, 3, 2]
    assert [(o.preference, o.flipped, o.first_wins) for o in outcomes] == [(0.75, False, 0.5)] * 4
    rows = read_jsonl(tmp_path / "deep" / "v.jsonl")
    assert [(row["position"], row["order"]) for row in rows] == [
        (i, order) for i in range(4) for order in ("candidate_first", "baseline_first")
    ]
    for row in rows:
        first = row["order"] == "candidate_first"
        assert (row["score_candidate"], row["score_baseline"]) == ((3.0, 4.0) if first else (4.0, 3.0))
        assert (row["candidate"], row["baseline"], row["judge"], row["judge_version"]) == ("new", "old", "asked", "1")
        i = row["position"]
        assert (row["prompt"], row["response_candidate"], row["response_baseline"]) == (f"p{i}", *responses(i))
        assert (row["len_candidate"], row["len_baseline"], row["preference"], row["sample"]) == (6, 8, 0.75, 0)
    assert len({row["key"] for row in rows}) == 8
    assert (judge.stopped, judge.rested) == (0, 1)


def responses(i: int) -> tuple[str, str]:
    return PAIRS[i].candidate, PAIRS[i].baseline


def test_a_judge_without_an_order_is_asked_once(tmp_path: Path) -> None:
    judge = Asked(mine_of, sees_order=False)
    outcomes = judge_pairs(judge, PAIRS, tmp_path / "v.jsonl")
    assert len(judge.asked) == 4
    assert [(o.verdict.order, o.preference) for o in outcomes] == [(None, 0.75)] * 4


def test_outcomes_come_in_the_order_of_the_pairs(tmp_path: Path) -> None:
    """Also where a file has the answers in another one, of which some are of an earlier start."""
    path = tmp_path / "v.jsonl"
    pairs = [Pair("p", f"mine {s}", "theirs", position, s) for position, s in ((1, 0), (0, 1), (0, 0))]
    judge_pairs(Asked(mine_of), pairs[::-1], path)
    again = Asked(mine_of)
    found = judge_pairs(again, pairs, path)
    assert [(o.verdict.position, o.verdict.sample) for o in found] == [(1, 0), (0, 1), (0, 0)]
    assert again.asked == []


@pytest.mark.parametrize(
    "changes",
    [{"identity": "another"}, {"version": "2"}, {"candidate": "other"}, {"baseline": "other"}, {"prompt": "q"}],
)
def test_what_an_answer_depends_on_makes_another_question(tmp_path: Path, changes: dict[str, str]) -> None:
    judge_pairs(Asked(mine_of), PAIRS[:1], tmp_path / "v.jsonl")
    of_judge = {name: changes[name] for name in ("identity", "version") if name in changes}
    of_pair = {name: changes[name] for name in changes if name not in of_judge}
    pair = Pair(**{"prompt": "p0", "candidate": "mine 0", "baseline": "theirs 0", "position": 0, **of_pair})
    again = Asked(mine_of, **of_judge)  # type: ignore[arg-type]
    judge_pairs(again, [pair], tmp_path / "v.jsonl")
    assert len(again.asked) == 2


def test_the_share_of_invalid_pairs(tmp_path: Path) -> None:
    """A quarter of four pairs is one, whether one order or both of it are invalid; two are too many."""

    def invalid(*prompts: str) -> Callable[[Comparison], float]:
        return lambda one: math.nan if one.prompt in prompts else mine_of(one)

    outcomes = judge_pairs(Asked(invalid("p1")), PAIRS, tmp_path / "one.jsonl", max_invalid_share=0.25)
    assert [o.is_valid for o in outcomes] == [True, False, True, True]
    judge = Asked(invalid("p0", "p1"))
    with raises("judge", JudgeError, key="max_invalid_share"):
        judge_pairs(judge, PAIRS, tmp_path / "two.jsonl", max_invalid_share=0.25)
    assert len(judge.asked) < 8  # as soon as it is certain
    assert (judge.stopped, judge.rested) == (1, 1)
    kept = read_jsonl(tmp_path / "two.jsonl")
    assert len(kept) == len(judge.asked)
    assert {row["invalid"] for row in kept} == {"hm"}


def test_a_start_after_too_many_invalid_answers_asks_those_again(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    with raises("judge", JudgeError):
        judge_pairs(Asked(lambda one: math.nan if one.prompt != "p0" else 1.0), PAIRS, path, max_invalid_share=0.25)
    before = read_jsonl(path)
    judge = Asked(mine_of)
    outcomes = judge_pairs(judge, PAIRS, path, max_invalid_share=0.25)
    assert all(o.is_valid for o in outcomes)
    valid = [row for row in before if row["preference"] is not None]
    assert [row["prompt"] for row in valid] == ["p0", "p0"]
    assert len(judge.asked) == 8 - len(valid)
    # One that is refused from the file, since nothing else is left to ask, is said at once.
    few = Asked(lambda _: math.nan)
    with raises("judge", JudgeError):
        judge_pairs(few, PAIRS[:1], tmp_path / "none.jsonl", max_invalid_share=0.0)


def test_progress_has_what_was_answered_before_and_the_win_rate_so_far(tmp_path: Path) -> None:
    path, seen = tmp_path / "v.jsonl", list[tuple[int, str]]()

    def advance(n: int, note: str = "") -> None:
        seen.append((n, note))

    judge_pairs(Asked(lambda _: 1.0, sees_order=False), PAIRS[:3], path, advance=advance)
    assert [n for n, _ in seen] == [0, 1, 1, 1]
    assert [note.rpartition(" ")[2] for _, note in seen] == ["", "1.000", "1.000", "1.000"]
    seen.clear()
    later = Asked(lambda _: 0.0, sees_order=False)
    judge_pairs(later, PAIRS, path, advance=advance)
    assert [(n, note.rpartition(" ")[2]) for n, note in seen] == [(3, "1.000"), (1, "0.750")]


def test_as_many_at_a_time_as_the_judge_takes(tmp_path: Path) -> None:
    """Each of three waits until all three are under way: with fewer at a time none would ever end."""
    together = threading.Barrier(3, timeout=20)

    def waiting(_: Comparison) -> float:
        together.wait()
        return 1.0

    judge = Asked(waiting, concurrency=3)
    judge_pairs(judge, PAIRS[:3], tmp_path / "v.jsonl")
    assert len(judge.asked) == 6


def test_a_judge_that_answers_fewer_questions_than_it_was_asked_is_an_error(tmp_path: Path) -> None:
    class Short(Asked):
        def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
            return super().compare(comparisons)[:-1]

    with pytest.raises(ValueError, match="shorter"):
        judge_pairs(Short(mine_of, batch_size=8), PAIRS, tmp_path / "v.jsonl")


def test_a_failure_stops_the_judge_and_keeps_what_is_under_way(tmp_path: Path) -> None:
    failed = threading.Event()

    def second_fails(one: Comparison) -> float:
        if one.prompt == "p1":
            failed.set()
            raise KeyError("x")
        assert one.prompt != "p0" or failed.wait(20)  # the first answer comes after the failure
        return mine_of(one)

    judge = Asked(second_fails, sees_order=False, concurrency=2)
    with pytest.raises(KeyError):
        judge_pairs(judge, PAIRS, tmp_path / "v.jsonl")
    assert (judge.stopped, judge.rested) == (1, 1)
    assert "p0" in [row["prompt"] for row in read_jsonl(tmp_path / "v.jsonl")]


def test_a_last_line_that_is_cut_is_asked_again_and_one_before_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    judge_pairs(Asked(mine_of), PAIRS, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    judge = Asked(mine_of)
    judge_pairs(judge, PAIRS, path)
    assert len(judge.asked) == 3
    assert len(read_jsonl(path)) == 8
    for damage in (b'{"key": "x"\n', b'{"preference": 1.0}\n', b"[]\n", b'{"key": "x", "preference": 7}\n'):
        path.write_bytes(lines[0] + damage + lines[2])
        with raises("unreadable", file=path, row=2):
            VerdictFile(path)


def test_one_file_is_written_by_one_process(tmp_path: Path) -> None:
    first = VerdictFile(tmp_path / "v.jsonl")
    with raises("in_use", file=tmp_path / "v.jsonl"):
        VerdictFile(tmp_path / "v.jsonl")
    first.append("k", Verdict(0.25, key="k"))
    assert [json.loads(line)["key"] for line in (tmp_path / "v.jsonl").read_text().splitlines()] == ["k"]  # at once
    first.close()
    second: Any = VerdictFile(tmp_path / "v.jsonl")
    assert second.answers["k"].preference == 0.25
    second.close()

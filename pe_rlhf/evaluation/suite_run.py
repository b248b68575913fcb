"""The responses of both sides to a suite, turn by turn, and the suite's number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pe_rlhf.config.evaluate import EvaluationSettings
from pe_rlhf.evaluation.prompting import refuse_different_prompting
from pe_rlhf.evaluation.responses import Side, check_sides, responses_of, side_of
from pe_rlhf.evaluation.suites import Item
from pe_rlhf.evaluation.suites.suite import answers_in
from pe_rlhf.runs.layout import EvaluationFiles
from pe_rlhf.scoring.prompt_checks import prompt_check
from reward.asking import Pair
from reward.errors import InputError
from reward.records import Prompt, parse_rows


def suite_pairs(
    items: Sequence[Item],
    candidate: str,
    baseline: str | None,
    folder: Path,
    settings: EvaluationSettings,
) -> list[Pair]:
    """A pair for each turn of each item; `baseline` is None for the answers that the suite has.

    Turns of one item share a position: they are not independent. Raises `InputError` where the template of the judge's
    reward model refuses more than `max_invalid_share` of the first turns, and of `side_of`.
    """
    check = prompt_check(judge=settings.judge)
    rows, share = ({"prompt": item.question(0)} for item in items), settings.max_invalid_share
    parse_rows(rows, lambda row: check(cast(Prompt, row["prompt"]), {}), "the suite", share, "--suite")
    said = {"candidate": [[] for _ in items], "baseline": [[] for _ in items]}
    known = {"candidate": _finished(candidate, items), "baseline": _finished(baseline, items)}
    pairs: list[Pair] = []
    for turn in range(max(len(item.turns) for item in items)):
        open_items = [i for i, item in enumerate(items) if turn < len(item.turns)]
        sides: dict[str, tuple[Side, list[Any]]] = {}
        for side, name in (("candidate", candidate), ("baseline", baseline)):
            if (answers := known[side]) is not None:
                for i in open_items:
                    said[side][i].append(answers[i][turn])
                continue
            assert name is not None
            prompts = [items[i].prompt(said[side][i]) for i in open_items]
            sides[side] = side_of(side, name, prompts, settings), prompts
        mine, theirs = (sides[side][0].prompting if side in sides else None for side in said)
        refuse_different_prompting(mine, theirs, settings)
        files, suffix = EvaluationFiles(folder), f"-turn-{turn + 1}" if turn else ""
        check_sides(((*sides[side], files.responses(f"{side}{suffix}")) for side in sides), settings)
        for side, (source, prompts) in sides.items():
            path = files.responses(f"{side}{suffix}")
            for i, response in zip(open_items, responses_of(source, prompts, path), strict=True):
                said[side][i].append(response)
        for i in open_items:
            texts = (items[i].response(said[side][i]) for side in ("candidate", "baseline"))
            pairs.append(Pair(items[i].question(turn), *texts, position=i, sample=turn))
    return pairs


def _finished(name: str | None, items: Sequence[Item]) -> list[tuple[str, ...]] | None:
    """The answers that there are: the suite's own, or those of a file in a suite's form; None for what is sampled."""
    if name is None:
        return [item.answer or () for item in items]
    path = Path(name)
    if not path.is_file():
        return None
    by_id = answers_in(path)
    for number, item in enumerate(items, start=1):
        if len(by_id.get(item.id, ())) < len(item.turns):
            raise InputError(
                f"{path} has no answer to question {number}, {item.id[:60]!r}, in all {len(item.turns)} turns",
                kind="missing",
                file=path,
                row=number,
            )
    return [by_id[item.id] for item in items]

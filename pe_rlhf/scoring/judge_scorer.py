"""A judge as a source of scores: the probability that a response beats the anchor's or a reference, or its own score.

Every answer is on disk before the next question, and no text is asked about twice, in a run that is resumed neither. A
judge that fails stops the step: nothing it has not answered gets a score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pe_rlhf.config.reward_source import ANCHOR_RESPONSE, OWN_SCORE, RewardSource
from pe_rlhf.runs.layout import StageFiles
from pe_rlhf.scoring.model_judges import make_judge
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.files import append_jsonl, read_jsonl, write_jsonl
from pe_rlhf.system.processes import is_main
from pe_rlhf.types import Sequences
from reward.asking import Pair, judge_pairs
from reward.errors import InputError, JudgeError
from reward.judges.judge_registry import judge_settings
from reward.judges.judge_settings import JudgeSettings
from reward.records import NO_COLUMNS, Columns, Prompt

KEY = "ppo.reward.judge"
AnchorResponses = Callable[[list[list[int]]], list[str]]


class JudgeScorer:
    """Asks a judge on rank 0 about each text once.

    anchor: gives the anchor's responses to prompts as tokens; every rank takes part.
    files: where scores and the anchor's responses are kept.
    metrics: of the last batch, how many texts the judge was asked about.
    """

    def __init__(self, source: RewardSource, files: StageFiles, anchor: AnchorResponses | None) -> None:
        assert source.judge is not None
        self._against, self._most, self._files, self._anchor = source.against, source.judge.max_requests, files, anchor
        self._judge = make_judge(asked_judge(source)) if is_main() else None
        rows = _kept(files.judged_rewards) if is_main() else []
        self._scores: dict[str, float] = {row["key"]: row["score"] for row in rows}
        self._spent = sum(row["requests"] for row in rows if row["judge"] == self._name)
        self._responses: dict[str, str] = {}
        if source.against == ANCHOR_RESPONSE:
            self._responses = {row["key"]: row["response"] for row in on_main(lambda: _kept(files.anchor_responses))}
        self.metrics: dict[str, float] = {}

    @property
    def _name(self) -> str:
        """Judge, version of its source, and what it compares with: what an answer depends on besides the texts."""
        assert self._judge is not None
        return " ".join([self._judge.identity, getattr(self._judge, "version", ""), self._against])

    def score(
        self, prompts: list[Prompt], responses: list[str], sequences: Sequences, columns: Columns = NO_COLUMNS
    ) -> Tensor:
        others = self._others(responses, sequences, columns)
        scores, asked = on_main(lambda: self._ask(list(zip(prompts, responses, others, strict=True))))
        self.metrics = {"asked": float(asked)}
        return torch.tensor(scores)

    def _others(self, responses: list[str], sequences: Sequences, columns: Columns) -> list[str]:
        """What each response is compared with."""
        if self._against == OWN_SCORE:
            return responses
        if self._against != ANCHOR_RESPONSE:
            return [_reference(value, self._against) for value in columns[self._against]]
        lengths = sequences.prompt_lengths_B.tolist()
        prompts = [row[:length] for row, length in zip(sequences.ids_BT.tolist(), lengths, strict=True)]
        keys = [_key(ids) for ids in prompts]
        new = {key: ids for key, ids in zip(keys, prompts, strict=True) if key not in self._responses}
        if new:
            assert self._anchor is not None
            for key, response in zip(new, self._anchor(list(new.values())), strict=True):
                self._responses[key] = response
                append_jsonl(self._files.anchor_responses, {"key": key, "response": response})
        return [self._responses[key] for key in keys]

    def _ask(self, questions: list[tuple[Prompt, str, str]]) -> tuple[list[float], int]:
        """The scores, and how many texts were new. Raises `JudgeError` and `InputError` as the judge does."""
        judge = self._judge
        assert judge is not None
        keys = [_key([self._name, *question]) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._scores}
        orders = 2 if judge.sees_order else 1
        self._refuse_overspending(orders * len(new))
        pairs = [Pair(*question, position=i) for i, question in enumerate(new.values())]
        found = judge_pairs(judge, pairs, self._files.open_questions, max_invalid_share=0.0) if pairs else []
        for key, outcome in zip(new, found, strict=True):
            score = outcome.verdict.score_a if self._against == OWN_SCORE else outcome.preference
            if score is None:
                raise InputError(
                    f"{KEY}: {judge.identity} compares, and gives no score of its own",
                    kind="conflict",
                    key="ppo.reward.against",
                    fix="use against: anchor, or a column with references",
                )
            self._scores[key] = float(score)
            row = {"key": key, "score": float(score), "judge": self._name, "requests": orders}
            append_jsonl(self._files.judged_rewards, row)
            self._spent += orders
        self._files.open_questions.unlink(missing_ok=True)  # all of them are in the other file
        return [self._scores[key] for key in keys], len(new)

    def _refuse_overspending(self, needed: int) -> None:
        """Before the first question of a batch that would be too many; those of earlier starts count."""
        if self._most is not None and self._spent + needed > self._most:
            raise JudgeError(
                f"{KEY}: {self._spent} of {self._most} requests are spent, and {needed} more are needed",
                kind="budget",
                key=f"{KEY}.max_requests",
                fix="raise max_requests, and go on with --resume --may-change ppo.reward",
            )


def asked_judge(source: RewardSource) -> JudgeSettings:
    """The judge of a source: a chat model that is to score a response, not to compare it, rates it."""
    assert source.judge is not None
    settings = judge_settings(source.judge)
    if source.against == OWN_SCORE and settings.kind == "jury":
        message = f"{KEY}: a jury votes on comparisons, and gives no score of its own"
        fix = "list its judges as sources of their own, each against: score"
        raise InputError(message, kind="conflict", key="ppo.reward.against", fix=fix)
    rates = source.against == OWN_SCORE and settings.kind == "llm"
    return settings.model_copy(update={"kind": "rating"}) if rates else settings


def check_against(source: RewardSource, columns: Collection[str]) -> None:
    """Raise `InputError` where a judge is to compare with a column that the prompts do not have."""
    if source.judge is not None and source.against not in (ANCHOR_RESPONSE, OWN_SCORE, *columns):
        raise InputError(
            f"{KEY}: against: {source.against!r} is neither anchor nor score nor a column of the prompts",
            kind="missing",
            key="ppo.reward.against",
        )


def _reference(value: object, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{KEY}: a prompt has no text in the column {column!r}, with which responses are compared",
            kind="missing",
            key="ppo.reward.against",
            fix=f"leave out the prompts without {column}",
        )
    return value


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


def _kept(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; a last one that a kill left half written is dropped."""
    rows = read_jsonl(path, may_be_cut=True)
    if path.exists():
        write_jsonl(path, rows)
    return rows

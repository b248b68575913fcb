"""The weighted sum: normalised, clipped and weighted by hand; names; what is learnt and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pe_rlhf.config.reward_source import RewardSource, source_names
from pe_rlhf.scoring.weighted import Part, WeightedScorer, check_where
from pe_rlhf.types import Sequences
from reward.records import NO_COLUMNS, Columns, Prompt
from tests.failures import raises


class Given:
    """Scores that are given, a batch at each call."""

    def __init__(self, *batches: Sequence[float]) -> None:
        self._batches = iter(batches)

    def score(self, *_: Any, **__: Any) -> Tensor:
        return torch.tensor(next(self._batches))


def part(name: str, *batches: Sequence[float], **settings: Any) -> Part:
    return Part(name, Given(*batches), RewardSource.model_validate({"function": "a:b"} | settings))


def scored(scorer: WeightedScorer) -> list[float]:
    return scorer.score([], [], None).tolist()  # type: ignore[arg-type]


def test_normalised_clipped_and_weighted_in_that_order() -> None:
    scorer = WeightedScorer(
        [
            part("a", [0.0, 2.0], [4.0, 2.0], normalise="running", clip=1.2, weight=2.0),
            part("b", [10.0, -10.0], [0.5, 0.0], clip=3.0, weight=-1.0),
        ]
    )
    scorer.learns = True
    # a: mean 1, deviation 1: −1 and 1; b: 3 and −3
    assert scored(scorer) == pytest.approx([2 * -1 - 3, 2 * 1 + 3])
    assert scorer.metrics == {"source_a": 1.0, "source_a_std": 1.0, "source_b": 0.0, "source_b_std": 10.0}
    # a: 0, 2, 4, 2 have mean 2 and variance 2: 2/√2 = 1.41, cut to 1.2, and 0
    assert scored(scorer) == pytest.approx([2 * 1.2 - 0.5, 0.0])
    assert scorer.moments() == {"a": pytest.approx([4, 2.0, 8.0])}


def test_a_source_scores_the_prompts_whose_columns_it_names() -> None:
    """Normalised by its own scores; the others get 0 from it. A step without its prompts has nothing of it."""

    class Numbers:
        def score(
            self, prompts: list[Prompt], responses: list[str], sequences: Sequences, columns: Columns = NO_COLUMNS
        ) -> Tensor:
            assert list(columns["source"]) == ["maths"] * len(prompts)
            return torch.tensor([float(response) for response in responses])

    where = {"function": "a:b", "where": {"source": "maths"}, "normalise": "running", "weight": 2.0}
    scorer = WeightedScorer(
        [
            Part("a", Numbers(), RewardSource.model_validate(where)),
            part("b", [1.0, 2.0, 3.0], [4.0, 5.0]),
        ]
    )
    scorer.learns = True
    sequences = Sequences.pack([[1], [2], [3]], [[4], [5, 6], [7]], 0)
    columns = {"source": ["maths", "chat", "maths"]}
    # 10 and 14 have mean 12 and deviation 2.
    assert scorer.score(["p"] * 3, ["10", "?", "14"], sequences, columns).tolist() == [1 - 2, 2, 3 + 2]
    assert scorer.metrics["source_a"] == 12
    two = sequences.take(torch.tensor([0, 1]))
    assert scorer.score(["p"] * 2, ["?", "?"], two, {"source": ["chat", "chat"]}).tolist() == [4, 5]
    assert "source_a" not in scorer.metrics
    only = WeightedScorer([Part("a", Numbers(), RewardSource.model_validate(where))])
    with raises("conflict", key="ppo.reward"):
        only.score(["p"] * 2, ["?", "?"], two, {"source": ["chat", "chat"]})


def test_a_column_that_no_prompt_has_is_told_before() -> None:
    sources = [RewardSource.model_validate({"function": "a:b", "where": {"task": 1}})]
    check_where(sources, ["task"])
    with raises("missing", key="ppo.reward.0.where"):
        check_where(sources, ["answer"])


def test_the_only_source_as_it_is_has_no_figures_of_its_own() -> None:
    scorer = WeightedScorer([part("a", [1.0, 2.0], weight=0.5)])
    assert scored(scorer) == [0.5, 1.0]
    assert scorer.metrics == {}
    assert scorer.moments() == {}


def test_what_does_not_learn_goes_by_what_is_known() -> None:
    first = [part("a", [0.0, 2.0], [9.0, 7.0], normalise="running")]
    scorer = WeightedScorer(first)
    assert scored(scorer) == [-1.0, 1.0]  # by its own
    assert scorer.moments() == {"a": [0, 0.0, 0.0]}
    scorer.set_moments({"a": [4, 5.0, 16.0], "gone": [1, 1.0, 1.0]})  # deviation 2
    assert scored(scorer) == [2.0, 1.0]
    assert scorer.moments() == {"a": [4, 5.0, 16.0]}


def test_names() -> None:
    sources: list[dict[str, Any]] = [
        {"adapter": "stage"},
        {"adapter": "runs/other"},
        {"function": "reward.scores:length"},
        {"function": "mine:length", "name": "adapter"},
        {"model": "m"},
        {"url": "http://a:1"},
    ]
    names = source_names([RewardSource.model_validate(source) for source in sources])
    assert names == ["adapter", "adapter_2", "length", "adapter_3", "model", "url"]


@pytest.mark.parametrize(
    "settings",
    [{"clip": 0}, {"normalise": "batch"}, {"name": "a b"}, {"name": ""}, {"url": "http://a"}, {"function": None}],
)
def test_settings_that_are_none(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RewardSource.model_validate({"function": "a:b"} | settings)


@pytest.mark.parametrize(("scores", "weight"), [([0.0, 1e300], 1.0), ([0.0, 1e38], 1e3), ([1.0, float("nan")], 1.0)])
def test_a_reward_that_float32_does_not_hold_is_its_sources(scores: list[float], weight: float) -> None:
    with raises("not_finite", key="ppo.reward", row=2):
        scored(WeightedScorer([part("a", [1.0, 1.0]), part("mine", scores, weight=weight)]))

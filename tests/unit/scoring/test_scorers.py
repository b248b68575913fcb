"""Scorers against direct forward passes, and weighted sums by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pe_rlhf.config import RewardSource
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.runs.saved_roles import save_role
from pe_rlhf.scoring.scorers import AdapterScorer
from pe_rlhf.scoring.weighted import make_scorer
from pe_rlhf.types import Sequences
from reward.errors import InputError
from tests.failures import raises
from tests.stage_support import byte_model
from tests.tiny import perturb

PROMPTS = ["How are you?", "x", "Tell me a longer story, please."]
RESPONSES = [" fine", " a rather long answer, and then some more of it", " y"]


def reward_backbone(tmp_path: Path, *, pad_is_eos: bool = True, sizes: tuple[float, ...] = (0.1,)) -> Backbone:
    """A byte model with reward roles `reward`, `reward_2`, … that are all different."""
    backbone = load_backbone(byte_model(tmp_path / "model", pad_is_eos=pad_is_eos, initializer_range=0.1))
    for index, size in enumerate(sizes):
        role = "reward" if index == 0 else f"reward_{index + 1}"
        backbone.add_adapter(role, rank=2, seed=index)
        perturb(backbone, role, size)
    return backbone


def packed(backbone: Backbone, prompts: list[str], responses: list[str]) -> Sequences:
    codec = TextCodec(backbone.tokenizer)
    pairs = [codec.encode_pair(p, r) for p, r in zip(prompts, responses, strict=True)]
    return Sequences.pack([p for p, _ in pairs], [r for _, r in pairs], backbone.pad_token_id)


@torch.no_grad()
def one_by_one(backbone: Backbone, role: str, prompts: list[str], responses: list[str]) -> Tensor:
    """The score at the last token of each sequence, EOS, with every sequence in a pass of its own."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = backbone.tokenizer(prompt + response)["input_ids"]
        with backbone.role(role):
            scores.append(backbone(torch.tensor([[*ids, backbone.eos_token_ids[0]]])).logits[0, 0])
    return torch.stack(scores)


@pytest.mark.parametrize("pad_is_eos", [True, False])
@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_an_adapter_scores_the_last_response_token(tmp_path: Path, pad_is_eos: bool, tokens: int) -> None:
    backbone = reward_backbone(tmp_path, pad_is_eos=pad_is_eos)
    assert (backbone.pad_token_id == backbone.eos_token_ids[0]) == pad_is_eos
    sequences = packed(backbone, PROMPTS, RESPONSES)
    found_B = AdapterScorer(backbone, "reward", tokens).score(PROMPTS, RESPONSES, sequences)  # type: ignore[arg-type]
    expected_B = one_by_one(backbone, "reward", PROMPTS, RESPONSES)
    torch.testing.assert_close(found_B, expected_B, atol=1e-5, rtol=1e-5)
    assert expected_B.std() > 0.05
    assert backbone.active_role == "anchor"
    assert not found_B.requires_grad


def test_a_weighted_sum_by_hand(tmp_path: Path) -> None:
    """0.5·reward of the first adapter − 2·reward of the second + 0.1·length in characters."""
    trained = reward_backbone(tmp_path, sizes=(0.1, 0.2))
    save_role(trained, "reward", tmp_path / "run" / "reward" / "adapter")
    save_role(trained, "reward_2", tmp_path / "elsewhere")
    sources = [
        RewardSource(adapter="stage", weight=0.5),
        RewardSource(adapter=str(tmp_path / "elsewhere"), weight=-2.0),
        RewardSource(function="reward.scores:length", weight=0.1),
    ]
    backbone = load_backbone(tmp_path / "model")
    scorer, _ = make_scorer(sources, backbone, tmp_path / "run", 10_000)
    assert backbone.roles == ["anchor", "reward", "reward_2"]
    sequences = packed(backbone, PROMPTS, RESPONSES)
    found_B = scorer.score(PROMPTS, RESPONSES, sequences)  # type: ignore[arg-type]
    first_B, second_B = (one_by_one(trained, role, PROMPTS, RESPONSES) for role in ("reward", "reward_2"))
    assert not torch.allclose(first_B, second_B, atol=0.05)
    expected = [
        0.5 * float(first) - 2 * float(second) + 0.1 * len(response)
        for first, second, response in zip(first_B, second_B, RESPONSES, strict=True)
    ]
    assert found_B.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_function_is_checked_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_scores.py").write_text("def score(prompts, responses):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    backbone = reward_backbone(tmp_path)
    scorer, _ = make_scorer([RewardSource(function="odd_scores:score")], backbone, tmp_path, 100)
    sequences = packed(backbone, PROMPTS, RESPONSES)
    with raises("user_code", file=tmp_path / "odd_scores.py"):
        scorer.score(PROMPTS, RESPONSES, sequences)  # type: ignore[arg-type]


def test_an_adapter_that_is_not_there_is_named(tmp_path: Path) -> None:
    backbone = reward_backbone(tmp_path, sizes=())
    with pytest.raises(InputError) as raised:
        make_scorer([RewardSource(adapter=str(tmp_path / "absent"))], backbone, tmp_path, 100)
    assert (raised.value.kind, raised.value.key) == ("missing", "ppo.reward.adapter")
    assert raised.value.file == str(tmp_path / "absent")

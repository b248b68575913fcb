"""Sampling from models with recurrent states: what is read together never changes what is sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pe_rlhf.config import SamplingConfig
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.rollout.reading import Reading, find_reading
from tests.failures import raises
from tests.model_types import build

PROMPTS = [[5, 6, 7], [8], [9, 0, 1, 12, 13, 14, 15], [20, 21], [8], [33, 34, 35, 36, 37], [5, 6, 7]]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (name, {})
        for name in ("qwen3_5_text", "mamba", "minimax", "rwkv", "gpt_neo", "recurrent_gemma", "bart", "whisper")
    ]
    + [("bart", {"decoder_layers": 1, "encoder_layers": 2})],
)
def test_log_probs_are_those_of_each_row_alone(name: str, changes: dict[str, Any]) -> None:
    """Equal prompts, ragged ones, pad and end ids amid the text; a plain pass over each row by itself is the oracle."""
    backbone = load_backbone(build(name, **changes))
    found = HFRollout(backbone, "anchor", SamplingConfig(max_new_tokens=6, batch_size=5)).generate(PROMPTS, seed=0)
    assert found.prompts == PROMPTS
    plain = build(name, **changes)
    for prompt, response, logprobs in zip(found.prompts, found.responses, found.logprobs, strict=True):
        with torch.no_grad():
            logits_TV = plain(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        expected_TV = logits_TV.log_softmax(dim=-1)
        expected = [float(expected_TV[len(prompt) - 1 + t, token]) for t, token in enumerate(response)]
        assert logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (Reading.EQUAL_ONCE, [[1, 4], [3, 0], [5, 2]]),
        (Reading.PADDED, [[1, 4], [3, 0], [5, 2]]),
        (Reading.EQUAL_LENGTHS, [[1, 4], [3], [0], [5], [2]]),
        (Reading.SINGLY, [[1], [4], [3], [0], [5], [2]]),
    ],
)
def test_batches_hold_only_what_may_be_read_together(reading: Reading, expected: list[list[int]]) -> None:
    assert reading.batches(PROMPTS[:6], 2) == expected


def test_a_model_that_generates_something_else_is_refused() -> None:
    def generate(_prompts: list[list[int]], forced: object, _reading: Reading) -> None:
        for _ in range(3):
            forced(None, torch.ones(1, 50))  # type: ignore[operator]

    def logits(ids_1T: Tensor) -> Tensor:
        return torch.randn(*ids_1T.shape, 50)

    with raises("conflict", key="ppo.rollout.engine"):
        find_reading(generate, logits, PROMPTS[:4], vocabulary=50, device=torch.device("cpu"), tolerance=1e-4)

"""What the tests of both vLLM engines compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import torch

from pe_rlhf.config import RolloutConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.rollout.vllm.server import ServerVLLM
from pe_rlhf.types import Rollout, Sequences
from tests.tiny import EOS, PAD, train_role
from tests.unit.adapters.test_kinds import SMALL, add

ENDS = [EOS, 7, 9, 30]  # several, so that many responses end before the limit
PROMPTS = [[5, 6, 7], [8], [9, PAD, 11, 12, 13, 14, 15], [20, 21]] * 4
Make = Callable[..., ServerVLLM]
MODES = ["adapter", "merged"]
LONGEST, NEW_TOKENS, TEMPERATURE = 40, 20, 0.8
LONGER = {"spectral_r": {"rank": 4}, "additive": {"rank": 4}, "lora_dash": {"rank": 3, "directions": 2}}


def config(**changes: Any) -> RolloutConfig:
    settings = {"engine": "vllm", "max_new_tokens": NEW_TOKENS, "temperature": TEMPERATURE, "batch_size": 16}
    return RolloutConfig.model_validate({**settings, **changes})


def difference(backbone: Backbone, role: str, rollout: Rollout, temperature: float = TEMPERATURE) -> float:
    """The largest difference of the sampler's log-probs and a role's, in nats."""
    sequences = Sequences.of(rollout, backbone.pad_token_id)
    with torch.no_grad(), backbone.role(role):
        trainer_N, _ = backbone.response_logprobs(sequences, temperature)
    sampler_N = torch.tensor([value for row in rollout.logprobs for value in row])
    return float((trainer_N - sampler_N).abs().max())


def add_trained(backbone: Backbone, kind: str) -> None:
    """A role of that name with an adapter of a kind, after real updates. vLLM takes a rank of 8 for all of them."""
    settings = {"rank": 4} if "rank" in SMALL.get(kind, {}) or kind in ("spectral_a", "redrawn", "rosa") else {}
    add(backbone, kind, kind, **settings | LONGER.get(kind, {}))
    train_role(backbone, kind)


def adapters(url: str) -> list[str]:
    """The names of the adapters that a server has."""
    models = openai.OpenAI(base_url=f"{url}/v1", api_key="none").models.list()
    return [card.id for card in models if (card.model_extra or {})["parent"]]


def post(url: str, body: dict[str, Any]) -> None:
    openai.OpenAI(base_url=url, api_key="none", timeout=60).post(url, cast_to=object, body=body)

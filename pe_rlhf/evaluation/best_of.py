"""The anchor's best of n responses by the reward that PPO optimised: the baseline that needs no training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pe_rlhf.algo.kl import best_of_kl
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.prompt_order import PromptSet
from pe_rlhf.scoring.weighted import WeightedScorer
from pe_rlhf.types import Rollout, Sequences
from reward.summary import Outcome, summarise

NAME = "best_of"


@dataclass(frozen=True)
class BestOf:
    """The response to each prompt that the reward prefers among n of the anchor's, its score, and its tokens."""

    n: int
    texts: list[str]
    scores: list[float]
    lengths: list[int]

    def metrics(self, outcomes: list[Outcome]) -> dict[str, Any]:
        """Win-rate over the anchor with its interval, reward, length, and the KL from the anchor in nats."""
        result = summarise(NAME, outcomes)
        gold = [outcome.verdict.score_a for outcome in outcomes if outcome.verdict.score_a is not None]
        return {
            NAME: self.n,
            **{f"{NAME}_{key}": result[key] for key in ("win_rate", "ci_low", "ci_high")},
            f"{NAME}_kl": best_of_kl(self.n),
            f"reward_{NAME}": sum(self.scores) / len(self.scores),
            f"gold_{NAME}": sum(gold) / len(gold) if gold else None,
            f"mean_length_{NAME}": sum(self.lengths) / len(self.lengths),
        }


def best_of(
    scorer: WeightedScorer, codec: TextCodec, prompts: PromptSet, rollout: Rollout, n: int, pad_token_id: int
) -> BestOf:
    """Choose from a rollout that has n responses to each prompt, side by side; of equal scores the first."""
    each = prompts.take([i for i in range(len(prompts)) for _ in range(n)])
    texts = codec.texts(rollout)
    sequences = Sequences.pack(rollout.prompts, rollout.responses, pad_token_id)
    scores_PN = scorer.score(each.prompts, texts, sequences, each.columns).view(len(prompts), n)
    chosen = (torch.arange(len(prompts)) * n + scores_PN.argmax(dim=1)).tolist()
    lengths = [len(rollout.responses[i]) for i in chosen]
    return BestOf(n, [texts[i] for i in chosen], scores_PN.max(dim=1).values.tolist(), lengths)

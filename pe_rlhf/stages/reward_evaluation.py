"""What a reward role is worth on pairs: the plain pairwise loss, accuracy, margins and the mean score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pe_rlhf.config import RewardConfig
from pe_rlhf.data.preference_pairs import Pairs
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.passes import for_each_row
from pe_rlhf.stages.add_roles import REWARD
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.progress import Advance, no_progress
from pe_rlhf.types import Sequences
from reward.calibration import expected_calibration_error
from reward.losses import pairwise_loss


@dataclass(frozen=True)
class RewardEvaluation:
    """`loss`, `accuracy` and `margin` over pairs; the margin of each pair; the mean score of all their responses."""

    loss: float
    accuracy: float
    margin: float
    margins: list[float]
    mean_score: float

    def metrics(self) -> dict[str, float]:
        calibration_error = expected_calibration_error(self.margins)
        return {
            "eval_loss": self.loss,
            "eval_accuracy": self.accuracy,
            "eval_margin": self.margin,
            "eval_calibration_error": calibration_error,
        }


def score_pairs(
    backbone: Backbone, pairs: Pairs, config: RewardConfig, advance: Advance = no_progress, *, role: str = REWARD
) -> RewardEvaluation:
    """Score all pairs; the plain loss, without margin, smoothing or centering. `advance` gets how many were scored.

    Raises `TrainingError` where it is not finite: an accuracy of such scores would look like one.
    """

    def compute(part: Sequences) -> Tensor:
        return backbone.response_scores(part).view(2, -1).T

    costs_B, budget = pairs.costs(packed=backbone.packs), config.micro_batch_tokens
    scores_B2 = for_each_row(backbone, role, pairs, budget, compute, costs_B=costs_B, advance=advance)
    chosen_B, rejected_B = scores_B2.T.contiguous()
    result = pairwise_loss(chosen_B, rejected_B)
    if not result.loss.isfinite():
        raise TrainingError(
            f"the loss over {len(pairs)} pairs is {result.loss.item()}",
            kind="not_finite",
            key="reward.learning_rate",
            fix="lower reward.learning_rate",
        )
    means = (result.loss.item(), result.accuracy.item(), result.margin.item())
    return RewardEvaluation(*means, (chosen_B - rejected_B).tolist(), torch.cat([chosen_B, rejected_B]).mean().item())

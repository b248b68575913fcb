"""What the anchor answers to prompts, for rewards that compare with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from pe_rlhf.config import SamplingConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.rollout.interface import RolloutEngine
from pe_rlhf.stages.context import StageContext
from pe_rlhf.system.seeding import derive_seed


class AnchorTexts:
    """Samples one response of the anchor to each prompt. What is drawn follows from the recipe's seed and the prompt.

    engine: what samples; it is left playing the anchor, so its owner names the role at the next `sync`. None: one is
    made when it is first needed.
    """

    def __init__(
        self,
        context: StageContext[Any],
        backbone: Backbone,
        codec: TextCodec,
        sampling: SamplingConfig,
        prompts: Sequence[list[int]],
    ) -> None:
        self._context, self._backbone, self._codec = context, backbone, codec
        self._sampling, self._prompts = sampling, prompts
        self.engine: RolloutEngine | None = None

    def __call__(self, prompts: list[list[int]]) -> list[str]:
        """One text for each of the prompts, which are given as tokens and are all different."""
        if self.engine is None:
            self.engine = self._context.sampler(self._backbone, ANCHOR, self._sampling, self._prompts)
        self.engine.sync(0, ANCHOR)
        # By the prompt and not by its place in a batch: a run that goes on has others beside it.
        rows = [int(hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8], 16) for ids in prompts]
        rollout = self.engine.generate(prompts, derive_seed(self._context.recipe.seed, "anchor response"), rows)
        return self._codec.texts(rollout)

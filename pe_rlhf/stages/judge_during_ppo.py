"""A small judge evaluation while PPO trains: is the policy getting better, or only at pleasing its reward?

Judge, sampling and prompts are those of the recipe's `evaluate` section, the prompts cut to the first few. The anchor's
responses are sampled once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pe_rlhf.config import EvaluateConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.rollout.data_parallel import over_ranks
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.scoring.model_judges import make_judge
from pe_rlhf.stages.context import StageContext
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.processes import is_main
from pe_rlhf.system.seeding import derive_seed
from reward.asking import Pair, judge_pairs, make_pairs
from reward.judges import Judge
from reward.records import Prompt
from reward.summary import Outcome, summarise


class JudgeEvaluation:
    """Called after every step; asks the judge where the step is due, else gives no metrics."""

    def __init__(self, context: StageContext, backbone: Backbone, codec: TextCodec, role: str) -> None:
        ppo, evaluate = context.recipe.ppo, context.recipe.evaluate
        assert ppo is not None
        self._every, self._steps, self._role = ppo.eval_every, ppo.steps, role
        self._context, self._backbone, self._codec = context, backbone, codec
        self._anchor: list[str] = []
        self._prompts: Sequence[Prompt] = ()
        if self._every is not None:
            assert evaluate is not None  # the recipe's own check
            self._config: EvaluateConfig = evaluate
            self._judge: Judge | None = make_judge(evaluate.judge) if is_main() else None
            limit = evaluate.sampling.max_new_tokens
            prompts, ids = context.prompts(evaluate.prompts, codec, backbone, limit)
            self._prompts, self._ids = prompts[: ppo.eval_prompts], ids[: ppo.eval_prompts]

    def __call__(self, step: int) -> dict[str, float]:
        """`judge_win_rate` of the policy against the anchor with its interval, every `eval_every` steps and last."""
        if self._every is None or (step % self._every and step != self._steps):
            return {}
        start = time.monotonic()
        self._anchor = self._anchor or self._sample(ANCHOR)
        pairs = make_pairs(self._prompts, self._sample(self._role), self._anchor)
        path = self._context.files.judged(step)
        result = summarise("policy", on_main(lambda: self._judged(pairs, path)))
        kept = {f"judge_{key}": result[key] for key in ("win_rate", "ci_low", "ci_high", "n")}
        return kept | {"seconds_judge": time.monotonic() - start}

    def _judged(self, pairs: list[Pair], path: Path) -> list[Outcome]:
        assert self._judge is not None
        share = self._config.max_invalid_share
        return judge_pairs(self._judge, pairs, path, baseline=ANCHOR, max_invalid_share=share)

    def _sample(self, role: str) -> list[str]:
        """The same random numbers at every step, so that what changes is the policy."""
        rollout = over_ranks(HFRollout(self._backbone, role, self._config.sampling))
        seed = derive_seed(self._context.recipe.seed, "evaluate", role)
        return [self._codec.decode(ids) for ids in rollout.generate(self._ids, seed).responses]

"""A small judge evaluation while PPO trains: is the policy getting better, or only at pleasing its reward?

Judge, prompts and sampling, its engine included, are those of the recipe's `evaluate` section, with the prompts cut to
the first few. The anchor's responses are sampled once.
"""

from __future__ import annotations

import time
from functools import cached_property

from pe_rlhf.config import EvaluateConfig, PPOConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.rollout.by_task import sample
from pe_rlhf.rollout.interface import RolloutEngine
from pe_rlhf.scoring.model_judges import make_judge
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.evaluate import logprobs_of, mean_scores
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.processes import is_main
from pe_rlhf.system.seeding import derive_seed
from pe_rlhf.types import Rollout, Sequences
from reward.asking import judge_pairs, make_pairs
from reward.summary import Outcome, summarise


class JudgeEvaluation:
    """The judge on the policy against the anchor, for the steps that `ppo.eval_every` names."""

    def __init__(self, context: StageContext[PPOConfig], backbone: Backbone, codec: TextCodec, role: str) -> None:
        config = context.section("evaluate", EvaluateConfig)
        self._context, self._config, self._backbone, self._codec = context, config, backbone, codec
        self._role = role
        self._judge = make_judge(config.judge) if is_main() else None
        limit = config.sampling.max_new_tokens
        asked = context.prompts(config.prompts, codec, backbone, limit, section="evaluate")
        asked = asked.routed(backbone.tasks_of(role), "evaluate.prompts")
        self._asked = asked.take(range(len(asked))[: context.config.eval_prompts])
        self._anchor: list[str] = []

    def is_due(self, step: int) -> bool:
        """Whether the judge is asked after a step: every `ppo.eval_every` steps, and after the last."""
        every, last = self._context.config.eval_every, self._context.config.steps
        return every is not None and (step % every == 0 or step == last)

    def __call__(self, step: int) -> dict[str, float]:
        """`judge_win_rate` of the policy as it is after a step, with its interval, KL and the judge's own scores."""
        start = time.monotonic()
        self._anchor = self._anchor or self._codec.texts(self._sample(ANCHOR, step))
        rollout = self._sample(self._role, step)
        pairs = make_pairs(self._asked.prompts, self._codec.texts(rollout), self._anchor)
        path, share = self._context.files.judged(step), self._config.max_invalid_share

        def judged() -> list[Outcome]:
            assert self._judge is not None  # on_main
            return judge_pairs(self._judge, pairs, path, baseline=ANCHOR, max_invalid_share=share)

        outcomes = on_main(judged)
        result = summarise("policy", outcomes)
        kept = {f"judge_{key}": result[key] for key in ("win_rate", "ci_low", "ci_high", "n")}
        scores = {f"judge_score_{side}": score for side, score in mean_scores(outcomes).items() if score is not None}
        return kept | scores | {"judge_kl": self._kl(rollout), "seconds_judge": time.monotonic() - start}

    def _kl(self, rollout: Rollout) -> float:
        """Of the policy that was judged: a training step's is of the policy before it, on other prompts."""
        sequences = Sequences.of(rollout, self._backbone.pad_token_id)
        roles, sampling = (self._role, ANCHOR), self._config.sampling
        policy_BR, anchor_BR = logprobs_of(self._backbone, roles, sequences, sampling, self._context.config)
        return (policy_BR - anchor_BR).sum().item() / len(sequences)

    @cached_property
    def _sampler(self) -> RolloutEngine:
        """Made when it is first needed: an engine with a process of its own takes memory from then on."""
        return self._context.sampler(self._backbone, self._role, self._config.sampling, self._asked.ids)

    def _sample(self, role: str, version: int) -> Rollout:
        """The same random numbers at every step, so that what changes is the policy."""
        self._sampler.sync(version, role)
        seed = derive_seed(self._context.recipe.seed, "evaluate", role)
        return sample(self._sampler, self._asked.ids, seed, self._asked.tasks)

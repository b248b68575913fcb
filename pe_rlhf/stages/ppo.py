"""The PPO stage: policy and value adapters on the backbone, a KL to the anchor.

Without a critic (`ppo.advantage`) there is no value adapter, no pass for it and no metric about it.

The loop is `run`, and what a step does is `_step`. Of that, 2 to 4 are in `ppo_collect.py`, without gradients; 5 is in
`ppo_update.py`.

Left out of textbook PPO:
- the entropy bonus: the KL to the anchor keeps the policy broad;
- bootstrapping at the length limit: a response that was cut is an episode that ends there, and it is scored as it is,
  lowered by `missing_eos_penalty` where the recipe sets one;
- early stopping of an update by its KL: `clip_range` bounds it, and `approx_kl` is a metric.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pe_rlhf.algo.kl import adapt_beta
from pe_rlhf.algo.rewards import kl_objective
from pe_rlhf.config import KLConfig, PPOConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.prompt_order import PromptOrder, PromptTable
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.model.tensors import with_prefix, without_prefix
from pe_rlhf.optim.role_optimizer import CHECKPOINT_PREFIX, RoleGroup, RoleOptimizer
from pe_rlhf.rollout.interface import RolloutEngine
from pe_rlhf.runs.checkpoint import load_checkpoint, newest_step, roles_in, save_checkpoint
from pe_rlhf.runs.learning_flags import ppo_flags
from pe_rlhf.runs.metrics import MetricsWriter, read_metrics
from pe_rlhf.runs.peft_roles import load_start
from pe_rlhf.runs.saved_roles import save_role
from pe_rlhf.scoring.weighted import Moments, WeightedScorer, make_scorer
from pe_rlhf.stages.add_roles import add_role
from pe_rlhf.stages.anchor_texts import AnchorTexts
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.critic_start import add_critic, critic_start, fit_critic
from pe_rlhf.stages.init_batches import AnchorRollouts
from pe_rlhf.stages.judge_during_ppo import JudgeEvaluation
from pe_rlhf.stages.ppo_collect import collect_experience
from pe_rlhf.stages.ppo_update import update
from pe_rlhf.stages.previous_policy import PreviousPolicy, leave_fisher
from pe_rlhf.stages.rollouts import Rollouts, pack
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.failures import Stopped, TrainingError, at_step
from pe_rlhf.system.files import append_jsonl, truncate_jsonl, write_json
from pe_rlhf.system.memory import peak_memory
from pe_rlhf.system.progress import progress, say
from pe_rlhf.system.stop_signals import stop_requests
from pe_rlhf.types import Experience, Rollout
from reward.records import Prompt

POLICY, VALUE = "policy", "value"
ROLLOUT_PREFIX = "rollout/"  # of tensors in a checkpoint


@dataclass
class PPOTraining:
    """What the steps work with; `beta` changes from one to the next."""

    context: StageContext[PPOConfig]
    backbone: Backbone
    codec: TextCodec
    prompts: PromptOrder
    prompt_ids: Sequence[list[int]]
    scorer: WeightedScorer
    previous: PreviousPolicy | None
    optimizer: RoleOptimizer
    sampler: RolloutEngine
    rollouts: Rollouts
    judge: JudgeEvaluation | None
    beta: float

    @property
    def kl_to(self) -> str:
        """The role that the KL is measured to."""
        return ANCHOR if self.previous is None else self.previous.anchor


def run(context: StageContext[PPOConfig]) -> dict[str, Any]:
    """Train the policy by PPO; write its adapter, the critic's, the metrics and samples."""
    config = context.config
    training = _prepare(context)
    first_step = _resume(training)
    writer = context.metrics(first_step)
    truncate_jsonl(context.files.samples, first_step)
    training.scorer.learns = True

    with progress("ppo", config.steps - first_step, "steps") as advance, stop_requests() as stop:
        for step in range(first_step, config.steps):
            with at_step(step + 1):
                metrics = _step(training, writer, step, keep=step > first_step and step % config.checkpoint_every == 0)
                if (stopped := stop.received()) or step + 1 == config.steps:
                    _save(training, step + 1, training.scorer.moments(), metrics, training.rollouts.wait())
                if stopped:
                    raise Stopped(f"ppo: stopped after step {step + 1}", stopped)
                advance(1)
    writer.close()
    return _finish(training)


def _step(training: PPOTraining, writer: MetricsWriter, step: int, *, keep: bool) -> dict[str, float]:
    """One PPO step, numbered from 0. keep: leave a checkpoint of the weights that it starts from."""
    t, config, seed = training, training.context.config, training.context.recipe.seed
    start = time.monotonic()
    # 1. the sampler gets the policy as it is; responses
    batch, rollout = t.prompts.batch(step), t.rollouts.take(step)
    sampled = time.monotonic()
    # 2. to 4. anchor log-probs, values, scores; rewards shaped with the KL; advantages and returns
    moments = t.scorer.moments()  # before this rollout: whoever goes on from here scores it again
    stale = step - rollout.version
    experience, metrics = collect_experience(
        t.backbone, t.scorer, t.codec, batch, rollout, t.beta, config, stale, t.kl_to
    )
    metrics |= t.scorer.metrics
    _refuse_high_kl(metrics["kl"], config)
    scored = time.monotonic()
    # Only weights whose rollout was scored are kept: a run that fails goes on from sound ones.
    if keep:
        _save(t, step, moments, metrics, rollout)
    saved = time.monotonic()
    # 5. epochs of minibatches with the clipped losses
    # Where step 2 knows the mismatch of sampler and trainer, step 5 compares the trainer with itself.
    metrics = update(t.backbone, t.optimizer, experience, t.beta, config, seed, step) | metrics
    # 6. metrics, samples, the next β; the sampler gets the new weights at the next step
    sampling = sampled - start + t.rollouts.seconds_before
    seconds = {"rollout": sampling, "score": scored - sampled, "update": time.monotonic() - saved}
    metrics |= _timing(seconds, rollout.tokens(), config.epochs)
    if t.judge is not None and t.judge.is_due(step + 1):
        metrics |= t.judge(step + 1)
    episodes = (step + 1) * len(rollout.responses)
    writer.write(step + 1, {"episodes": episodes, "beta": t.beta, **metrics})
    say(_line(step + 1, config.steps, metrics))
    _write_samples(t, step + 1, batch.prompts, rollout, experience)
    t.beta = _next_beta(t.beta, metrics["kl"], len(rollout.responses), config.kl)
    return metrics


def _prepare(context: StageContext[PPOConfig]) -> PPOTraining:
    """Model, roles, prompts, rewards, sampler and judge, as a run without a checkpoint starts."""
    config, seed = context.config, context.recipe.seed
    backbone = context.backbone()
    codec = context.codec(backbone)
    new_tokens = config.rollout.max_new_tokens
    asked = context.prompts(config.prompts, codec, backbone, new_tokens, config.max_prompt_tokens)
    asked = asked.routed(context.recipe.adapter_for("ppo").routes, "ppo.prompts")
    prompts = PromptOrder(asked, config.batch_size, config.rollout.samples_per_prompt, seed)
    budget, columns = config.micro_batch_tokens, asked.columns
    anchor = AnchorTexts(context, backbone, codec, config.rollout, asked.ids)
    sources = {"files": context.files, "anchor": anchor}
    scorer, reward_roles = make_scorer(config.reward, backbone, context.run_dir, budget, columns, **sources)
    start_from = critic_start(context, backbone, reward_roles)
    previous = PreviousPolicy.of(context.recipe, context.run_dir, backbone)
    _add_roles(context, backbone, scorer, codec, asked, start_from, previous)
    sampler = context.sampler(backbone, POLICY, config.rollout, asked.ids)
    anchor.engine = None if config.rollout.ahead else sampler  # which is busy when the anchor is asked
    rollouts = Rollouts(sampler, POLICY, prompts, config, seed)
    if start_from is not None and not newest_step(context.folder):  # a checkpoint has the critic
        with at_step(1):
            fit_critic(backbone, VALUE, scorer, codec, prompts.batch(0), rollouts.first(), config)
    judge = JudgeEvaluation(context, backbone, codec, POLICY) if config.eval_every is not None else None
    return PPOTraining(
        context=context,
        backbone=backbone,
        codec=codec,
        prompts=prompts,
        prompt_ids=asked.ids,
        scorer=scorer,
        previous=previous,
        optimizer=_optimizer(context, backbone, previous),
        sampler=sampler,
        rollouts=rollouts,
        judge=judge,
        beta=config.kl.beta,
    )


def _finish(training: PPOTraining) -> dict[str, Any]:
    """Write the adapters, what the next task needs, and the summary."""
    context, backbone, previous = training.context, training.backbone, training.previous
    for role in _trained(context.config):
        save_role(backbone, role, context.files.role(role).folder)
    leave_fisher(context, backbone, training.sampler, training.prompt_ids, previous)
    summary = on_main(lambda: _summary(context, backbone))
    summary |= {} if previous is None else previous.metrics()
    if weights := backbone.task_weights(POLICY):
        summary["task_weights"] = weights
    if moments := training.scorer.moments():
        summary["moments"] = moments  # by which the evaluation normalises
    write_json(context.files.summary, summary)
    return summary


def _add_roles(
    context: StageContext[PPOConfig],
    backbone: Backbone,
    scorer: WeightedScorer,
    codec: TextCodec,
    prompts: PromptTable,
    start_from: str | None,
    previous: PreviousPolicy | None,
) -> None:
    """The policy, fresh or from `previous` or `ppo.start`; the critic from `start_from`, or fresh."""
    config = context.config
    # Dropout would make the ratio of new to old policy differ from 1 before the first update.
    adapter = context.recipe.adapter_for("ppo").without_dropout()
    anchor = AnchorRollouts(context, backbone, scorer, codec, prompts, adapter, start_from)
    add_fresh = partial(add_role, context, backbone, POLICY, adapter, anchor.policy_statistics())
    if previous is not None:
        previous.add_policy(adapter, add_fresh)
    elif config.start is not None:
        load_start(backbone, POLICY, config.start, "ppo.start", adapter)
    else:
        add_fresh()
    if config.has_critic:
        own = context.recipe.adapters_of("ppo")[-1].without_dropout()
        if own != adapter:  # it may need other statistics
            anchor = AnchorRollouts(context, backbone, scorer, codec, prompts, own, start_from)
        add_critic(context, backbone, VALUE, own, anchor.value_statistics(), start_from)


def _optimizer(context: StageContext[PPOConfig], backbone: Backbone, previous: PreviousPolicy | None) -> RoleOptimizer:
    config = context.config
    rates = {POLICY: config.learning_rate, VALUE: config.value_learning_rate or config.learning_rate}
    groups = [RoleGroup.of(backbone, role, rates[role]) for role in _trained(config)]
    if previous is not None:
        groups[0] = replace(groups[0], penalty=previous.penalty())
    total_steps = config.steps * config.epochs * config.minibatches
    return RoleOptimizer(groups, config.optimizer, total_steps, context.deepspeed, context.recipe.seed)


def _trained(config: PPOConfig) -> tuple[str, ...]:
    """The roles that the stage trains."""
    return (POLICY, VALUE) if config.has_critic else (POLICY,)


def _refuse_high_kl(kl: float, config: PPOConfig) -> None:
    if config.kl.limit is not None and kl > config.kl.limit:
        raise TrainingError(
            f"the KL to the anchor is {kl:.3g} nats per response, over ppo.kl.limit {config.kl.limit}",
            kind="kl_limit",
            key="ppo.kl.limit",
            fix="raise ppo.kl.beta or lower ppo.learning_rate, and go on with --resume --may-change and the key's name",
        )


def _next_beta(beta: float, kl: float, episodes: int, config: KLConfig) -> float:
    if config.controller == "fixed":
        return beta
    highest = 1.0 if config.form == "convex" else math.inf
    return adapt_beta(beta, kl, config.target, config.horizon, episodes, highest=highest)


def _timing(seconds: dict[str, float], tokens: int, epochs: int) -> dict[str, float]:
    passes = {"rollout": 1, "score": 1, "update": epochs}
    rates = {f"tokens_per_second_{phase}": tokens * passes[phase] / spent for phase, spent in seconds.items()}
    return {"tokens": tokens, **{f"seconds_{phase}": spent for phase, spent in seconds.items()}, **rates}


def _line(step: int, total: int, f: dict[str, float]) -> str:
    rates = " ".join(f"{phase} {f[f'tokens_per_second_{phase}']:.0f}" for phase in ("rollout", "score", "update"))
    own = "".join(f", {name} {f[name]:.2f}" for name in ("explained_variance", "groups_alike") if name in f)
    return (
        f"ppo {step}/{total}: reward {f['reward']:.3f}, kl {f['kl']:.2f}, entropy {f['entropy']:.2f}"
        f", clip_fraction {f['clip_fraction']:.3f}{own}"
        f", length {f['response_length']:.1f}, tokens/s {rates}"
    )


def _write_samples(
    training: PPOTraining, step: int, prompts: list[Prompt], rollout: Rollout, experience: Experience
) -> None:
    """A few responses with their scores, so that a person can see what the reward is doing to the text."""
    context = training.context
    if step != 1 and step % context.config.samples_every:
        return
    kl_B = ((experience.old_logprobs_BR - experience.anchor_logprobs_BR) * experience.mask_BR).sum(dim=1)
    texts = training.codec.texts(rollout)
    for i in range(min(4, len(prompts))):
        row = {"step": step, "prompt": prompts[i], "response": texts[i]}
        score, kl = float(experience.scores_B[i]), float(kl_B[i])
        append_jsonl(context.files.samples, row | {"score": round(score, 4), "kl": round(kl, 4)})


def _resume(training: PPOTraining) -> int:
    """Go on from the newest checkpoint, if any. Returns the next step; β is the recipe's where that is fixed."""
    context, kl = training.context, training.context.config.kl
    loaded = load_checkpoint(context.folder)
    if loaded is None:
        return 0
    step, tensors, state = loaded
    for role in _trained(context.config):
        training.backbone.set_role_state(role, without_prefix(f"{role}/", tensors))
    training.optimizer.load_state(without_prefix(CHECKPOINT_PREFIX, tensors))
    training.scorer.set_moments(state.get("moments", {}))
    training.rollouts.restore(step, without_prefix(ROLLOUT_PREFIX, tensors))
    say(f"ppo: continuing after step {step}")
    if kl.controller == "adaptive":
        training.beta = state["beta"]
    return step


def _save(
    training: PPOTraining, step: int, moments: Moments, metrics: dict[str, float], rollout: Rollout | None
) -> None:
    """Leave a checkpoint after that many steps.

    metrics: those of the newest rollout: sampled from these weights, or before the update that made them.
    rollout: what the step after this checkpoint trains on, which is kept where it was sampled ahead.
    """
    context = training.context
    config = context.config
    score = kl_objective(metrics["reward_shaped"], metrics["kl"], beta=config.kl.beta, form=config.kl.form)
    tensors, specs = roles_in(training.backbone, *_trained(config))
    tensors |= with_prefix(CHECKPOINT_PREFIX, training.optimizer.state(copy=False))
    if config.rollout.ahead:
        tensors |= with_prefix(ROLLOUT_PREFIX, pack(rollout))
    state = {"beta": training.beta, **({"moments": moments} if moments else {}), **specs}
    save_checkpoint(context.folder, step, tensors, state, keep=config.keep_checkpoints, score=score)


def _summary(context: StageContext[PPOConfig], backbone: Backbone) -> dict[str, Any]:
    lines = read_metrics(context.files.metrics)
    seconds = sum(line[f"seconds_{phase}"] for line in lines for phase in ("rollout", "score", "update"))
    return {
        "steps": len(lines),
        "episodes": lines[-1]["episodes"],
        "reward_first": lines[0]["reward_shaped"],
        "reward_last": lines[-1]["reward_shaped"],
        "kl_last": lines[-1]["kl"],
        "seconds_per_step": round(seconds / len(lines), 3),
        "tokens_per_second": round(sum(line["tokens"] for line in lines) / seconds, 2),
        "trainable_parameters": sum(
            p.numel() for role in _trained(context.config) for p in backbone.role_parameters(role).values()
        ),
        "seconds": round(seconds, 2),
        **peak_memory(),
        "warnings": ppo_flags(lines),
    }

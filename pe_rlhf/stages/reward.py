"""The reward stage: a LoRA reward model on the backbone, trained on preference pairs with the Bradley–Terry loss.

Loss and head are in the package `reward`. Held-out pairs are split off by prompt, so that no prompt is on both sides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pe_rlhf.config import RewardConfig
from pe_rlhf.data.preference_pairs import Pairs
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.micro_batches import own_micro_batches
from pe_rlhf.model.tensors import with_prefix, without_prefix
from pe_rlhf.optim.role_optimizer import CHECKPOINT_PREFIX, RoleOptimizer
from pe_rlhf.runs.checkpoint import load_checkpoint, roles_in, save_checkpoint
from pe_rlhf.runs.learning_flags import reward_flags
from pe_rlhf.runs.saved_roles import save_role
from pe_rlhf.stages.add_roles import REWARD
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.reward_evaluation import RewardEvaluation, score_pairs
from pe_rlhf.stages.reward_members import (
    Member,
    add_members,
    diversity_metrics,
    ensemble_metrics,
    groups_of,
    member_rows,
    members_of,
)
from pe_rlhf.stages.reward_pairs import load_pairs
from pe_rlhf.system.distributed import on_main, rank, sum_metrics
from pe_rlhf.system.failures import Stopped
from pe_rlhf.system.files import append_jsonl, read_jsonl, truncate_jsonl, write_json
from pe_rlhf.system.memory import give_memory_back, peak_memory
from pe_rlhf.system.progress import progress, say
from pe_rlhf.system.seeding import seeded
from pe_rlhf.system.stop_signals import stop_requests
from reward.calibration import accuracy_interval, expected_calibration_error, reliability_table
from reward.losses import pairwise_loss


@dataclass
class RewardTraining:
    """What the steps work with.

    Attributes:
        started: when training began, on `time.monotonic`'s scale, less what a run that this one goes on from has spent.
        results: the newest evaluation of each member.
        held_out_loss: of the weights as they are, where they were evaluated.
    """

    context: StageContext[RewardConfig]
    backbone: Backbone
    train: Pairs
    held_out: Pairs
    members: Sequence[Member]
    optimizer: RoleOptimizer
    steps_per_epoch: int
    started: float
    results: list[RewardEvaluation] = field(default_factory=list)
    held_out_loss: float | None = None

    @property
    def total_steps(self) -> int:
        return self.context.config.epochs * self.steps_per_epoch


def run(context: StageContext[RewardConfig]) -> dict[str, Any]:
    """Train, evaluate, centre the scores, and write the adapter."""
    training = _prepare(context)
    first_step, total_steps = _resume(training), training.total_steps
    everything = training.train.responses() + training.held_out.responses()
    with progress("reward: frozen blocks", len(everything), "responses") as advance:
        training.backbone.compute_once(everything, context.config.micro_batch_tokens, advance)
    writer = context.metrics(first_step)
    truncate_jsonl(context.files.reliability, first_step)

    with progress("reward: training", total_steps - first_step, "steps") as advance, stop_requests() as stop:
        for step in range(first_step, total_steps):
            line = _step(training, step, keep=step > first_step and step % context.config.checkpoint_every == 0)
            if (step + 1) % context.config.eval_every == 0 or step + 1 == total_steps:
                line |= _evaluate(training, step + 1)
                say(_line(step + 1, total_steps, line))
            writer.write(step + 1, line)
            if (stopped := stop.received()) or step + 1 == total_steps:
                _save(training, step + 1, time.monotonic())
            if stopped:
                raise Stopped(f"reward: stopped after step {step + 1}", stopped)
            advance(1)
    writer.close()
    return _finish(training)


def _prepare(context: StageContext[RewardConfig]) -> RewardTraining:
    """Model, pairs, members and their optimizer, as a run without a checkpoint starts."""
    config, started = context.config, time.monotonic()
    backbone = context.backbone()
    train, held_out = load_pairs(context, config, backbone)
    members = members_of(context.recipe, config, len(train))
    add_members(context, backbone, members, train)
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    groups = groups_of(backbone, members, config)
    total_steps = config.epochs * steps_per_epoch
    optimizer = RoleOptimizer(groups, config.optimizer, total_steps, context.deepspeed, context.recipe.seed)
    return RewardTraining(context, backbone, train, held_out, members, optimizer, steps_per_epoch, started)


def _step(training: RewardTraining, step: int, *, keep: bool) -> dict[str, float]:
    """One step of the optimizer, numbered from 0. keep: leave a checkpoint of the weights that it starts from."""
    t, config = training, training.context.config
    epoch, batch = divmod(step, t.steps_per_epoch)
    start = time.monotonic()
    gradients = partial(_gradients, t.backbone, t.optimizer, t.members, t.train, step, (epoch, batch), config)
    line: dict[str, float] = {"epoch": epoch} | gradients(0)
    spent = time.monotonic() - start
    # Only weights whose loss on the next pairs is finite are kept: a run that fails goes on from sound ones.
    if keep:
        _save(t, step, start)
    start = time.monotonic() - spent  # without the saving
    rates, norms = t.optimizer.learning_rates(), t.optimizer.step(partial(gradients, 1))
    t.held_out_loss = None
    return line | {"lr": rates[REWARD], "grad_norm": norms[REWARD], "seconds_step": time.monotonic() - start}


def _evaluate(training: RewardTraining, steps: int) -> dict[str, float]:
    """The metrics on held-out pairs after that many steps."""
    t, config = training, training.context.config
    t.results = _evaluate_members(t.backbone, t.members, t.held_out, config)
    first, together = t.results[0], ensemble_metrics([result.margins for result in t.results])
    t.held_out_loss = together.get("ensemble_eval_loss", first.loss)
    append_jsonl(t.context.files.reliability, {"step": steps, "bins": reliability_table(first.margins)})
    return first.metrics() | together | diversity_metrics(t.backbone, t.members, config)


def _finish(training: RewardTraining) -> dict[str, Any]:
    """Centre the scores; write the adapters and the summary."""
    t, context, config = training, training.context, training.context.config
    results = t.results or _evaluate_members(t.backbone, t.members, t.held_out, config)
    _centre(t.backbone, t.members, t.train, config)
    for member in t.members:
        save_role(t.backbone, member.role, context.files.role(member.role).folder)
    parameters = (t.backbone.role_parameters(member.role).values() for member in t.members)
    summary = (
        _summary(t.members, results, len(t.train))
        | diversity_metrics(t.backbone, t.members, config)
        | {
            "steps": t.total_steps,
            "seconds_per_step": on_main(lambda: _seconds_per_step(context)),
            "trainable_parameters": sum(p.numel() for own in parameters for p in own),
            "seconds": round(time.monotonic() - t.started, 2),
            **peak_memory(),
        }
    )
    summary["warnings"] = reward_flags(summary)
    write_json(context.files.summary, summary)
    return summary


def _evaluate_members(
    backbone: Backbone, members: Sequence[Member], held_out: Pairs, config: RewardConfig
) -> list[RewardEvaluation]:
    return [score_pairs(backbone, held_out, config, role=member.role) for member in members]


def _centre(backbone: Backbone, members: Sequence[Member], train: Pairs, config: RewardConfig) -> None:
    """Shift the scores so that their mean over the training pairs is 0.

    The pairwise loss leaves the mean score free. PPO's value clipping and its penalties want it at zero.
    """
    with progress("reward: centring", len(train) * len(members), "pairs") as advance:
        for member in members:
            mean_score = score_pairs(backbone, train, config, advance, role=member.role).mean_score
            backbone.head(member.role).shift(-mean_score)


def _gradients(
    backbone: Backbone,
    optimizer: RoleOptimizer,
    members: Sequence[Member],
    train: Pairs,
    step: int,
    batch: tuple[int, int],
    config: RewardConfig,
    which: int,
) -> dict[str, float]:
    """Gradients of all members on a batch (epoch, number), the first or the second of the optimizer's `batches`.

    Dropout is the same in both.
    """
    line: dict[str, float] = {}
    for member in reversed(members):  # one after the other, so that their activations are not held together
        rows = optimizer.batches(member.batch(*batch, config.batch_size))[which]
        with seeded(member.seed, "reward dropout", step, rank()):
            line |= accumulate(backbone, optimizer, train, rows, config, member.role)  # the first one's stay
        if len(members) > 1:  # batches of other lengths would not fit into the pieces that this one leaves
            give_memory_back()
    return line


def accumulate(
    backbone: Backbone,
    optimizer: RoleOptimizer,
    pairs: Pairs,
    rows: list[int],
    config: RewardConfig,
    role: str = REWARD,
) -> dict[str, float]:
    """Gradients of the pairs of those rows; how they are cut into micro-batches changes rounding only."""
    sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
    batch = pairs.subset(rows)
    costs_B = batch.costs(packed=backbone.packs)
    with dropout(backbone):
        for index, counts in own_micro_batches(costs_B, config.micro_batch_tokens, padded=not backbone.packs):
            with backbone.role(role):
                chosen_B, rejected_B = backbone.response_scores(batch.take(index)).chunk(2)
            part = pairwise_loss(
                chosen_B,
                rejected_B,
                margin_B=batch.margins(index).to(chosen_B.device),
                label_smoothing=config.label_smoothing,
                centering=config.centering,
            )
            optimizer.backward(float(counts) * part.loss_B.sum() / len(rows))
            share = float(counts) * len(index) / len(rows)
            for name in sums:
                sums[name] += share * getattr(part, name).item()
    return sum_metrics(sums)


@contextmanager
def dropout(backbone: Backbone) -> Iterator[None]:
    """Dropout of the adapters is on within the block, and off after it, also after an exception."""
    backbone.train()
    try:
        yield
    finally:
        backbone.eval()


def _resume(training: RewardTraining) -> int:
    """Go on from the newest checkpoint, if any. Returns the next step."""
    loaded = load_checkpoint(training.context.folder)
    if loaded is None:
        return 0
    step, tensors, state = loaded
    for member in training.members:
        training.backbone.set_role_state(member.role, without_prefix(f"{member.role}/", tensors))
    training.optimizer.load_state(without_prefix(CHECKPOINT_PREFIX, tensors))
    training.started -= state["seconds"]
    say(f"reward: continuing after step {step}")
    return step


def _save(training: RewardTraining, steps: int, now: float) -> None:
    """Leave a checkpoint after that many steps; now: when the last of them ended."""
    context, loss = training.context, training.held_out_loss
    score = None if loss is None else -loss
    tensors, specs = roles_in(training.backbone, *(member.role for member in training.members))
    tensors |= with_prefix(CHECKPOINT_PREFIX, training.optimizer.state(copy=False))
    state = {"seconds": now - training.started} | specs
    save_checkpoint(context.folder, steps, tensors, state, keep=context.config.keep_checkpoints, score=score)


def _summary(members: Sequence[Member], results: Sequence[RewardEvaluation], train_pairs: int) -> dict[str, Any]:
    """What the first member is worth on held-out pairs; of an ensemble also what all are, apart and together."""
    held_out, margins = results[0], [result.margins for result in results]
    pairs = len(held_out.margins)
    low, high = accuracy_interval(held_out.accuracy * pairs, pairs)
    first = {
        "eval_accuracy": held_out.accuracy,
        "eval_accuracy_low": low,
        "eval_accuracy_high": high,
        "eval_pairs": pairs,
        "train_pairs": train_pairs,
        "eval_loss": held_out.loss,
        "eval_margin": held_out.margin,
        "calibration_error": expected_calibration_error(held_out.margins),
        "reliability": reliability_table(held_out.margins),
    }
    if len(members) == 1:
        return first
    return first | ensemble_metrics(margins) | {"members": member_rows(members, margins)}


def _seconds_per_step(context: StageContext[RewardConfig]) -> float:
    lines = read_jsonl(context.files.metrics)
    return round(sum(line["seconds_step"] for line in lines) / len(lines), 3)


def _line(step: int, total: int, line: dict[str, float]) -> str:
    return (
        f"reward {step}/{total}: loss {line['loss']:.4f}, accuracy {line['accuracy']:.3f}, held-out loss"
        f" {line['eval_loss']:.4f}, accuracy {line['eval_accuracy']:.3f}, margin {line['eval_margin']:.3f}"
    )

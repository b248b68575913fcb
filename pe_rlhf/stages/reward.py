"""The reward stage: a LoRA reward model on the backbone, trained on preference pairs with the Bradley–Terry loss.

Loss and head are in the package `reward`. Held-out pairs are split off by prompt, so that no prompt is on both sides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pe_rlhf.config import RewardConfig
from pe_rlhf.data.preference_pairs import Pairs
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.micro_batches import own_micro_batches
from pe_rlhf.model.passes import for_each_row
from pe_rlhf.model.tensors import with_prefix, without_prefix
from pe_rlhf.optim.role_optimizer import CHECKPOINT_PREFIX, RoleOptimizer
from pe_rlhf.runs.checkpoint import load_checkpoint, roles_in, save_checkpoint
from pe_rlhf.runs.learning_flags import reward_flags
from pe_rlhf.runs.saved_roles import save_role
from pe_rlhf.stages.add_roles import REWARD
from pe_rlhf.stages.context import StageContext
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
from pe_rlhf.system.failures import Stopped, TrainingError
from pe_rlhf.system.files import append_jsonl, read_jsonl, truncate_jsonl, write_json
from pe_rlhf.system.memory import peak_memory
from pe_rlhf.system.progress import Advance, no_progress, progress, say
from pe_rlhf.system.seeding import seeded
from pe_rlhf.system.stop_signals import stop_requests
from pe_rlhf.types import Sequences
from reward.calibration import accuracy_interval, expected_calibration_error, reliability_table
from reward.losses import pairwise_loss


def run(context: StageContext[RewardConfig]) -> dict[str, Any]:
    """Train, evaluate, centre the scores, and write the adapter."""
    config = context.config
    start = time.monotonic()
    backbone = context.backbone()
    train, held_out = load_pairs(context, config, backbone)
    members = members_of(context.recipe, config, len(train))
    add_members(context, backbone, members, train)
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    groups = groups_of(backbone, members, config)
    optimizer = RoleOptimizer(groups, config.optimizer, total_steps, context.deepspeed, context.recipe.seed)
    first_step, seconds_before = _resume(context, backbone, optimizer, members)
    everything = train.responses() + held_out.responses()
    with progress("reward: frozen blocks", len(everything), "responses") as advance:
        backbone.compute_once(everything, config.micro_batch_tokens, advance)
    writer = context.metrics(first_step)
    truncate_jsonl(context.files.reliability, first_step)
    results: list[RewardEvaluation] = []
    held_out_loss: float | None = None  # of the weights as they are

    with progress("reward: training", total_steps - first_step, "steps") as advance, stop_requests() as stop:
        for step in range(first_step, total_steps):
            epoch, batch = divmod(step, steps_per_epoch)
            step_start = time.monotonic()
            gradients = partial(_gradients, backbone, optimizer, members, train, step, (epoch, batch), config)
            line: dict[str, float] = {"epoch": epoch} | gradients(0)
            spent = time.monotonic() - step_start
            # Only weights whose loss on the next pairs is finite are kept: a run that fails goes on from sound ones.
            if step > first_step and step % config.checkpoint_every == 0:
                seconds = seconds_before + step_start - start
                _save(context, backbone, optimizer, members, step, seconds, held_out_loss)
            step_start = time.monotonic() - spent  # without the saving
            rates, norms = optimizer.learning_rates(), optimizer.step(partial(gradients, 1))
            line |= {"lr": rates[REWARD], "grad_norm": norms[REWARD]}
            line["seconds_step"] = time.monotonic() - step_start
            done, held_out_loss = step + 1, None
            if done % config.eval_every == 0 or done == total_steps:
                results = _evaluate_members(backbone, members, held_out, config)
                together = ensemble_metrics([result.margins for result in results])
                line |= results[0].metrics() | together | diversity_metrics(backbone, members, config)
                held_out_loss = together.get("ensemble_eval_loss", results[0].loss)
                append_jsonl(context.files.reliability, {"step": done, "bins": reliability_table(results[0].margins)})
                say(_line(done, total_steps, line))
            writer.write(done, line)
            if (stopped := stop.received()) or done == total_steps:
                seconds = seconds_before + time.monotonic() - start
                _save(context, backbone, optimizer, members, done, seconds, held_out_loss)
            if stopped:
                raise Stopped(f"reward: stopped after step {done}", stopped)
            advance(1)
    writer.close()

    results = results or _evaluate_members(backbone, members, held_out, config)
    _centre(backbone, members, train, config)
    for member in members:
        save_role(backbone, member.role, context.files.role(member.role).folder)
    summary = (
        _summary(members, results, len(train))
        | diversity_metrics(backbone, members, config)
        | {
            "steps": total_steps,
            "seconds_per_step": on_main(lambda: _seconds_per_step(context)),
            "trainable_parameters": sum(p.numel() for group in groups for p in group.parameters.values()),
            "seconds": round(seconds_before + time.monotonic() - start, 2),
            **peak_memory(),
        }
    )
    summary["warnings"] = reward_flags(summary)
    write_json(context.files.summary, summary)
    return summary


def _evaluate_members(
    backbone: Backbone, members: Sequence[Member], held_out: Pairs, config: RewardConfig
) -> list[RewardEvaluation]:
    return [evaluate_pairs(backbone, held_out, config, role=member.role) for member in members]


def _centre(backbone: Backbone, members: Sequence[Member], train: Pairs, config: RewardConfig) -> None:
    """Shift the scores so that their mean over the training pairs is 0.

    The pairwise loss leaves the mean score free. PPO's value clipping and its penalties want it at zero.
    """
    with progress("reward: centring", len(train) * len(members), "pairs") as advance:
        for member in members:
            mean_score = evaluate_pairs(backbone, train, config, advance, role=member.role).mean_score
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


def evaluate_pairs(
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


def _resume(
    context: StageContext[RewardConfig], backbone: Backbone, optimizer: RoleOptimizer, members: Sequence[Member]
) -> tuple[int, float]:
    """Continue from the newest checkpoint, if any: the next step, and the seconds spent so far."""
    loaded = load_checkpoint(context.folder)
    if loaded is None:
        return 0, 0.0
    step, tensors, state = loaded
    for member in members:
        backbone.set_role_state(member.role, without_prefix(f"{member.role}/", tensors))
    optimizer.load_state(without_prefix(CHECKPOINT_PREFIX, tensors))
    say(f"reward: continuing after step {step}")
    return step, state["seconds"]


def _save(
    context: StageContext[RewardConfig],
    backbone: Backbone,
    optimizer: RoleOptimizer,
    members: Sequence[Member],
    step: int,
    seconds: float,
    held_out_loss: float | None,
) -> None:
    config = context.config
    score = None if held_out_loss is None else -held_out_loss
    tensors, specs = roles_in(backbone, *(member.role for member in members))
    tensors |= with_prefix(CHECKPOINT_PREFIX, optimizer.state(copy=False))
    state = {"seconds": seconds} | specs
    save_checkpoint(context.folder, step, tensors, state, keep=config.keep_checkpoints, score=score)


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

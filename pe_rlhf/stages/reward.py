"""The reward stage: a LoRA reward model on the backbone, trained on preference pairs with the Bradley–Terry loss.

Loss and head are in the package `reward`. Held-out pairs are split off by prompt, so that no prompt is on both sides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pe_rlhf.config import DataSource, RewardConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.preference_pairs import Pairs, encode_pairs
from pe_rlhf.data.rows import hold_out, load_preferences, note_bad_rows
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.tensors import with_prefix, without_prefix
from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer
from pe_rlhf.runs.checkpoint import load_checkpoint, roles_in, save_checkpoint
from pe_rlhf.runs.layout import RunFiles, StageFiles
from pe_rlhf.runs.saved_roles import save_role
from pe_rlhf.stages.add_roles import add_role
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.init_batches import reward_statistics
from pe_rlhf.system.distributed import on_main, rank, sum_metrics, sum_over_ranks
from pe_rlhf.system.failures import Stopped, TrainingError
from pe_rlhf.system.files import append_jsonl, read_jsonl, truncate_jsonl, write_json
from pe_rlhf.system.memory import peak_memory
from pe_rlhf.system.progress import progress, say
from pe_rlhf.system.seeding import permutation, seeded
from pe_rlhf.system.stop_signals import stop_requests
from pe_rlhf.types import Sequences
from reward.calibration import accuracy_interval, expected_calibration_error, reliability_table
from reward.errors import InputError
from reward.losses import pairwise_loss
from reward.records import PreferenceRecord

ROLE = "reward"


def run(context: StageContext) -> dict[str, Any]:
    """Train, evaluate, centre the scores, and write the adapter."""
    config = context.recipe.reward
    assert config is not None
    start = time.monotonic()
    backbone = context.backbone()
    limit = min(config.max_length, backbone.max_positions or config.max_length)
    train, held_out = load_pairs(context, config, context.codec(backbone), limit)
    adapter = context.recipe.adapter_for("reward")
    statistics = reward_statistics(backbone, train, adapter, config, context.recipe.seed)
    add_role(context, backbone, ROLE, adapter, statistics)
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    group = RoleGroup(ROLE, backbone.role_parameters(ROLE), config.learning_rate)
    optimizer = RoleOptimizer([group], config.optimizer, total_steps, context.deepspeed)
    first_step, seconds_before = _resume(context, backbone, optimizer)
    train, held_out = _with_trunks(backbone, config, train, held_out)
    writer = context.metrics(first_step)
    truncate_jsonl(context.files.reliability, first_step)
    result: RewardEvaluation | None = None
    held_out_loss: float | None = None  # of the weights as they are

    with progress("reward: training", total_steps - first_step, "steps") as advance, stop_requests() as stop:
        for step in range(first_step, total_steps):
            epoch, batch = divmod(step, steps_per_epoch)
            order = permutation(len(train), context.recipe.seed, "reward", epoch)
            rows = order[batch * config.batch_size : (batch + 1) * config.batch_size]
            step_start = time.monotonic()
            with seeded(context.recipe.seed, "reward dropout", step, rank()):
                line = {"epoch": epoch, **accumulate(backbone, optimizer, train, rows, config)}
            spent = time.monotonic() - step_start
            # Only weights whose loss on the next pairs is finite are kept: a run that fails goes on from sound ones.
            if step > first_step and step % config.checkpoint_every == 0:
                _save(context, backbone, optimizer, step, seconds_before + step_start - start, held_out_loss)
            step_start = time.monotonic() - spent  # without the saving
            line |= {"lr": optimizer.learning_rates()[ROLE], "grad_norm": optimizer.step()[ROLE]}
            line["seconds_step"] = time.monotonic() - step_start
            done, held_out_loss = step + 1, None
            if done % config.eval_every == 0 or done == total_steps:
                result = evaluate_pairs(backbone, held_out, config)
                line |= result.metrics()
                held_out_loss = result.loss
                append_jsonl(context.files.reliability, {"step": done, "bins": reliability_table(result.margins)})
                say(_line(done, total_steps, line))
            writer.write(done, line)
            if (stopped := stop.received()) or done == total_steps:
                _save(context, backbone, optimizer, done, seconds_before + time.monotonic() - start, held_out_loss)
            if stopped:
                raise Stopped(f"reward: stopped after step {done}", stopped)
            advance(1)
    writer.close()

    # The pairwise loss leaves the mean score free. PPO's value clipping and its penalties want it at zero.
    result = result or evaluate_pairs(backbone, held_out, config)
    with progress("reward: centring", len(train), "pairs") as advance:
        backbone.head(ROLE).shift(-evaluate_pairs(backbone, train, config, advance).mean_score)
    save_role(backbone, ROLE, context.files.role(ROLE).folder)
    summary = _summary(result, len(train)) | {
        "steps": total_steps,
        "seconds_per_step": on_main(lambda: _seconds_per_step(context)),
        "trainable_parameters": sum(p.numel() for p in group.parameters.values()),
        "seconds": round(seconds_before + time.monotonic() - start, 2),
        **peak_memory(),
    }
    write_json(context.files.summary, summary)
    return summary


def accumulate(
    backbone: Backbone, optimizer: RoleOptimizer, pairs: Pairs, rows: list[int], config: RewardConfig
) -> dict[str, float]:
    """Gradients of the pairs of those rows; how they are cut into micro-batches changes rounding only."""
    sums = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
    backbone.train()
    for scored in _scored(backbone, pairs, rows, config):
        part = pairwise_loss(
            scored.chosen_B,
            scored.rejected_B,
            margin_B=scored.margin_B,
            label_smoothing=config.label_smoothing,
            centering=config.centering,
        )
        optimizer.backward(scored.counts * part.loss_B.sum() / len(rows))
        share = scored.counts * len(scored.index) / len(rows)
        for name in sums:
            sums[name] += share * getattr(part, name).item()
    backbone.eval()
    return sum_metrics(sums)


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


@torch.no_grad()
def evaluate_pairs(
    backbone: Backbone, pairs: Pairs, config: RewardConfig, on_progress: Callable[[int], None] | None = None
) -> RewardEvaluation:
    """Score all pairs; the plain loss, without margin, smoothing or centering. `on_progress` is told of pairs scored.

    Raises `TrainingError` where it is not finite: an accuracy of such scores would look like one.
    """
    scores_2B = torch.zeros(2, len(pairs))
    for part in _scored(backbone, pairs, list(range(len(pairs))), config):
        if part.counts:
            scores_2B[:, part.index] = torch.stack([part.chosen_B, part.rejected_B]).float().cpu()
        if on_progress is not None:
            on_progress(len(part.index))
    chosen_B, rejected_B = sum_over_ranks(scores_2B)  # each rank has filled in its own pairs
    result = pairwise_loss(chosen_B, rejected_B)
    if not result.loss.isfinite():
        raise TrainingError(
            f"the loss over {len(pairs)} pairs is {result.loss.item()}; lower reward.learning_rate", kind="not_finite"
        )
    metrics = (result.loss.item(), result.accuracy.item(), result.margin.item())
    return RewardEvaluation(*metrics, (chosen_B - rejected_B).tolist(), torch.cat([chosen_B, rejected_B]).mean().item())


@dataclass(frozen=True)
class Scored:
    """A micro-batch of this rank: where its pairs stand among the rows, their scores and wanted margins, and whether
    it counts (1 or 0; see `own_micro_batches`)."""

    index: Tensor
    chosen_B: Tensor
    rejected_B: Tensor
    margin_B: Tensor
    counts: float


def _scored(backbone: Backbone, pairs: Pairs, rows: list[int], config: RewardConfig) -> Iterator[Scored]:
    """This rank's micro-batches of those rows."""
    lengths_B = pairs.budget_lengths(rows, backbone.packs)
    for index, counts in backbone.own_micro_batches(lengths_B, config.micro_batch_tokens):
        part = [rows[i] for i in index.tolist()]
        with backbone.role(ROLE):
            scores_B = backbone.response_scores(pairs.pack(part, backbone.pad_token_id))
        chosen_B, rejected_B = scores_B.chunk(2)
        margin_B = torch.tensor([pairs.margins[i] for i in part], device=scores_B.device)
        yield Scored(index, chosen_B, rejected_B, margin_B, float(counts))


def _with_trunks(backbone: Backbone, config: RewardConfig, *sets: Pairs) -> list[Pairs]:
    """Compute what lies below the first adapter once for all epochs and evaluations, where there is room to keep it."""
    if not backbone.keeps_trunk(sum(pairs.tokens() for pairs in sets)):
        return list(sets)
    rows = [row for pairs in sets for row in pairs.chosen + pairs.rejected]
    packed = Sequences.pack([p for p, _ in rows], [r for _, r in rows], backbone.pad_token_id)
    with progress("reward: frozen blocks", len(rows), "responses") as advance:
        trunks = iter(backbone.trunk_rows(packed, config.micro_batch_tokens, advance))
    return [
        replace(p, chosen_trunks=list(islice(trunks, len(p))), rejected_trunks=list(islice(trunks, len(p))))
        for p in sets
    ]


def load_pairs(context: StageContext, config: RewardConfig, codec: TextCodec, limit: int) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs, tokenised. Raises `InputError` where one of them is left without pairs."""
    source = config.data or DataSource(path=str(RunFiles(context.run_dir).stage("preferences").preferences))
    records = _records(context.files, source, "reward.data", config)
    if config.eval_data is not None:
        train, held_out = records, _records(context.files, config.eval_data, "reward.eval_data", config)
    else:
        share, seed = config.eval_share, context.recipe.seed
        train, held_out = hold_out(records, lambda record: repr(record.prompt), share, seed, "reward held out")
    if not train or not held_out:
        raise InputError(f"reward.data: {len(records)} pairs are too few to hold out a share of {config.eval_share}")
    return encode_pairs(train, codec, limit), encode_pairs(held_out, codec, limit)


def _records(files: StageFiles, source: DataSource, key: str, config: RewardConfig) -> list[PreferenceRecord]:
    records, bad = load_preferences(source, key, config.max_bad_share)
    note_bad_rows(files.left_out(key), key, bad)
    return records


def _resume(context: StageContext, backbone: Backbone, optimizer: RoleOptimizer) -> tuple[int, float]:
    """Continue from the newest checkpoint, if any: the next step, and the seconds spent so far."""
    loaded = load_checkpoint(context.folder)
    if loaded is None:
        return 0, 0.0
    step, tensors, state = loaded
    backbone.set_role_state(ROLE, without_prefix(f"{ROLE}/", tensors))
    optimizer.load_state(without_prefix("engine/", tensors))
    say(f"reward: continuing after step {step}")
    return step, state["seconds"]


def _save(
    context: StageContext,
    backbone: Backbone,
    optimizer: RoleOptimizer,
    step: int,
    seconds: float,
    held_out_loss: float | None,
) -> None:
    config = context.recipe.reward
    assert config is not None
    score = None if held_out_loss is None else -held_out_loss
    tensors, specs = roles_in(backbone, ROLE)
    tensors |= with_prefix("engine/", optimizer.state(copy=False))
    state = {"seconds": seconds} | specs
    save_checkpoint(context.folder, step, tensors, state, keep=config.keep_checkpoints, score=score)


def _summary(held_out: RewardEvaluation, train_pairs: int) -> dict[str, Any]:
    pairs = len(held_out.margins)
    low, high = accuracy_interval(held_out.accuracy * pairs, pairs)
    return {
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


def _seconds_per_step(context: StageContext) -> float:
    lines = read_jsonl(context.files.metrics)
    return round(sum(line["seconds_step"] for line in lines) / len(lines), 3)


def _line(step: int, total: int, line: dict[str, float]) -> str:
    return (
        f"reward {step}/{total}: loss {line['loss']:.4f}, accuracy {line['accuracy']:.3f}, held-out loss"
        f" {line['eval_loss']:.4f}, accuracy {line['eval_accuracy']:.3f}, margin {line['eval_margin']:.3f}"
    )

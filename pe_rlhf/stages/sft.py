"""The sft stage: TRL fine-tunes the model with a LoRA, and the merged checkpoint is what later stages start from.

Its weights are computed fresh, W0 + s·B·A, from a base that is loaded for this.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.config import DataSource, SFTConfig
from pe_rlhf.data.codec import TextCodec, cut_pair
from pe_rlhf.data.examples import Example
from pe_rlhf.data.rows import hold_out, load_examples, note_bad_rows
from pe_rlhf.runs.export import write_merged
from pe_rlhf.runs.layout import StageFiles
from pe_rlhf.runs.metrics import MetricsWriter
from pe_rlhf.runs.saved_roles import load_base, save_role
from pe_rlhf.stages.context import StageContext
from pe_rlhf.system.failures import Stopped
from pe_rlhf.system.files import new_folder, read_jsonl, write_json
from pe_rlhf.system.memory import peak_memory
from pe_rlhf.system.progress import Advance, progress, say
from pe_rlhf.system.seeding import permutation
from pe_rlhf.system.stop_signals import StopRequest, stop_requests
from reward.errors import InputError

if TYPE_CHECKING:
    from pe_rlhf.stages.sft_trainer import Trainer

ROLE = "sft"
NO_LOSS = -100
PEFT_PREFIX = "base_model.model."


def run(context: StageContext[SFTConfig]) -> dict[str, Any]:
    """Train, and write the adapter and the merged checkpoint."""
    config = context.config
    start = time.monotonic()
    factors, figures, seconds_before = _train(context, config, start)
    gc.collect()  # the trainer and its model, which hold each other
    _write_model(context, factors)
    lines = read_jsonl(context.files.metrics)
    summary = {
        **figures,
        "eval_loss": lines[-1]["eval_loss"],
        "loss_last": lines[-1]["loss"],
        "steps": len(lines),
        "seconds": round(seconds_before + time.monotonic() - start, 2),
        **peak_memory(),
    }
    write_json(context.files.summary, summary)
    return summary


def _train(
    context: StageContext[SFTConfig], config: SFTConfig, start: float
) -> tuple[dict[str, Tensor], dict[str, Any], float]:
    """The trained A and B by PEFT's names; figures for the summary; seconds spent before this process."""
    from pe_rlhf.stages.sft_trainer import StepCallback, make_trainer, newest_checkpoint, one_process

    recipe, checkpoints = context.recipe, context.files.checkpoints
    backbone = load_base(recipe, recipe.model)
    limit = min(config.max_length, backbone.max_positions or config.max_length)
    train, held_out = load_rows(context, config, context.codec(backbone), limit)
    passes = [permutation(len(train), recipe.seed, "sft", epoch) for epoch in range(config.epochs)]
    rows = train.select([row for order in passes for row in order])
    total_steps = math.ceil(len(rows) / config.batch_size)

    with one_process(backbone.device), stop_requests() as stop:
        trainer = make_trainer(
            backbone, (rows, held_out), config, recipe.adapter_for("sft"), recipe.backbone, recipe.seed, checkpoints
        )
        before = trainer.held_out_loss()  # B is zero still
        path, first_step, seconds_before = newest_checkpoint(checkpoints) or (None, 0, 0.0)
        if path is not None:
            say(f"sft: continuing after step {first_step}")
        trainer.seconds = lambda: seconds_before + time.monotonic() - start
        metrics = context.metrics(first_step)
        with progress("sft: training", total_steps - first_step, "steps") as advance:
            steps = _Steps(trainer, config, len(train), total_steps, metrics, stop, advance)
            trainer.add_callback(StepCallback(recipe.seed, steps.done))
            trainer.train(resume_from_checkpoint=None if path is None else str(path))
        metrics.close()
        if steps.stopped:
            raise Stopped(f"sft: stopped after step {trainer.state.global_step}", steps.stopped)
    assert isinstance(trainer.model, PeftModel)
    figures = {
        "train_rows": len(train),
        "eval_rows": len(held_out),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "eval_loss_before": before,
    }
    return get_peft_model_state_dict(trainer.model), figures, seconds_before


class _Steps:
    """Writes down what each step came to."""

    def __init__(
        self,
        trainer: Trainer,
        config: SFTConfig,
        rows: int,
        total_steps: int,
        metrics: MetricsWriter,
        stop: StopRequest,
        advance: Advance,
    ) -> None:
        self._trainer, self._config, self._rows, self._total = trainer, config, rows, total_steps
        self._metrics, self._stop, self._advance = metrics, stop, advance
        self.stopped = 0

    def done(self, step: int, logs: dict[str, float]) -> bool:
        """Take the figures of a step; whether training is to stop here."""
        epoch = (step - 1) * self._config.batch_size // self._rows
        line = {"epoch": epoch, "loss": logs["loss"], "grad_norm": logs["grad_norm"], "lr": logs["learning_rate"]}
        if step % self._config.eval_every == 0 or step == self._total:
            line["eval_loss"] = self._trainer.held_out_loss()
            say(f"sft {step}/{self._total}: loss {line['loss']:.4f}, held-out loss {line['eval_loss']:.4f}")
        self._metrics.write(step, line)
        self._advance(1)
        self.stopped = self._stop.received()
        return bool(self.stopped)


def _write_model(context: StageContext[SFTConfig], factors: dict[str, Tensor]) -> None:
    """Write `adapter/`, and `model/`, the base with the adapter merged into it; each is whole or not there."""
    recipe, adapter = context.recipe, context.recipe.adapter_for("sft")
    backbone = load_base(recipe, recipe.model, "cpu")
    spec = AdapterSpec.on(backbone.model, adapter)
    named = {name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor.cpu() for name, tensor in factors.items()}
    backbone.load_role(ROLE, spec, named)
    save_role(backbone, ROLE, context.files.role(ROLE).folder)
    with new_folder(context.files.model) as scratch:
        write_merged(backbone, ROLE, recipe.backbone, scratch, context.codec(backbone).template)


def load_rows(
    context: StageContext[SFTConfig], config: SFTConfig, codec: TextCodec, limit: int
) -> tuple[Dataset, Dataset]:
    """Tokenised rows to train on and held-out ones. Raises `InputError` where one of them is left without rows."""
    examples = _examples(context.files, config.data, "sft.data", config)
    if config.eval_data is not None:
        train, held_out = examples, _examples(context.files, config.eval_data, "sft.eval_data", config)
    else:
        share, seed = config.eval_share, context.recipe.seed
        train, held_out = hold_out(examples, lambda e: repr(e.prompt or e.response), share, seed, "sft held out")
    if not train or not held_out:
        raise InputError(f"sft.data: {len(examples)} rows are too few to hold out a share of {config.eval_share}")
    with progress("sft: tokenising", len(train) + len(held_out), "rows") as advance:
        key = "sft.data" if config.eval_data is None else "sft.eval_data"
        return (
            encode_rows(train, "sft.data", codec, limit, config.completion_only, advance),
            encode_rows(held_out, key, codec, limit, config.completion_only, advance),
        )


def _examples(files: StageFiles, source: DataSource, key: str, config: SFTConfig) -> list[Example]:
    examples, bad = load_examples(source, key, config.max_bad_share)
    note_bad_rows(files.left_out(key), key, bad)
    return examples


def encode_rows(
    examples: list[Example],
    key: str,
    codec: TextCodec,
    limit: int,
    completion_only: bool,
    advance: Callable[[int], None] = lambda _: None,
) -> Dataset:
    """`input_ids` of at most `limit` tokens, and `labels`: the same, but −100 where there is no loss.

    A row without a token to learn is left out. The first token of a row is never one: nothing predicts it.
    """
    ids, labels = [], []
    for example in examples:
        if example.prompt is None:
            prompt, response = [], codec.encode_text(example.response)[:limit]
        else:
            prompt, response = cut_pair(*codec.encode_pair(example.prompt, example.response), limit)
        row = np.array(prompt + response, dtype=np.int32)
        label = row.copy()
        label[: max(1, len(prompt) if completion_only else 1)] = NO_LOSS
        if (label != NO_LOSS).any():
            ids.append(row)
            labels.append(label)
        advance(1)
    if not ids:
        raise InputError(f"{key}: no row has a token to learn")
    if len(ids) < len(examples):
        say(f"{key}: left out {len(examples) - len(ids)} of {len(examples)} rows, which have no token to learn")
    return Dataset.from_dict({"input_ids": ids, "labels": labels})

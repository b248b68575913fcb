"""The sft stage: TRL fine-tunes the model with a LoRA. The merged model is what all later stages start from."""

from __future__ import annotations

import math
import time
from operator import itemgetter
from typing import Any

import pyarrow as pa
from accelerate.utils import patch_environment
from datasets import Dataset
from peft import PeftModel

from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.adapters.targets import numbers_of_experts
from pe_rlhf.config import DataSource, SFTConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.cuts import Cuts
from pe_rlhf.data.examples import Example
from pe_rlhf.data.row_table import Ragged
from pe_rlhf.data.rows import hold_out, load_examples, note_bad_rows, say_first, say_overlap
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.runs.export import write_merged
from pe_rlhf.runs.saved_roles import load_base, save_role
from pe_rlhf.stages.context import StageContext
from pe_rlhf.system.failures import Stopped
from pe_rlhf.system.files import new_folder, write_json
from pe_rlhf.system.memory import peak_memory
from pe_rlhf.system.progress import progress, say
from pe_rlhf.system.stop_signals import stop_requests
from reward.errors import InputError
from reward.records import first_turn

ROLE = "sft"
NO_LOSS = -100
Encoded = tuple[str, int]  # what a row begins with, and its number


def run(context: StageContext[SFTConfig]) -> dict[str, Any]:
    """Train, and write the adapter and the merged model."""
    recipe, config, start = context.recipe, context.config, time.monotonic()
    backbone = load_base(recipe, recipe.model)
    codec = context.codec(backbone)
    rows = tokenised_rows(context, codec, min(config.max_length, backbone.max_positions or config.max_length))
    spec = AdapterSpec.on(backbone.model, recipe.adapter_for("sft"))
    metrics = _train(context, backbone, rows, spec)
    _write_model(context, backbone, codec.template)
    summary = {
        "train_rows": len(rows[0]),
        "eval_rows": len(rows[1]),
        **metrics,
        "seconds": round(time.monotonic() - start, 2),
        **peak_memory(),
    }
    write_json(context.files.summary, summary)
    return summary


def _train(
    context: StageContext[SFTConfig], backbone: Backbone, rows: tuple[Dataset, Dataset], spec: AdapterSpec
) -> dict[str, Any]:
    """Leave the trained LoRA on the backbone as the role `sft`; returns the metrics for the summary."""
    from pe_rlhf.stages.sft_trainer import MetricsCallback, make_trainer, newest_checkpoint, peft_factors

    config = context.config
    experts = numbers_of_experts(backbone.model, spec.modules)  # PEFT's wrappers hide them later on
    total_steps = config.epochs * math.ceil(len(rows[0]) / config.batch_size)

    # One process, also where this one is a group of its own for DeepSpeed, and the recipe's device.
    with patch_environment(LOCAL_RANK=-1, ACCELERATE_TORCH_DEVICE=backbone.device), stop_requests() as stop:
        trainer = make_trainer(backbone, rows, spec, config, context.recipe, total_steps, context.files.checkpoints)
        peft_factors(trainer.model, spec, experts)  # what PEFT takes for other layers is refused before training
        before = trainer.evaluate()["eval_loss"]  # B is still zero
        checkpoint = newest_checkpoint(context.files.checkpoints)
        first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        if checkpoint:
            say(f"sft: continuing after step {first_step}")
        metrics = context.metrics(first_step)
        with progress("sft: training", total_steps - first_step, "steps") as advance:
            record = MetricsCallback(metrics, stop, advance)
            trainer.add_callback(record)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        metrics.close()
    state, model = trainer.state, trainer.model
    if record.stopped:
        raise Stopped(f"sft: stopped after step {state.global_step}", record.stopped)
    assert isinstance(model, PeftModel)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    factors = peft_factors(model, spec, experts)
    model.unload()  # the base as it was, without PEFT's layers
    backbone.load_role(ROLE, spec, factors)
    return {
        "trainable_parameters": trainable,
        "eval_loss_before": before,
        "eval_loss": _last(state.log_history, "eval_loss"),
        "loss_last": _last(state.log_history, "loss"),
        "steps": state.global_step,
    }


def _last(log: list[dict[str, float]], name: str) -> float:
    return next(line[name] for line in reversed(log) if name in line)


def _write_model(context: StageContext[SFTConfig], backbone: Backbone, template: str | None) -> None:
    """Write `adapter/`, and `model/`, the base with the adapter merged into it; each is whole or not there."""
    save_role(backbone, ROLE, context.files.role(ROLE).folder)
    with new_folder(context.files.model) as folder:
        write_merged(backbone, ROLE, context.recipe.backbone, folder, template)


def tokenised_rows(context: StageContext[SFTConfig], codec: TextCodec, limit: int) -> tuple[Dataset, Dataset]:
    """Tokenised rows to train on and held-out ones. Raises `InputError` where either has no rows."""
    config, ids, labels = context.config, Ragged(), Ragged()

    def encoded(source: DataSource, key: str) -> list[Encoded]:
        cuts = Cuts()

        def encode(example: Example) -> Encoded:
            row, learnt = encode_row(example, codec, limit, cuts, whole=not config.completion_only)
            ids.append(row)
            labels.append(learnt)
            return first_turn(example.prompt or example.response), len(ids) - 1

        examples, bad = load_examples(source, key, config.max_bad_share, encode)
        note_bad_rows(context.files.left_out(key), key, bad)
        say_first(key, len(examples), "rows", codec.written(ids[examples[0][1]]))
        cuts.say(key, len(examples) + len(bad), limit)
        return examples

    def table(rows: list[Encoded]) -> Dataset:
        columns = {"input_ids": ids, "labels": labels}
        kind = pa.list_(pa.int32())
        return Dataset(pa.table({name: pa.array((of[i] for _, i in rows), kind) for name, of in columns.items()}))

    examples = encoded(config.data, "sft.data")
    if config.eval_data is not None:
        train, held_out = examples, encoded(config.eval_data, "sft.eval_data")
        say_overlap("sft.eval_data", [turn for turn, _ in held_out], [turn for turn, _ in train])
    else:
        train, held_out = hold_out(examples, itemgetter(0), config.eval_share, context.recipe.seed, "sft held out")
    if not train or not held_out:
        raise InputError(
            f"sft.data: {len(examples)} rows are too few to hold out a share of {config.eval_share}",
            kind="empty",
            key="sft.data",
            file=config.data.title,
            fix="add rows, raise sft.eval_share, or give sft.eval_data",
        )
    return table(train), table(held_out)


def encode_row(
    example: Example, codec: TextCodec, limit: int, cuts: Cuts | None = None, *, whole: bool
) -> tuple[list[int], list[int]]:
    """At most `limit` token ids, and labels: the same, but −100 where there is no loss; on the prompt if `whole`.

    The first token of a row is never learnt: nothing predicts it. Raises `InputError` where no token is left.
    """
    if example.prompt is None:
        text = codec.encode_text(example.response)
        prompt, response = [], text[:limit]
        (cuts or Cuts()).count(False, response != text)
    else:
        prompt, (response,) = codec.encode_within(example.prompt, [(example.response, False)], limit, cuts)
    ids, given = prompt + response, 1 if whole else max(1, len(prompt))
    if len(ids) <= given or response == [codec.end_token_id]:
        raise InputError("there is no token to learn", kind="empty")
    return ids, [NO_LOSS] * given + ids[given:]

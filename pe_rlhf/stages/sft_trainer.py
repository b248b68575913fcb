"""TRL's SFTTrainer as the sft stage uses it. The one place that imports trl.

Left to TRL: the loop, the loss, PEFT's LoRA, and what a checkpoint holds. Done here: the order of the rows and dropout
follow from the recipe's seed, rates from our schedule; a checkpoint counts only once it is sealed with checksums.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from safetensors import SafetensorError
from torch import nn
from transformers import PrinterCallback, TrainerCallback
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging
from trl.trainer.sft_config import SFTConfig as TRLConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from pe_rlhf.adapters.lora.lora_plus import learning_rate_groups
from pe_rlhf.adapters.targets import find_targets
from pe_rlhf.config import AdapterConfig, BackboneConfig, SFTConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.optim.role_optimizer import schedule_factor
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.files import write_json
from pe_rlhf.system.progress import say
from pe_rlhf.system.seeding import derive_seed

SEAL = "sealed.json"
KEPT = 2


class OneDeviceConfig(TRLConfig):
    """Arguments for a trainer that keeps to one device: unasked it takes the first GPU, and refuses to see several."""

    @property
    def device(self) -> torch.device:
        unasked = super().device  # which sets up the state
        return unasked if self.distributed_state is None else self.distributed_state.device or unasked

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


class Trainer(SFTTrainer):
    """TRL's trainer with sealed checkpoints. It tells nobody that it was used."""

    # Seconds spent on the stage so far, for the seal.
    seconds: Callable[[], float] = staticmethod(lambda: 0.0)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss of the held-out tokens, nats per token. TRL's own evaluation is a mean over batches."""
        assert isinstance(self.eval_dataset, Dataset)
        assert isinstance(self.model, nn.Module)
        self.model.eval()
        total, count, size = 0.0, 0, self.args.per_device_eval_batch_size
        for start in range(0, len(self.eval_dataset), size):
            rows = self.eval_dataset.select(range(start, min(start + size, len(self.eval_dataset)))).to_list()
            inputs = self.data_collator(rows)
            tokens = int((inputs["labels"] != -100).sum())
            loss, _, _ = self.prediction_step(self.model, inputs, prediction_loss_only=True)
            assert loss is not None
            total, count = total + loss.item() * tokens, count + tokens
        if not math.isfinite(total):
            raise TrainingError(f"the held-out loss is {total}; lower sft.learning_rate")
        return total / count

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as always, then seal: what a kill or a full disk left unsealed is passed over when a run goes on."""
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:  # how torch and safetensors put a full disk
            raise OSError(f"a checkpoint could not be written: {str(error).splitlines()[0]}") from error
        folder = Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}"
        write_json(folder / SEAL, {"seconds": self.seconds(), "sha256": _digests(folder)})

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        """None: a checkpoint is for this stage alone."""

    def _send_telemetry(self) -> None:
        """TRL would send the model's architecture and the GPU's name to the hub."""


def make_trainer(
    backbone: Backbone,
    rows: tuple[Dataset, Dataset],
    config: SFTConfig,
    adapter: AdapterConfig,
    settings: BackboneConfig,
    seed: int,
    folder: Path,
) -> Trainer:
    """A trainer on the backbone's model, into which PEFT puts its LoRA; `rows`: to train on, in order, and held out."""
    arguments = OneDeviceConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
        train_sampling_strategy="sequential",
        max_length=None,
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=derive_seed(seed, "sft") % 2**32,
        bf16=False,
        use_cpu=backbone.device.type == "cpu",
        dataloader_pin_memory=backbone.device.type != "cpu",
        gradient_checkpointing=settings.gradient_checkpointing,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=KEPT,
        logging_steps=1,
        logging_nan_inf_filter=False,
        log_level="error",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=backbone.model,
        args=arguments,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        processing_class=backbone.tokenizer,
        data_collator=DataCollatorForLanguageModeling(backbone.pad_token_id),
        peft_config=_lora(adapter, backbone),
    )
    trainer.remove_callback(PrinterCallback)
    total_steps = math.ceil(len(rows[0]) / config.batch_size)
    trainer.optimizer, trainer.lr_scheduler = _optimizer(trainer, config, total_steps)
    return trainer


class StepCallback(TrainerCallback):
    """Before a step torch's generators are seeded for it; after it `done` is given the step and TRL's figures of it.

    Where `done` says that the run is to stop, the trainer saves and ends.
    """

    def __init__(self, seed: int, done: Callable[[int, dict[str, float]], bool]) -> None:
        self._seed, self._done = seed, done

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        torch.manual_seed(derive_seed(self._seed, "sft dropout", state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **named: Any) -> None:
        if logs is None or "loss" not in logs:  # a summary of the whole training, which comes last
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs[name]):
                what = "loss" if name == "loss" else "gradient's norm"
                raise TrainingError(f"the {what} is {logs[name]} at optimizer step {state.global_step}")
        if self._done(state.global_step, logs):
            control.should_save = control.should_training_stop = True


@contextmanager
def one_process(device: torch.device) -> Iterator[None]:
    """Within it accelerate sees one process (we may be a group of one for DeepSpeed) and that device alone.

    What the trainer sets for all of torch and transformers, seeds and verbosity, is put back afterwards.
    """
    before = {name: os.environ.get(name) for name in ("LOCAL_RANK", "ACCELERATE_TORCH_DEVICE")}
    verbosity = transformers_logging.get_verbosity()
    os.environ.pop("LOCAL_RANK", None)
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def newest_checkpoint(folder: Path) -> tuple[Path, int, float] | None:
    """The newest sealed checkpoint, its step, and the seconds spent until then; a damaged one is told and removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
            if seal["sha256"] != _digests(path):
                raise ValueError("its checksums are wrong")
            return path, int(path.name.rpartition("-")[2]), float(seal["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"{path} is damaged ({error}); trying the one before")
            shutil.rmtree(path)
    return None


def _lora(adapter: AdapterConfig, backbone: Backbone) -> LoraConfig:
    names = find_targets(backbone.model, adapter.targets, adapter.last_layers)
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT only ever divides it
        use_rslora=adapter.scaling == "rslora",
        lora_dropout=adapter.dropout,
        target_modules=names,
        fan_in_fan_out=isinstance(backbone.model.get_submodule(names[0]), Conv1D),
        task_type=TaskType.CAUSAL_LM,
    )


def _optimizer(
    trainer: Trainer, config: SFTConfig, total_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    assert isinstance(trainer.model, nn.Module)
    named = trainer.model.named_parameters()
    trained = {name.removesuffix(".default.weight"): tensor for name, tensor in named if tensor.requires_grad}
    settings = config.optimizer
    groups = [
        {"params": list(part.values()), "lr": config.learning_rate * factor}
        for factor, part in learning_rate_groups(trained, settings.lora_plus_ratio)
    ]
    adamw = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: schedule_factor(settings, step, total_steps))


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but its seal; all are on the disk when this returns."""
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name == SEAL:
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests

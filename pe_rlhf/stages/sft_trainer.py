"""TRL's SFTTrainer on a backbone. Loop, LoRA, AdamW and checkpoints are TRL's and PEFT's."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from transformers.pytorch_utils import Conv1D
from trl.trainer.sft_config import SFTConfig as TRLConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from pe_rlhf.adapters.peft_export import factors_of_peft
from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.adapters.targets import numbers_of_experts
from pe_rlhf.config import LoRAConfig, Recipe, SFTConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.runs.metrics import MetricsWriter
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.files import read_json
from pe_rlhf.system.progress import Advance
from pe_rlhf.system.seeding import derive_seed
from pe_rlhf.system.stop_signals import StopRequest
from reward.errors import InputError


class OneDeviceConfig(TRLConfig):
    """Arguments for a trainer on the recipe's device: by itself TRL takes all GPUs, from the first one on."""

    @property
    def device(self) -> torch.device:
        by_itself = super().device  # sets up the state
        return by_itself if self.distributed_state is None else self.distributed_state.device or by_itself

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


class Trainer(SFTTrainer):
    """TRL's trainer, on which a full disk is an OSError."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as error:  # what torch and safetensors raise on a full disk
            raise OSError(f"a checkpoint could not be written: {str(error).splitlines()[0]}") from error


def make_trainer(
    backbone: Backbone,
    rows: tuple[Dataset, Dataset],
    spec: AdapterSpec,
    config: SFTConfig,
    recipe: Recipe,
    total_steps: int,
    folder: Path,
) -> Trainer:
    """A trainer on the backbone's model, into which PEFT puts its LoRA; `rows`: to train on, and held out."""
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL would report the model's architecture and the GPU
    optimizer = config.optimizer
    on_cpu = backbone.device.type == "cpu"
    arguments = OneDeviceConfig(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear" if optimizer.schedule == "linear" else "constant_with_warmup",
        warmup_steps=math.ceil(optimizer.warmup_ratio * total_steps),
        optim="adamw_torch",
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        max_length=None,  # rows come tokenised and cut
        seed=derive_seed(recipe.seed, "sft") % 2**32,
        bf16=False,  # the base has the recipe's dtype, the LoRA is fp32
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        gradient_checkpointing=recipe.backbone.gradient_checkpointing,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
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
        peft_config=_lora(spec, backbone),
    )
    trainer.remove_callback(PrinterCallback)
    if optimizer.lora_plus_ratio != 1:
        trainer.optimizer = create_loraplus_optimizer(
            trainer.model,  # type: ignore[arg-type]  # PEFT's, since there is a peft_config
            torch.optim.AdamW,
            lr=config.learning_rate,
            loraplus_lr_ratio=optimizer.lora_plus_ratio,
            loraplus_weight_decay=optimizer.weight_decay,
            betas=optimizer.betas,
            eps=optimizer.eps,
        )
    return trainer


class MetricsCallback(TrainerCallback):
    """Writes what TRL logs to metrics.jsonl, and ends training on a signal or on a loss that is not finite."""

    def __init__(self, metrics: MetricsWriter, stop: StopRequest, advance: Advance) -> None:
        self._metrics, self._stop, self._advance = metrics, stop, advance
        self.stopped = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **named: Any) -> None:
        names = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr", "eval_loss": "eval_loss"}
        line = {ours: logs[theirs] for theirs, ours in names.items() if logs and theirs in logs}
        for name, value in line.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {name} is {value} at optimizer step {state.global_step}",
                    kind="not_finite",
                    step=state.global_step,
                    fix="lower sft.learning_rate",
                )
        if line:
            self._metrics.write(state.global_step, line)

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._advance(1)
        self.stopped = self._stop.received()
        if state.global_step == state.max_steps:
            control.should_evaluate = True
        if self.stopped:
            control.should_save = control.should_training_stop = True


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint. TRL writes `trainer_state.json` last: one without it, after a kill, is removed."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            read_json(path / "trainer_state.json")
            return path
        except InputError:
            shutil.rmtree(path)
    return None


def peft_factors(model: Any, spec: AdapterSpec, experts: Mapping[str, int]) -> dict[str, Tensor]:
    """The factors of PEFT's LoRA by our names; `experts`: how many a fused weight has.

    Raises `InputError` where PEFT has put it on other layers.
    """
    try:
        return factors_of_peft(get_peft_model_state_dict(model), spec.modules, experts)
    except KeyError as error:
        raise InputError(
            f"sft: PEFT, which sft trains with, takes names of this model's layers for others: it has no {error}",
            kind="conflict",
            key="adapter.targets",
            fix="set sft.adapter.targets: attention, or name targets without dense and shared MLPs",
        ) from error


def _lora(spec: AdapterSpec, backbone: Backbone) -> LoraConfig:
    settings = spec.settings
    assert isinstance(settings, LoRAConfig)  # the recipe's schema sees to it
    experts = sorted(numbers_of_experts(backbone.model, spec.modules))
    modules = [name for name in spec.modules if name not in experts]
    if experts and settings.dropout:
        raise InputError(
            f"adapter.dropout: PEFT, which sft trains with, has none on fused experts, such as {experts[0]}",
            kind="conflict",
            key="adapter.dropout",
            fix="set sft.adapter.dropout: 0, or name targets without the experts",
        )
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT only divides it
        use_rslora=settings.scaling == "rslora",
        lora_dropout=settings.dropout,
        target_modules=modules,
        target_parameters=experts or None,
        fan_in_fan_out=bool(modules) and isinstance(backbone.model.get_submodule(modules[0]), Conv1D),
        task_type=TaskType.CAUSAL_LM,
    )

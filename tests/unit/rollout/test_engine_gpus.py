"""Which GPUs an embedded vLLM sees: the trainer's, or several with the trainer's first."""

from __future__ import annotations

import pytest
import torch

from pe_rlhf.config import SamplerConfig
from pe_rlhf.rollout.vllm.embedded import engine_environment
from tests.failures import raises, refuses


@pytest.mark.parametrize(
    ("visible", "index", "gpus", "expected"),
    [
        ("4,5,6", 1, 1, "5"),
        ("4,5,6", 1, 2, "5,6"),
        ("4,5,6", 2, 2, "6,4"),
        ("GPU-a,GPU-b", 0, 2, "GPU-a,GPU-b"),
        ("", 3, 1, "3"),
    ],
)
def test_the_engines_gpus(monkeypatch: pytest.MonkeyPatch, visible: str, index: int, gpus: int, expected: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert engine_environment(torch.device("cuda", index), gpus)["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with raises("conflict", key="tensor_parallel_size"):
        engine_environment(torch.device(device), 3)


@pytest.mark.parametrize(
    "settings", [{"engine": "hf"}, {"engine": "vllm", "mode": "server", "urls": ["http://a:8000"]}]
)
def test_it_is_for_an_embedded_engine(settings: dict[str, object]) -> None:
    with refuses("tensor_parallel_size"):
        SamplerConfig.model_validate({**settings, "tensor_parallel_size": 2})
    assert SamplerConfig(engine="vllm", tensor_parallel_size=2).tensor_parallel_size == 2

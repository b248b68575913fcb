"""Rollouts from a real vLLM server on loopback, and servers that are refused."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from pe_rlhf.adapters.kinds.stacked import stacked
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.rollout.vllm.server import ServerVLLM
from pe_rlhf.system.failures import TrainingError
from reward.errors import InputError
from tests.integration.distributed.launching import run_on_ranks
from tests.integration.rollout.proxy import comes_back, proxy
from tests.integration.rollout.vllm_support import (
    LONGEST,
    MODES,
    PROMPTS,
    Make,
    adapters,
    add_trained,
    config,
    difference,
)
from tests.runs import read_jsonl, recipe, write_jsonl, write_recipe
from tests.tiny import ALL_INITS, tiny_model, train_role

AS_LORA = ("adalora", "additive", "lora_dash", "miss", "spectral_a", "spectral_r", "tinylora")  # kinds that are one

# ---- what it samples from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", MODES)
def test_log_probs_are_the_trainers(make: Make, vllm_server: str, policies: Backbone, sync: str) -> None:
    engine = make(vllm_server, sync=sync)
    for version, init in enumerate([*ALL_INITS, "anchor"]):
        engine.sync(version, init)
        rollout = engine.generate(PROMPTS, seed=1)
        assert rollout.version == version
        assert difference(policies, init, rollout) < 1e-4
        assert difference(policies, "anchor" if init != "anchor" else "lora", rollout) > 1e-2


@pytest.mark.parametrize("sync", MODES)
def test_two_ranks_share_a_server(
    vllm_server: str, vllm_model: Path, tmp_path: Path, model_cache: Path, sync: str
) -> None:
    """What is merged, only rank 0 puts there; then each rank finds its own policy in what it gets."""
    pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")
    rollout = {"engine": "vllm", "mode": "server", "urls": [vllm_server], "sync": sync, "max_new_tokens": 8}
    changes = {"adapter__init": "pissa", "ppo__learning_rate": 0.03, "ppo__steps": 3, "ppo__rollout": rollout}
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(5, 13)])
    path = write_recipe(tmp_path, recipe("ppo", model=str(vllm_model), **changes))
    before = adapters(vllm_server)  # of runs that were killed
    said = run_on_ranks(["run", str(path), "--run-dir=out"], tmp_path, model_cache)
    assert "left out" not in said
    lines = read_jsonl(tmp_path / "out" / "ppo" / "metrics.jsonl")
    assert all(line["logprob_mismatch_max"] < 1e-3 for line in lines)
    assert abs(lines[-1]["kl"]) > 0.1  # the premise: it is not the base any more that they sample from
    assert adapters(vllm_server) == before


@pytest.mark.parametrize("sync", MODES)
def test_two_versions_share_no_cached_prefix(make: Make, vllm_server: str, policies: Backbone, sync: str) -> None:
    before = adapters(vllm_server)
    engine = make(vllm_server, sync=sync)
    prompts = [list(range(2, 42))] * 6
    for version in range(3):
        engine.sync(version, "pissa")
        rollout = engine.generate(prompts, seed=1)
        again = engine.generate(prompts, seed=2)
        assert max(difference(policies, "pissa", r) for r in (rollout, again)) < 1e-4
        train_role(policies, "pissa", steps=1)
        assert difference(policies, "pissa", rollout) > 1e-2
    assert len(set(adapters(vllm_server)) - set(before)) == (1 if sync == "adapter" else 0)
    assert len(list(engine._exchange.folder.iterdir())) == 1


def test_responses_follow_from_the_seed_and_are_spread(make: Make, vllm_server: str) -> None:
    with proxy(vllm_server) as first, proxy(vllm_server) as second:
        single = make(first.url)
        single.sync(0, "lora")
        expected = single.generate(PROMPTS, seed=1)
        both = make(first.url, second.url, batch_size=4)
        both.sync(0, "lora")
        first.completions = second.completions = 0
        assert both.generate(PROMPTS, seed=1).responses == expected.responses
        assert first.completions > 0
        assert second.completions > 0
        assert first.completions + second.completions == len(PROMPTS)
        assert both.generate(PROMPTS[4:8], seed=1, rows=range(4, 8)).responses == expected.responses[4:8]
        assert both.generate(PROMPTS, seed=2).responses != expected.responses


def test_a_server_has_kinds_that_are_a_lora_as_adapters(vllm_model: Path, vllm_server: str, make: Make) -> None:
    backbone = load_backbone(str(vllm_model))
    for kind in AS_LORA:
        add_trained(backbone, kind)
    engine = make(vllm_server, backbone=backbone, role=AS_LORA[0], sync="adapter")
    for version, kind in enumerate(AS_LORA):
        engine.sync(version, kind)
        assert difference(backbone, kind, engine.generate(PROMPTS, seed=1)) < 1e-4, kind


def test_a_later_tasks_policy_is_one_adapter_with_the_earlier_ones(
    vllm_model: Path, vllm_server: str, make: Make
) -> None:
    backbone = load_backbone(str(vllm_model))
    for task, init in (("first", "pissa"), ("second", "lora")):
        backbone.add_adapter(task, init=init, rank=2, alpha=4)
        train_role(backbone, task)
    below = backbone.role_layers("first")
    backbone.load_role("policy", *stacked(backbone.adapter_spec("second"), backbone.role_state("second"), below))
    engine = make(vllm_server, backbone=backbone, role="policy", sync="adapter")
    engine.sync(1, "policy")
    rollout = engine.generate(PROMPTS, seed=1)
    assert difference(backbone, "policy", rollout) < 1e-4
    assert difference(backbone, "second", rollout) > 1e-3


# ---- servers that are refused ---------------------------------------------------------------------------------------


def test_a_server_that_is_not_up_is_waited_for(
    make: Make, vllm_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with proxy(vllm_server) as late:
        late.refuses = True
        comes_back(late, 1.5)
        start = time.monotonic()
        make(late.url)
        assert time.monotonic() - start > 1.4
        assert f"waiting up to 60 s for the vLLM server {late.url}" in capsys.readouterr().err


def test_a_server_that_never_comes_up(make: Make, policies: Backbone) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(TrainingError) as caught:
        make(f"http://127.0.0.1:{port}", start_timeout=1)
    assert (caught.value.kind, caught.value.key) == ("server", "rollout.urls")


def test_another_model_of_the_same_shape_and_name_is_refused(make: Make, vllm_server: str, vllm_model: Path) -> None:
    model = tiny_model("llama", head_dim=32)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(1.05)
    other = load_backbone(model)
    other.add_adapter("pissa", init="pissa", rank=3, alpha=6)
    with pytest.raises(InputError) as caught:
        make(vllm_server, backbone=other)
    assert (caught.value.kind, caught.value.key) == ("mismatch", "rollout.urls")


def test_a_model_with_a_larger_vocabulary_is_refused(make: Make, vllm_server: str) -> None:
    other = load_backbone(tiny_model("llama", head_dim=32, vocab_size=80))
    other.add_adapter("pissa", rank=3, alpha=6)
    with pytest.raises(InputError) as caught:
        make(vllm_server, backbone=other)
    assert (caught.value.kind, caught.value.key) == ("mismatch", "rollout.urls")


def test_a_server_without_room_is_refused(policies: Backbone, vllm_server: str, tmp_path: Path) -> None:
    settings = config(mode="server", urls=[vllm_server])
    with pytest.raises(InputError) as caught:
        ServerVLLM(policies, "pissa", settings, folder=tmp_path, longest_prompt=LONGEST + 1)
    assert (caught.value.kind, caught.value.key) == ("too_long", "rollout.urls")
    assert "61" in (caught.value.fix or "")


def test_something_else_at_that_address(make: Make, tmp_path: Path) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Page)) as url, pytest.raises(InputError) as caught:
        make(url)
    assert (caught.value.kind, caught.value.key) == ("server", "rollout.urls")


@contextmanager
def serving(server: Any) -> Iterator[str]:
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("route", "sync", "option"),
    [("/v1/load_lora_adapter", "adapter", "--enable-lora"), ("/collective_rpc", "merged", "MERGED=1")],
)
def test_a_server_without_the_route(make: Make, vllm_server: str, route: str, sync: str, option: str) -> None:
    with proxy(vllm_server) as bare:
        bare.missing = {route}
        engine = make(bare.url, sync=sync)
        with pytest.raises(InputError) as caught:
            engine.sync(0)
        assert caught.value.kind == "conflict"
        assert option in (caught.value.fix or "")

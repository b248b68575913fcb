"""Two ranks that sample from one server: rank 0 exports and loads the adapter, the other one uses it; with a whole base
on each rank, and with one that ZeRO-3 has split.

The server is the small one of `tests/vllm_routes.py`, which counts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pe_rlhf.model.names import resolve_model
from tests.integration.distributed.launching import run_on_ranks
from tests.integration.distributed.test_ranks import CONFIGURATIONS, write_all_split
from tests.runs import read_jsonl, recipe, write_recipe
from tests.vllm_routes import Engine, served

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

STEPS, LENGTH = 2, 4


@pytest.mark.parametrize("zero", ["zero0", "all_split"])
def test_rank_0_loads_each_version_once(
    tmp_path: Path, model_cache: Path, monkeypatch: pytest.MonkeyPatch, zero: str
) -> None:
    monkeypatch.setenv("PE_RLHF_CACHE", str(model_cache))
    engine = Engine(resolve_model("random:tiny-llama"))
    rollout = {"engine": "vllm", "mode": "server", "max_new_tokens": LENGTH, "start_timeout": 30.0, "timeout": 30.0}
    path = write_recipe(tmp_path, recipe("ppo", ppo__rollout=rollout, ppo__steps=STEPS, ppo__learning_rate=1e-2))
    write_all_split(tmp_path)
    with served(engine) as url:
        settings = [f"ppo.rollout.urls=[{url}]", *CONFIGURATIONS[zero]]
        run_on_ranks(["run", str(path), *settings, "--run-dir=out"], tmp_path, model_cache)
    assert engine.asked["/v1/load_lora_adapter"] == STEPS  # a version a step, whatever the number of ranks
    assert len(engine.folders) == 1
    assert not engine.names  # all of them are unloaded again
    lines = read_jsonl(tmp_path / "out" / "ppo" / "metrics.jsonl")
    assert all(line["logprob_mismatch"] < 1e-4 for line in lines)
    # The responses of both ranks, and rank 0's probes: of the vocabulary before the run, the base, and each version.
    assert engine.asked["/v1/completions"] == STEPS * 4 + 2 + STEPS

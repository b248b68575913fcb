"""`deterministic: true`: torch's strict mode for the length of a run, and what has no kernel in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pe_rlhf.rollout.hf import sample_tokens
from pe_rlhf.stages import pipeline
from pe_rlhf.system.determinism import cumulative, deterministic
from pe_rlhf.system.failures import TrainingError
from tests.runs import read_jsonl, recipe, without_time, write_recipe


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "x")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def test_the_mode_is_strict_within_a_run_and_gone_after_it(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    ppo, init = pipeline.RUN["ppo"], pipeline.init_processes

    def stage(context: Any) -> dict[str, Any]:
        seen.append(
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        )
        return ppo(context)

    def before_cuda(*arguments: Any) -> None:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        init(*arguments)

    monkeypatch.setitem(pipeline.RUN, "ppo", stage)
    monkeypatch.setattr(pipeline, "init_processes", before_cuda)
    path = write_recipe(tmp_path, recipe("ppo"))
    for name, wanted in (("plain", "false"), ("strict", "true")):
        assert cli("run", path, f"deterministic={wanted}", "--run-dir", name).code == 0
    assert seen == [None, (False, False), ":4096:8", (True, False)]
    assert not torch.are_deterministic_algorithms_enabled()
    plain, strict = (
        [without_time(line) for line in read_jsonl(tmp_path / name / "ppo" / "metrics.jsonl")]
        for name in ("plain", "strict")
    )
    assert strict == plain  # on a CPU every run is deterministic


def test_an_operation_without_such_a_kernel_is_named(
    fails: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(
        pipeline.RUN,
        "reward",
        lambda context: torch.zeros(3).put_(torch.tensor([0]), torch.ones(1)),  # type: ignore[dict-item]
    )
    failure = fails("run", write_recipe(tmp_path, recipe("reward", deterministic=True)), "--run-dir", "out", code=3)
    assert isinstance(failure, TrainingError)
    assert (failure.kind, failure.key) == ("conflict", "deterministic")
    assert not torch.are_deterministic_algorithms_enabled()


def test_sampling_needs_no_scan_of_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has no deterministic one on CUDA."""
    probabilities_BV = torch.softmax(3 * torch.randn(64, 1000), dim=-1)
    uniform_B1 = torch.rand(64, 1, dtype=torch.float64)
    expected = sample_tokens(probabilities_BV, uniform_B1)
    values_BN = torch.rand(5, 300, dtype=torch.float64)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")

    monkeypatch.setattr(torch.Tensor, "cumsum", refuse)
    with deterministic(True):
        assert torch.equal(sample_tokens(probabilities_BV, uniform_B1), expected)
        np.testing.assert_allclose(cumulative(values_BN).numpy(), np.cumsum(values_BN.numpy(), axis=1), rtol=1e-13)

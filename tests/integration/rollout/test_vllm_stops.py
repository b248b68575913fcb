"""Stop strings with a real vLLM, embedded and behind a server: the response ends where it does with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from pe_rlhf.model.backbone import Backbone
from pe_rlhf.rollout.interface import RolloutEngine
from tests.integration.rollout.conftest import new_engine
from tests.integration.rollout.vllm_support import ENDS, NEW_TOKENS, PROMPTS, Make, config, difference

STOPS = ["w1", "3 w"]  # within a token, and over two


@contextmanager
def engine_of(kind: str, policies: Backbone, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RolloutEngine]:
    if kind == "server":
        make: Make = request.getfixturevalue("make")
        yield make(request.getfixturevalue("vllm_server"), stop=STOPS)
        return
    with closing(new_engine(policies, config(stop=STOPS), tmp_path)) as engine:
        yield engine


@pytest.mark.parametrize("kind", ["embedded", "server"])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(
    policies: Backbone, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    def holds(ids: list[int]) -> bool:
        return any(stop in policies.tokenizer.decode(ids) for stop in STOPS)

    with engine_of(kind, policies, tmp_path, request) as engine:
        engine.sync(1, "pissa")
        rollout = engine.generate(PROMPTS, seed=1)
    assert difference(policies, "pissa", rollout) < 1e-4
    for ids, logprobs, reason in zip(rollout.responses, rollout.logprobs, rollout.finish, strict=True):
        assert len(ids) == len(logprobs)
        assert not holds(ids[:-1])
        assert not set(ids[:-1]) & set(ENDS)
        assert reason == ("eos" if ids[-1] in ENDS else "stop" if holds(ids) else "length")
        assert reason != "length" or len(ids) == NEW_TOKENS
    assert {"stop", "eos"} <= set(rollout.finish)

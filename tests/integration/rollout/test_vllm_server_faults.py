"""Rollouts from vLLM servers that fail in the middle of a batch, in every way that servers do."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.model.backbone import Backbone
from pe_rlhf.rollout.vllm.http import Server, ServerFault
from pe_rlhf.system.failures import TrainingError
from tests.integration.rollout.proxy import comes_back, proxy
from tests.integration.rollout.vllm_support import MODES, PROMPTS, Make, adapters, difference, post
from tests.loopback import HEAD, QuietHandler, serving


@pytest.fixture
def make(make: Make) -> Make:
    """Engines of short responses: what a server does wrong does not depend on their length, and a LoRA is slow."""
    return partial(make, max_new_tokens=5)


@pytest.mark.parametrize("sync", MODES)
def test_a_server_that_goes_in_the_middle_of_a_batch(make: Make, vllm_server: str, sync: str) -> None:
    """The only one: the batch waits until it is back, and then the server is given the weights again."""
    with proxy(vllm_server) as dying:
        engine = make(dying.url, sync=sync, batch_size=4)
        engine.sync(3)
        expected = engine.generate(PROMPTS, seed=1)

        def die(count: int, answer: Any) -> Any:
            if count != 24:
                return answer
            dying.refuses = True
            comes_back(dying, 1.5)
            return None

        dying.spoil, dying.posts = die, []
        rollout = engine.generate(PROMPTS, seed=1)
        assert rollout.responses == expected.responses
        assert rollout.version == 3
        put = "/v1/load_lora_adapter" if sync == "adapter" else "/collective_rpc"
        assert dying.posts.count(put) == 1
        engine.close()  # while the proxy is there, so that the base is put back


def test_a_server_that_stays_away_is_waited_for_once(make: Make, vllm_server: str) -> None:
    with proxy(vllm_server) as dead:
        engine = make(dead.url, start_timeout=2)
        engine.sync(3)

        def die(count: int, answer: Any) -> Any:
            dead.refuses = True

        dead.spoil = die
        start = time.monotonic()
        with pytest.raises(TrainingError) as caught:
            engine.generate(PROMPTS, seed=1)
        assert caught.value.kind == "server"
        assert time.monotonic() - start < 8


def test_the_others_take_over(make: Make, vllm_server: str) -> None:
    with proxy(vllm_server) as good, proxy(vllm_server) as dying:
        engine = make(good.url, dying.url, batch_size=4)
        engine.sync(3)
        expected = engine.generate(PROMPTS, seed=1)

        def die(count: int, answer: Any) -> Any:
            dying.refuses = True

        dying.spoil = die
        start = time.monotonic()
        assert engine.generate(PROMPTS, seed=1).responses == expected.responses
        assert time.monotonic() - start < 60  # nobody waited for its time-out
        # While it is away the next version goes to the other one; back again, it is given that version, too.
        engine.sync(4, "milora")
        assert engine.generate(PROMPTS, seed=1).version == 4
        dying.refuses, dying.spoil = False, lambda _, answer: answer
        before = dying.completions
        assert engine.generate(PROMPTS, seed=2).version == 4
        assert dying.completions == before + len(PROMPTS) // 2


def test_a_server_that_forgot_the_adapter_gets_it_again(make: Make, vllm_server: str, policies: Backbone) -> None:
    """As one that was started again between two batches."""
    engine = make(vllm_server)
    before = adapters(vllm_server)  # a test whose server was "dead" at its end has left its own
    engine.sync(3)
    (name,) = (adapter for adapter in adapters(vllm_server) if adapter not in before)
    post(f"{vllm_server}/v1/unload_lora_adapter", {"lora_name": name})
    assert difference(policies, "pissa", engine.generate(PROMPTS, seed=1)) < 1e-4


def test_a_server_that_forgot_the_merged_weights_gets_them_again(
    make: Make, vllm_server: str, vllm_model: Path, policies: Backbone
) -> None:
    engine = make(vllm_server, sync="merged")
    engine.sync(3)
    post(f"{vllm_server}/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(vllm_model)}})
    assert difference(policies, "pissa", engine.generate(PROMPTS, seed=1)) < 1e-4


def test_a_server_that_hangs(make: Make, vllm_server: str) -> None:
    with proxy(vllm_server) as good, proxy(vllm_server) as hanging:
        engine = make(good.url, hanging.url, batch_size=4, timeout=4)
        engine.sync(3)
        expected = engine.generate(PROMPTS, seed=1)
        hanging.gate.clear()
        assert engine.generate(PROMPTS, seed=1).responses == expected.responses
    with proxy(vllm_server) as hanging:
        engine = make(hanging.url, batch_size=4, timeout=2)
        engine.sync(3)
        hanging.gate.clear()
        with pytest.raises(TrainingError) as caught:
            engine.generate(PROMPTS, seed=1)
        assert caught.value.kind == "server"


@pytest.mark.parametrize(
    ("first", "count"),
    [(HEAD + b"\r\n\r\n", 100), (HEAD, 100), (HEAD.replace(b"200 OK", b"429 No") + b"\r\n\r\n", 0)],
    ids=["a byte at a time", "a byte of the head at a time", "busy"],
)
def test_an_answer_without_end_and_a_server_that_is_busy_are_faults_that_may_pass(first: bytes, count: int) -> None:
    class Dripping(QuietHandler):
        def do_POST(self) -> None:
            self.drip(first, b" ", count)

    start = time.monotonic()
    with serving(Dripping) as url, pytest.raises(ServerFault):
        asyncio.run(Server(url, timeout=0.5).sample([[5]], [0], {"max_tokens": 2}, "salt", model="m"))
    assert time.monotonic() - start < 8


def cut_logprobs(answer: Any) -> Any:
    answer["choices"][0]["logprobs"]["token_logprobs"].pop()
    return answer


def cut_ids(answer: Any) -> Any:
    """A response that ends without having come to an end."""
    choice = answer["choices"][0]
    choice["token_ids"] = choice["token_ids"][:-1] or [5]
    choice["logprobs"]["token_logprobs"] = [-1.0] * len(choice["token_ids"])
    return answer


def no_prompt(answer: Any) -> Any:
    answer["choices"][0]["prompt_token_ids"] = None
    return answer


def other_model(answer: Any) -> Any:
    return {**answer, "model": "another"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: b"<html>bad gateway</html>",
        lambda _: b'{"choices": []}',
        lambda _: b"[1, 2]",
        cut_logprobs,
        cut_ids,
        other_model,
        no_prompt,
    ],
    ids=["html", "no choice", "a list", "cut log-probs", "cut ids", "another model", "another prompt"],
)
def test_garbage_is_asked_again_and_then_an_error(make: Make, vllm_server: str, spoil: Any) -> None:
    with proxy(vllm_server) as babbling:
        engine = make(babbling.url, batch_size=4)
        engine.sync(3)
        expected = engine.generate(PROMPTS, seed=1)
        first = babbling.completions + 2
        babbling.spoil = lambda count, answer: spoil(answer) if count == first else answer
        assert engine.generate(PROMPTS, seed=1).responses == expected.responses
        babbling.spoil = lambda _, answer: spoil(answer)
        with pytest.raises(TrainingError) as caught:
            engine.generate(PROMPTS, seed=1)
        assert (caught.value.kind, caught.value.key) == ("server", "rollout.urls")


def test_log_probs_that_are_not_finite_stop_the_run(make: Make, vllm_server: str) -> None:
    def nan(_: int, answer: Any) -> Any:
        answer["choices"][0]["logprobs"]["token_logprobs"][0] = float("nan")
        return answer

    with proxy(vllm_server) as broken:
        engine = make(broken.url)
        engine.sync(3)
        broken.spoil = nan
        with pytest.raises(TrainingError) as caught:
            engine.generate(PROMPTS, seed=1)
        assert caught.value.kind == "not_finite"

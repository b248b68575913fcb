"""vLLM servers that cannot work stop a run before its first stage: in a dry run, in one process and on ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.model.names import resolve_model
from reward.errors import Failure
from tests.integration.distributed.launching import start_ranks
from tests.loopback import QuietHandler, serving
from tests.runs import Outcome, Tree, recipe, write_jsonl, write_recipe
from tests.tiny import tiny_model
from tests.vllm_routes import Engine, served

Fails = Callable[..., Failure]
NOBODY = "http://127.0.0.1:9"
KEY = "vllm-secret-31415926"


class Page(QuietHandler):
    """A web page that is no vLLM server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")


@pytest.fixture(scope="module")
def base(model_cache: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PE_RLHF_CACHE", str(model_cache))
        return resolve_model("random:tiny-llama")


@pytest.fixture
def smaller(saved_model: Callable[..., Path], base: str) -> str:
    """A model of the same tokenizer and a smaller vocabulary."""
    from transformers import AutoTokenizer

    path = saved_model(tiny_model("llama", vocab_size=200))
    AutoTokenizer.from_pretrained(base).save_pretrained(path)
    return str(path)


@pytest.fixture
def other_words(saved_model: Callable[..., Path]) -> str:
    """A model of a larger vocabulary, with other words."""
    return str(saved_model(tiny_model("llama", vocab_size=600)))


def tree(section: str, url: str, **settings: Any) -> Tree:
    """A run whose first stage needs no server; a later one has one in that section."""
    whole = recipe("reward", "ppo", "evaluate", **{f"{section}__{key}": value for key, value in settings.items()})
    stage, name = section.split("__")
    whole[stage][name] |= {"engine": "vllm", "mode": "server", "urls": [url], "start_timeout": 0.5, "timeout": 5.0}
    return whole


def refused(fails: Fails, path: Path, kind: str, key: str, code: int = 2) -> None:
    for more in (("--dry-run",), ()):
        failure = fails("run", path, "--run-dir", "run", *more, code=code)
        assert (failure.kind, failure.key) == (kind, key)
        assert KEY not in str(failure)
        assert not (path.parent / "run").exists()


@pytest.mark.parametrize("section", ["ppo__rollout", "evaluate__sampling"])
def test_nobody_at_the_address(fails: Fails, tmp_path: Path, section: str) -> None:
    refused(fails, write_recipe(tmp_path, tree(section, NOBODY)), "server", "rollout.urls", code=3)


def test_the_samples_of_preferences_and_of_the_judge_during_ppo(fails: Fails, tmp_path: Path) -> None:
    served_by = {"engine": "vllm", "mode": "server", "urls": [NOBODY], "start_timeout": 0.5}
    whole = recipe("preferences", "reward", preferences__sampling=served_by)
    refused(fails, write_recipe(tmp_path, whole), "server", "rollout.urls", code=3)
    whole = recipe("ppo", "evaluate", ppo__eval_every=1, evaluate__sampling=served_by)
    failure = fails("run", write_recipe(tmp_path, whole), "--run-dir", "run", "--to", "ppo", code=3)
    assert (failure.kind, failure.key) == ("server", "rollout.urls")


def test_a_dry_run_does_not_wait_and_a_run_does(fails: Fails, cli: Callable[..., Outcome], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tree("ppo__rollout", NOBODY, start_timeout=30.0))
    whole = f"ppo.rollout.start_timeout={4}"
    start = time.monotonic()
    fails("run", path, "--run-dir", "run", "--dry-run", whole, code=3)
    between = time.monotonic()
    fails("run", path, "--run-dir", "run", whole, code=3)
    assert between - start < 4 <= time.monotonic() - between


def test_something_else_at_the_address(fails: Fails, tmp_path: Path) -> None:
    with serving(Page) as url:
        refused(fails, write_recipe(tmp_path, tree("ppo__rollout", url)), "server", "rollout.urls")


@pytest.mark.parametrize("given", [None, "another-key"])
def test_a_key_that_is_missing_or_wrong(
    fails: Fails, tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if given is not None:
        monkeypatch.setenv("VLLM_API_KEY", given)
    with served(Engine(base, key=KEY)) as url:
        refused(fails, write_recipe(tmp_path, tree("ppo__rollout", url)), "server", "VLLM_API_KEY")


def test_a_gate_before_the_server_wants_the_key_at_once(
    fails: Fails, tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it guards the page of its health: it is not waited for."""
    engine = Engine(base)
    engine.faults = lambda route, body, sent: (403, {"message": "no"})
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    start = time.monotonic()
    with served(engine) as url:
        path = write_recipe(tmp_path, tree("ppo__rollout", url))
        failure = fails("run", path, "--run-dir", "run", "ppo.rollout.start_timeout=60")
    assert (failure.kind, failure.key) == ("server", "VLLM_API_KEY")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("key", ["sk-ümlaut-314159", "sk-31415926\nX-Other: 1"])
def test_a_key_that_no_header_can_have(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    failure = fails("run", write_recipe(tmp_path, tree("ppo__rollout", NOBODY)), "--run-dir", "run")
    assert (failure.kind, failure.key) == ("invalid", "VLLM_API_KEY")
    assert "31415" not in str(failure)


@pytest.mark.parametrize("other", ["smaller", "other_words"])
def test_another_model(fails: Fails, tmp_path: Path, request: pytest.FixtureRequest, other: str) -> None:
    with served(Engine(request.getfixturevalue(other))) as url:
        refused(fails, write_recipe(tmp_path, tree("ppo__rollout", url)), "mismatch", "rollout.urls")


def test_no_room_for_a_response(fails: Fails, tmp_path: Path, base: str) -> None:
    with served(Engine(base, length=32)) as url:
        path = write_recipe(tmp_path, tree("ppo__rollout", url, max_new_tokens=32))
        refused(fails, path, "too_long", "rollout.urls")


def test_a_server_that_fails_is_no_server(fails: Fails, tmp_path: Path, base: str) -> None:
    engine = Engine(base)
    engine.faults = lambda route, body, sent: (500, {"message": "no"}) if route == "/v1/completions" else None
    with served(engine) as url:
        refused(fails, write_recipe(tmp_path, tree("ppo__rollout", url)), "server", "rollout.urls", code=3)


def test_the_one_that_fits_is_taken_and_another_name_is_said(
    cli: Callable[..., Outcome], tmp_path: Path, base: str
) -> None:
    with served(Engine(base)) as url:
        outcome = cli("run", write_recipe(tmp_path, tree("ppo__rollout", url)), "--run-dir", "run", "--dry-run")
        assert outcome.code == 0, outcome
        assert f"warning: {url} serves {base}" in outcome.err  # random:tiny-llama, by another name
        whole = {**tree("ppo__rollout", url), "model": base}
        outcome = cli("run", write_recipe(tmp_path, whole), "--run-dir", "run", "--dry-run")
        assert "warning" not in outcome.err


def test_servers_of_what_sft_makes_are_asked_when_it_has_finished(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    whole = {**tree("ppo__rollout", NOBODY), "sft": {"data": "examples.jsonl"}}
    write_jsonl(tmp_path / "examples.jsonl", [{"prompt": "p", "response": "r"}])
    path = write_recipe(tmp_path, whole)
    outcome = cli("run", path, "--run-dir", "run", "--dry-run")
    assert outcome.code == 0, outcome
    outcome = cli("run", path, "--run-dir", "run", "--from", "reward", "--dry-run")
    assert isinstance(outcome.error, Failure)
    assert outcome.error.kind == "unfinished"


def test_on_two_ranks(tmp_path: Path, model_cache: Path) -> None:
    path = write_recipe(tmp_path, tree("ppo__rollout", NOBODY))
    ranks = start_ranks(["run", str(path), "--run-dir=run"], tmp_path, model_cache)
    try:
        said = [rank.finish(code=code) for rank, code in zip(ranks, (3, 3), strict=True)]
    finally:
        for rank in ranks:
            rank.kill()
    assert NOBODY in said[0]
    assert not (tmp_path / "run").exists()

"""Scorers behind HTTP, on loopback: what is sent, what is believed, what is tried again, and our own server."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from pe_rlhf.config.reward_source import ScoreServer as Settings
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.runs.saved_roles import save_role
from pe_rlhf.scoring.remote import RemoteScorer
from pe_rlhf.scoring.reward_judge import reward_scores
from pe_rlhf.scoring.reward_server import Handler, RewardServer
from pe_rlhf.scoring.scorers import AdapterScorer
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.types import Sequences
from reward.errors import Failure
from tests import chat_server
from tests.chat_server import KEY, ChatServer
from tests.failures import raises
from tests.runs import Outcome, Tree, read_jsonl, write_recipe
from tests.runs import recipe as base_recipe
from tests.score_server import ScoreServer, running
from tests.stage_support import byte_model, caches_apart, run, write_prompts
from tests.tiny import perturb

__all__ = ["caches_apart"]

PROMPTS: list[Any] = [f"Prompt {i}" for i in range(7)]
RESPONSES = ["x" * i for i in range(1, 8)]
EOS = 0


def sequences(ended: list[bool]) -> Sequences:
    """One token each, the end token or another one."""
    return Sequences.pack([[5]] * len(ended), [[EOS if end else 7] for end in ended], 0)


def score(server: ScoreServer, **settings: Any) -> list[float]:
    asked = Settings(**{"timeout": 0.5, "attempts": 2, "batch_size": 3} | settings)
    scorer = RemoteScorer(server.url + "/", asked, [EOS])
    columns = {"answer": [str(i) for i in range(7)], "other": list(range(7))}
    return scorer.score(PROMPTS, RESPONSES, sequences([i % 2 == 0 for i in range(7)]), columns).tolist()


def test_rows_go_out_in_batches_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret\n")
    with running(ScoreServer()) as server:
        assert score(server, columns=["answer"], api_key_env="MY_KEY") == [1, 2, 3, 4, 5, 6, 7]
    sent = sorted(server.bodies, key=lambda body: body["prompts"])
    assert [len(body["responses"]) for body in sent] == [3, 3, 1]
    assert [prompt for body in sent for prompt in body["prompts"]] == PROMPTS
    assert [flag for body in sent for flag in body["cut"]] == [False, True, False, True, False, True, False]
    assert [body["columns"] for body in sent] == [{"answer": a} for a in (["0", "1", "2"], ["3", "4", "5"], ["6"])]
    assert set(server.keys) == {"Bearer secret"}


def test_no_key_is_sent_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with running(ScoreServer()) as server:
        score(server)
        with raises("missing", key="ppo.reward.server.api_key_env"):
            score(server, api_key_env="NOT_SET_ANYWHERE")
    assert set(server.keys) == {None}


FAULTS = ["drop", "hang", "drip", "drip head", 500, 503, 429, b"", b"<html>", b"\xff\xfe", b"[" * 99_999]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_be_gone_is_tried_again_and_then_refused(fault: Any) -> None:
    start = time.monotonic()
    with running(ScoreServer(lambda number: fault if number < 1 else None)) as server:
        assert score(server, batch_size=7) == [1, 2, 3, 4, 5, 6, 7]
        assert server.requests == 2
    with running(ScoreServer(lambda number: fault)) as server:
        with raises("server", TrainingError, key="ppo.reward.url") as _:
            score(server, batch_size=7)
        assert server.requests == 2
    assert time.monotonic() - start < 9  # a whole drip takes 10 s


def instead(row: int, value: Any) -> Callable[[int], list[Any]]:
    return lambda count: [value if i == row else 1.0 for i in range(count)]


@pytest.mark.parametrize(
    ("fault", "kind", "row"),
    [
        (instead(2, float("nan")), "not_finite", 3),
        (instead(0, float("inf")), "not_finite", 1),
        (instead(6, 10**400), "not_finite", 7),
        (instead(1, None), "server", 2),
        (instead(1, "0.5"), "server", 2),
        (instead(1, True), "server", 2),
        (instead(1, [0.5]), "server", 2),
        (lambda count: [1.0] * (count - 1), "server", None),
        (lambda count: [1.0] * (count + 1), "server", None),
        (lambda count: [], "server", None),
        (lambda count: 1.0, "server", None),
        (b"{}", "server", None),
        (b"[1, 2, 3]", "server", None),
        (b"null", "server", None),
        (404, "server", None),
        (401, "server", None),
        (302, "server", None),
    ],
)
def test_what_is_wrong_is_refused_at_once(fault: Any, kind: Any, row: int | None) -> None:
    with running(ScoreServer(lambda number: fault)) as server:
        with raises(kind, TrainingError, key="ppo.reward.url", row=row):
            score(server, batch_size=7)
        assert server.requests == 1


def test_a_row_is_counted_over_all_batches() -> None:
    def fault(number: int) -> Any:
        return None

    with running(ScoreServer(fault)) as server:
        server.faults = lambda number: instead(1, None) if server.bodies[number]["prompts"][0] == "Prompt 3" else None
        with raises("server", TrainingError, row=5):
            score(server, concurrency=1)


def test_nobody_at_the_address() -> None:
    with running(ScoreServer()) as server:
        scorer = RemoteScorer(server.url, Settings(attempts=2), [EOS])
        scorer.check_server()  # it has no page of its health, but it answers
    with raises("server", TrainingError, key="ppo.reward.url"):
        scorer.check_server()


# ---- in a run --------------------------------------------------------------------------------------------------------


def recipe(folder: Path, source: Tree) -> Tree:
    model = byte_model(folder / "model", pad_is_eos=True, initializer_range=0.3, eos_token_id=list(range(0, 258, 12)))
    ppo = {
        "prompts": write_prompts(folder / "prompts.jsonl", PROMPTS),
        "reward": [source],
        "rollout": {"max_new_tokens": 8},
        "steps": 4,
        "batch_size": 6,
        "learning_rate": 1e-2,
        "checkpoint_every": 1,
    }
    return {"model": str(model), "adapter": {"rank": 2, "alpha": 4}, "threads": 1, "ppo": ppo}


def figures(run_dir: Path) -> list[Tree]:
    lines = read_jsonl(run_dir / "ppo" / "metrics.jsonl")
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def test_a_run_that_loses_its_server_goes_on_from_the_last_step(tmp_path: Path) -> None:
    """The numbers are those of the same scores from a function in this process."""
    from pe_rlhf.config import Recipe
    from pe_rlhf.stages.pipeline import run_recipe

    run(recipe(tmp_path, {"function": "reward.scores:length"}), tmp_path / "here")
    with running(ScoreServer(lambda number: 500 if number >= 2 else None)) as server:
        tree = recipe(tmp_path, {"url": server.url, "server": {"attempts": 1}})
        with raises("server", TrainingError, key="ppo.reward.url", step=3):
            run(tree, tmp_path / "there")
        server.faults = lambda number: None
        run_recipe(Recipe.model_validate(tree), tmp_path / "there", ["ppo"], "resume")
    assert figures(tmp_path / "there") == figures(tmp_path / "here")
    assert len(figures(tmp_path / "here")) == 4


NOBODY = "http://127.0.0.1:9"
ABSENT = {"kind": "llm:m", "base_url": f"{NOBODY}/v1", "attempts": 1}


@pytest.mark.parametrize(
    ("ppo", "evaluate", "kind", "key"),
    [
        ({"reward": [{"url": NOBODY, "server": {"attempts": 1}}]}, None, "server", "ppo.reward.url"),
        ({"reward": [{"url": NOBODY, "server": {"api_key_env": "ABSENT_KEY"}}]}, None, "missing", None),
        ({"reward": [{"judge": ABSENT}]}, None, "server", "judge.base_url"),
        ({}, ABSENT, "server", "judge.base_url"),
        ({}, {"kind": "jury", "members": ["length", ABSENT]}, "server", "judge.base_url"),
    ],
    ids=["scorer", "key of the scorer", "judge that rewards", "judge", "one of a jury"],
)
def test_a_server_that_cannot_work_stops_the_run_before_its_first_stage(
    tmp_path: Path, fails: Callable[..., Failure], ppo: Tree, evaluate: Tree | None, kind: str, key: str | None
) -> None:
    """In a dry run, too."""
    tree = base_recipe("reward", "ppo", "evaluate")
    tree["ppo"] |= ppo
    tree["evaluate"] |= {"judge": evaluate or "length"}
    path = write_recipe(tmp_path, tree)
    for more in ((), ("--dry-run",)):
        failure = fails("run", path, "--run-dir", "run", *more, code=2 if kind == "missing" else 3)
        assert failure.kind == kind
        assert key in (None, failure.key)
        assert not (tmp_path / "run").exists()


def test_keys_are_in_no_file(cli: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages, logs, trackers and failures included, where servers quote the key."""
    scorer_key = "scorer-secret-98765"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("SCORER_KEY", scorer_key)
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    said = ""
    with running(ScoreServer()) as scorer, chat_server.running(ChatServer(text="no answer", logprobs=0)) as judge:
        tree = base_recipe("ppo", "evaluate", tracking__tensorboard=True)
        server = {"api_key_env": "SCORER_KEY", "attempts": 1}
        tree["ppo"]["reward"] = [{"url": scorer.url, "server": server}]
        tree["evaluate"]["judge"] = {"kind": "llm:m", "base_url": judge.url, "attempts": 1}
        path = write_recipe(tmp_path, tree)
        quoting = f"Incorrect key: Bearer {scorer_key}".encode()
        for run_dir, fault, faults in (
            ("whole", None, lambda number: None),
            ("scorer", quoting, lambda number: None),
            ("judge", None, lambda number: "500"),  # which quotes it, too
        ):
            scorer.faults, judge.faults = (lambda number, fault=fault: fault), faults
            judge.text = "A" if run_dir == "whole" else None
            outcome = cli("run", path, "--run-dir", run_dir)
            assert outcome.code == (0 if run_dir == "whole" else 3), outcome
            assert (tmp_path / run_dir / "failure.json").exists() is (run_dir != "whole")
            said += outcome.out + outcome.err
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"report.html", "failure.json", "metrics.jsonl"} < {file.name for file in files}
    assert any("tfevents" in file.name for file in files)
    for key in (KEY, scorer_key):
        assert [file for file in files if key.encode() in file.read_bytes()] == []
        assert key not in said


# ---- our own server --------------------------------------------------------------------------------------------------


@contextmanager
def serving(score: Any, batch_size: int = 64, key: str | None = None) -> Iterator[RewardServer]:
    server = RewardServer(("127.0.0.1", 0), "runs/mine", score, batch_size, key)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_served_run_scores_as_its_adapter_does(tmp_path: Path) -> None:
    trained = load_backbone(byte_model(tmp_path / "model", pad_is_eos=True, initializer_range=0.1))
    trained.add_adapter("reward", rank=2)
    perturb(trained, "reward", 0.2)
    save_role(trained, "reward", tmp_path / "trained")
    encode = trained.tokenizer
    prompts: list[Any] = ["How are you?", "x", "Tell me a longer story, please."]
    responses = [" fine", " a rather long answer, and then some more", " y"]
    for ended in ([True, True, True], [False, True, False]):
        ids = [encode(text)["input_ids"] + [0] * end for text, end in zip(responses, ended, strict=True)]
        tokens = Sequences.pack([encode(text)["input_ids"] for text in prompts], ids, 0)
        expected = AdapterScorer(trained, "reward", 1000).score(prompts, responses, tokens)
        with serving(reward_scores(str(tmp_path / "trained"))) as server:
            found = RemoteScorer(server.url, Settings(batch_size=2), [0]).score(prompts, responses, tokens)
            assert httpx.get(f"{server.url}/health").json() == {
                "status": "ok",
                "model": "runs/mine",
                "requests": 2,
                "responses": 3,
                "failures": 0,
            }
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert expected.std() > 0.01


def test_who_has_no_key_is_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompts": ["p"], "responses": ["x"]}
    with serving(lambda prompts, responses, cut: [1.0] * len(responses), key="s3cret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            assert httpx.post(f"{server.url}/score", json=body, headers=headers).status_code == 401
        assert httpx.get(f"{server.url}/health").json()["responses"] == 0
        monkeypatch.setenv("REWARD_KEY", "s3cret")
        scorer = RemoteScorer(server.url, Settings(api_key_env="REWARD_KEY"), [0])
        assert scorer.score(["p"], ["x"], Sequences.pack([[1]], [[2, 0]], 0)).tolist() == [1.0]


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--host", "::"], ["--api-key-env", "NO_SUCH_KEY"]])
def test_an_open_server_needs_a_key(cli: Callable[..., Outcome], arguments: list[str]) -> None:
    refused = cli("serve-reward", "runs/none", *arguments)
    assert (refused.code, getattr(refused.error, "key", None)) == (2, "--api-key-env")


def test_requests_that_wait_are_scored_together_and_answered_apart() -> None:
    """While one is scored, the others come: they are one call, and the one that fails fails only itself."""
    calls: list[int] = []
    started, go_on = threading.Event(), threading.Event()

    def score(prompts: Any, responses: Any, cut: Any) -> list[float]:
        calls.append(len(responses))
        started.set()
        assert go_on.wait(10)
        if "bad" in responses:
            raise ValueError("a response that the model cannot read")
        return [float(len(response)) for response in responses]

    with serving(score) as server, ThreadPoolExecutor(5) as pool:

        def ask(*responses: str) -> httpx.Response:
            body = {"prompts": ["p"] * len(responses), "responses": list(responses)}
            return httpx.post(f"{server.url}/score", json=body, timeout=20)

        first = pool.submit(ask, "a")
        assert started.wait(10)
        others = [pool.submit(ask, *texts) for texts in (("bb", "ccc"), ("dddd",), ("bad", "e"))]
        while server.batcher._waiting.qsize() < 3:
            pass
        go_on.set()
        assert first.result().json() == {"scores": [1.0]}
        answers = [other.result() for other in others]
    assert [answer.status_code for answer in answers] == [200, 200, 500]
    assert [answer.json().get("scores") for answer in answers] == [[2.0, 3.0], [4.0], None]
    assert calls[:2] == [1, 5]
    assert sorted(calls[2:]) == [1, 2, 2]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"{}", 400),
        (b'{"prompts": ["a"], "responses": []}', 400),
        (b'{"prompts": ["a"], "responses": [1]}', 400),
        (b'{"prompts": [""], "responses": ["x"]}', 400),
        (b'{"prompts": [5], "responses": ["x"]}', 400),
        (b'{"prompts": ["a"], "responses": ["x"], "cut": ["no"]}', 400),
        (b'{"prompts": ["a"], "responses": ["x"], "cut": [true, true]}', 400),
        (b'{"prompts": [], "responses": []}', 200),
        (b'{"prompts": [[{"role": "user", "content": "hi"}]], "responses": ["x"], "cut": null}', 200),
    ],
)
def test_a_request_that_is_wrong_is_refused_and_the_server_goes_on(body: bytes, status: int) -> None:
    with serving(lambda prompts, responses, cut: [0.5] * len(responses)) as server:
        answer = httpx.post(f"{server.url}/score", content=body)
        assert answer.status_code == status
        assert ("scores" if status == 200 else "error") in answer.json()
        assert httpx.post(f"{server.url}/elsewhere", content=body).status_code == 404
        assert httpx.get(f"{server.url}/elsewhere").status_code == 404
        good = httpx.post(f"{server.url}/score", content=json.dumps({"prompts": ["a"], "responses": ["b"]}).encode())
        assert good.json() == {"scores": [0.5]}


@pytest.mark.parametrize("start", [b"POST /score HT", b"POST /score HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"])
def test_a_request_that_drips_in_is_bounded_as_a_whole(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte each tenth of the time that a request has: no single wait is too long."""
    monkeypatch.setattr(Handler, "timeout", 1.0)
    with serving(lambda prompts, responses, cut: [0.0] * len(prompts)) as server:
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=0.1) as client:
            client.sendall(start)
            began, answer = time.monotonic(), b""
            while time.monotonic() - began < 5:
                try:
                    if not (part := client.recv(1000)):
                        break
                    answer += part
                except TimeoutError:
                    client.sendall(b"x")
            waited = time.monotonic() - began
        assert 0.5 < waited < 4
        assert answer.startswith(b"HTTP/1.1 408") or b"Content" not in start
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_score_that_is_not_finite_is_an_error_of_the_server() -> None:
    with serving(lambda prompts, responses, cut: [float("nan")] * len(responses)) as server:
        answer = httpx.post(f"{server.url}/score", json={"prompts": ["a"], "responses": ["b"]})
    assert answer.status_code == 500
    assert "scores" not in answer.json()

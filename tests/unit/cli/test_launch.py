"""`pe-rlhf launch` and the files of `launch/`: the very commands, and scripts that a shell checker is content with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pe_rlhf.config.load import load_deepspeed_config
from reward.errors import InputError
from tests.paths import ROOT
from tests.runs import Outcome, recipe, write_recipe

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sbatch"), *LAUNCH.glob("*.sh")])

Cli = Callable[..., Outcome]
START = f"{sys.executable} -m deepspeed.launcher.runner --master_port=29500"


def test_one_node(cli: Cli, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    options = ["--num-procs", "8", "--dry-run", "--", "--resume", "--run-dir", "out"]
    outcome = cli("launch", path, "deepspeed=zero2", *options)
    run = f"--no_local_rank --module pe_rlhf run {path} deepspeed=zero2 --resume --run-dir out"
    assert (outcome.code, outcome.out) == (0, f"{START} --num_accelerators=8 {run}\n")


def test_a_folder_with_an_equals_sign_is_no_override(cli: Cli, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    outcome = cli("launch", path, "--dry-run", "--", "--run-dir", "runs/beta=0.1")
    assert outcome.code == 0, outcome
    assert outcome.out.endswith("--run-dir runs/beta=0.1\n")


def test_four_nodes_by_ssh(cli: Cli, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    (tmp_path / "hosts").write_text("".join(f"node-{i} slots=8\n" for i in range(4)))
    outcome = cli("launch", path, "--hostfile", "hosts", "--master-addr", "node-0", "--dry-run")
    assert outcome.code == 0
    run = f"--no_local_rank --module pe_rlhf run {path}"
    assert outcome.out == f"{START} --master_addr=node-0 --hostfile=hosts {run}\n"
    fewer = cli("launch", path, "--hostfile", "hosts", "--num-procs", "4", "--dry-run")
    assert fewer.out == f"{START} --hostfile=hosts --num_accelerators=4 {run}\n"


@pytest.mark.parametrize("node", [0, 3])
def test_four_nodes_without_ssh(cli: Cli, tmp_path: Path, node: int) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    nodes = ["--num-nodes", "4", "--node-rank", str(node), "--master-addr", "10.0.0.1", "--num-procs", "8"]
    outcome = cli("launch", path, *nodes, "--dry-run")
    assert outcome.code == 0
    words = outcome.out.split()
    (hosts,) = [Path(word.removeprefix("--hostfile=")) for word in words if word.startswith("--hostfile=")]
    assert hosts.read_text() == "".join(f"node-{i} slots=8\n" for i in range(4))
    assert [word for word in words if "hostfile" not in word] == [
        *f"{START} --master_addr=10.0.0.1 --num_accelerators=8 --no_ssh --node_rank={node}".split(),
        *f"--no_local_rank --module pe_rlhf run {path}".split(),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--node-rank", "0"], "--node-rank needs --num-nodes or --hostfile"),
        (["--num-nodes", "2"], "--num-nodes needs --node-rank and --master-addr"),
        (["--num-nodes", "2", "--node-rank", "2", "--master-addr", "a"], "--node-rank 2 is not below --num-nodes 2"),
        (["ppo.stepz=3"], "unknown key 'ppo.stepz'"),
        (["deepspeed=zero7"], "deepspeed: there is no 'zero7'; there are zero0, zero1, zero2, zero3, zero3_offload"),
    ],
)
def test_mistakes_are_told_before_anything_is_started(
    refused: Callable[..., str], tmp_path: Path, options: list[str], message: str
) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    assert message in refused("launch", path, *options)


@pytest.mark.parametrize("stage", range(4))
def test_configurations(stage: int) -> None:
    assert load_deepspeed_config(f"zero{stage}")["zero_optimization"]["stage"] == stage


def test_a_configuration_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"comment": "mine", "zero_optimization": {"stage": 1}}')
    assert load_deepspeed_config(str(path)) == {"zero_optimization": {"stage": 1}}
    for content in ("{", "[1]"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"mine\.json"):
            load_deepspeed_config(str(path))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([checker, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        ("slurm_one_gpu", {}, "pe-rlhf run my.yaml a=1 --run-dir runs/my-7 --resume"),
        (
            "slurm_one_node",
            {"SLURM_GPUS_ON_NODE": "8"},
            "pe-rlhf launch my.yaml a=1 --num-procs 8 -- --run-dir runs/my-7 --resume",
        ),
        (
            "slurm_many_nodes",
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_NNODES": "4", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "n[1-4]"},
            "pe-rlhf launch my.yaml a=1 --num-procs 8 --num-nodes 4 --node-rank 2 --master-addr n1 --"
            " --run-dir runs/my-7 --resume",
        ),
    ],
)
def test_what_a_slurm_job_runs(tmp_path: Path, script: str, variables: dict[str, str], expected: str) -> None:
    """`srun` runs what it is given, here and once; `pe-rlhf` says how it was called."""
    commands = {"srun": 'exec "$@"', "pe-rlhf": 'echo "pe-rlhf $*"', "scontrol": "printf 'n1\\nn2\\nn3\\nn4\\n'"}
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **variables}
    command = ["bash", str(LAUNCH / f"{script}.sbatch"), "my.yaml", "a=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr


def test_a_sweep_takes_its_line(tmp_path: Path) -> None:
    (tmp_path / "sweep.txt").write_text("adapter.init=lora seed=1\nadapter.init=pissa seed=1\n")
    (tmp_path / "srun").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    variables = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(LAUNCH / "slurm_array.sbatch"), "my.yaml", str(tmp_path / "sweep.txt")]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.stdout == "pe-rlhf run my.yaml adapter.init=pissa seed=1 --run-dir runs/my-9/2 --resume\n", done.stderr

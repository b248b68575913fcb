"""The files of `launch/`: scripts that a shell checker is content with, and the commands that they run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sbatch"), *LAUNCH.glob("*.sh")])


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
            "pe-rlhf launch my.yaml a=1 --num-procs 8 --run-dir runs/my-7 --resume",
        ),
        (
            "slurm_many_nodes",
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_NNODES": "4", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "n[1-4]"},
            "pe-rlhf launch my.yaml a=1 --num-procs 8 --num-nodes 4 --node-rank 2 --master-addr n1"
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


@pytest.mark.parametrize(
    ("host", "key", "starts"),
    [
        (None, None, True),
        ("localhost", None, True),
        ("0.0.0.0", None, False),
        ("gpu1", "", False),
        ("0.0.0.0", "k", True),
    ],
)
def test_a_server_for_other_machines_wants_a_key(host: str | None, key: str | None, starts: bool) -> None:
    own = {name: value for name, value in (("HOST", host), ("VLLM_API_KEY", key)) if value is not None}
    rest = {name: value for name, value in os.environ.items() if name not in ("HOST", "VLLM_API_KEY")}
    script = [str(LAUNCH / "vllm_server.sh"), "model", "8000"]
    done = subprocess.run(script, env={**rest, **own, "PYTHON": "echo"}, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is starts
    assert (f"--host {host or '127.0.0.1'} " in done.stdout) is starts
    assert starts or "VLLM_API_KEY" in done.stderr

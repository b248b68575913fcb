"""Comparisons on a SLURM cluster, with a stand-in for `sbatch`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.comparison.sweeps import comparison, results
from tests.paths import ROOT
from tests.runs import Outcome


class TestSlurm:
    """A stand-in for `sbatch` notes what it is given and numbers its jobs; then what it noted is run as it would be."""

    @staticmethod
    def cluster(folder: Path) -> Path:
        tools = folder / "tools"
        tools.mkdir()
        (tools / "sbatch").write_text(
            f'#!/bin/bash\nprintf "%q " "$@" >> {folder}/jobs; echo >> {folder}/jobs\n'
            f"echo $((100 + $(wc -l < {folder}/jobs)))\n"
        )
        (tools / "srun").write_text('#!/bin/bash\nexec "$@"\n')
        (tools / "pe-rlhf").write_text(f'#!/bin/bash\nexec {sys.executable} -m pe_rlhf "$@"\n')
        for tool in tools.iterdir():
            tool.chmod(0o755)
        return tools

    def test_jobs_wait_for_each_other_and_do_the_whole(
        self, tmp_path: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tools = self.cluster(tmp_path)
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        path = comparison(tmp_path, compare={"grid": {"rank": [2]}, "nodes": 3})
        done = cli("compare", path, "ppo.steps=1", "--dir", "out", "--submit", "slurm")
        assert done.code == 0, done.err
        lines = [shlex.split(line) for line in (tmp_path / "jobs").read_text().splitlines()]
        waits = [next((a for a in line if a.startswith("--dependency")), None) for line in lines]
        assert waits == [None, "--dependency=afterok:101", "--dependency=afterany:102"]
        arrays = [next((a for a in line if a.startswith("--array")), None) for line in lines]
        assert arrays == [None, "--array=1-1%3", None]
        for line, array in zip(lines, arrays, strict=True):
            script = next(i for i, word in enumerate(line) if word.endswith(".sbatch"))
            for task in range(1, int(array.split("-")[-1][0]) + 1) if array else (1,):
                job = subprocess.run(
                    ["bash", *line[script:]],
                    cwd=tmp_path,
                    env=os.environ | ({"SLURM_ARRAY_TASK_ID": str(task)} if array else {}),
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert job.returncode == 0, job.stderr
        assert [row["status"] for row in results(tmp_path / "out")] == ["finished"]

    def test_print_shows_commands_that_a_shell_can_run(self, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
        tools = self.cluster(tmp_path)
        path = comparison(tmp_path, compare__tune={"lr_factors": [1.0, 2.0]}, compare__seeds=[1, 2, 3])
        done = cli("compare", path, "--dir", "out", "--submit", "print")
        assert done.code == 0, done.err
        assert not (tmp_path / "jobs").exists()
        subprocess.run(["bash", "-euc", done.out], env={"PATH": f"{tools}:{os.environ['PATH']}"}, check=True)
        lines = [shlex.split(line) for line in (tmp_path / "jobs").read_text().splitlines()]
        assert [next((a for a in line if a.startswith("--dependency")), None) for line in lines] == [
            None,
            "--dependency=afterok:101",
            "--dependency=afterany:102",
            "--dependency=afterany:103",
        ]
        assert [next((a for a in line if a.startswith("--array")), None) for line in lines] == [
            None,
            "--array=1-4%8",
            "--array=1-6%8",
            None,
        ]

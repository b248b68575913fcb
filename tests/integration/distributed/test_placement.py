"""Ranks that are really started see the GPUs of CUDA_VISIBLE_DEVICES and no others; no GPU is needed for that."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pe_rlhf.cli.ranks import Placement, launcher_command
from tests.integration.distributed.launching import environment

SHOWS = """
import json, os, pathlib
names = "CUDA_VISIBLE_DEVICES", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"
pathlib.Path(f"rank-{os.environ['RANK']}.json").write_text(json.dumps([os.environ.get(name) for name in names]))
"""


@pytest.mark.parametrize(("mask", "seen"), [("5,2,7", "5,2"), ("GPU-8932f937,GPU-11aa", "GPU-8932f937,GPU-11aa")])
def test_the_environment_of_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str, seen: str) -> None:
    (tmp_path / "shows.py").write_text(SHOWS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    command = launcher_command(Placement({"here": 2}, None, None, None, None, 2))
    port = command[4].removeprefix("--master_port=")
    subprocess.run([*command, "--no_local_rank", "shows.py"], cwd=tmp_path, env=environment(tmp_path), check=True)
    for rank in ("0", "1"):
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text()) == [seen, rank, rank, "2", port]

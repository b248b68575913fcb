"""A process that is killed while it saves leaves a whole checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from pe_rlhf.runs.checkpoint import load_checkpoint
from tests.paths import ROOT

# Forked after the slow imports; a megabyte, so that most of the time goes into writing it.
SAVES_UNTIL_IT_IS_KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
from pe_rlhf.runs.checkpoint import save_checkpoint

for trial in range(int(sys.argv[2])):
    folder = Path(sys.argv[1]) / str(trial)
    folder.mkdir()
    child = os.fork()
    if child == 0:
        step = 0
        while True:
            step += 1
            save_checkpoint(folder, step, {"a": torch.full((250_000,), float(step))}, {"beta": step / 7})
            (folder / "done").write_text(str(step))
    while not (folder / "done").exists():
        time.sleep(0.001)
    time.sleep(0.013 + 0.0037 * trial)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_killed_at_any_moment_there_is_a_whole_checkpoint(tmp_path: Path) -> None:
    trials = 12
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SAVES_UNTIL_IT_IS_KILLED, str(tmp_path), str(trials)]
    subprocess.run(command, env=environment, check=True)
    for trial in range(trials):
        loaded = load_checkpoint(tmp_path / str(trial))
        assert loaded is not None
        step, loaded_tensors, state = loaded
        assert torch.equal(loaded_tensors["a"], torch.full((250_000,), float(step)))
        assert state == {"step": step, "beta": step / 7}
        # `done` is emptied before it is written: a kill in between leaves no number.
        done = (tmp_path / str(trial) / "done").read_text()
        assert done == "" or int(done) <= step <= int(done) + 1

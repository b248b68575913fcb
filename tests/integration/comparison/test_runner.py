"""How `compare` takes the end of a run's process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from pe_rlhf.comparison.runner import run_all, state_of
from pe_rlhf.system.files import locked
from tests.runs import Outcome, write_recipe
from tests.unit.comparison.test_runner import planned

ENDS = """
import os
import signal

def killed(prompts, responses):
    os.kill(os.getpid(), signal.SIGKILL)

def without_a_word(prompts, responses):
    os._exit(7)
"""


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    folder.mkdir()
    with locked(folder):
        yield


@pytest.mark.parametrize(
    ("function", "state", "said"),
    [
        ("ends:killed", ("failed", "process", -9), "SIGKILL"),
        ("ends:without_a_word", ("failed", "process", 7), "exit code 7"),
        ("reward.scores:length", ("unfinished", None, None), "in use"),
    ],
)
def test_the_end_of_a_process(
    tmp_path: Path,
    cli: Callable[..., Outcome],
    capsys: pytest.CaptureFixture[str],
    function: str,
    state: tuple[str, str | None, int | None],
    said: str,
) -> None:
    (tmp_path / "ends.py").write_text(ENDS)
    run = planned(tmp_path, ppo__reward=[{"function": function}])
    write_recipe(tmp_path, "")  # and the data that the run names
    with in_use(run.folder) if said == "in use" else nullcontext():
        run_all([run], retry=False)
    found = state_of(run)
    assert (found.status, found.kind) == state[:2]
    note = run.folder / "failure.json"
    assert (json.loads(note.read_text())["exit_code"] if note.exists() else None) == state[2]
    assert said in capsys.readouterr().err

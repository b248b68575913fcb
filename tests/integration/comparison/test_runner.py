"""How `compare` takes the end of a run's process."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from pe_rlhf.comparison import runner
from pe_rlhf.comparison.runner import run_all, state_of
from tests.unit.comparison.test_runner import planned


@pytest.mark.parametrize(
    ("script", "state", "said"),
    [
        (f"import os; os.kill(os.getpid(), {signal.SIGKILL:d})", ("failed", "process", -9), "SIGKILL"),
        ("raise SystemExit(75)", ("unfinished", None, None), "in use"),
        ("raise SystemExit(7)", ("failed", "process", 7), "exit code 7"),
    ],
    ids=["killed", "in use", "died without a word"],
)
def test_the_end_of_a_process(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    state: tuple[str, str | None, int | None],
    said: str,
) -> None:
    """A real process ends; only what it does until then is another thing than a run."""
    run, call = planned(tmp_path), runner._call
    monkeypatch.setattr(runner, "_call", lambda command, log: call([sys.executable, "-c", script], log))
    run_all([run], retry=False)
    found = state_of(run)
    assert (found.status, found.kind) == state[:2]
    note = run.folder / "failure.json"
    assert (json.loads(note.read_text())["exit_code"] if note.exists() else None) == state[2]
    assert said in capsys.readouterr().err

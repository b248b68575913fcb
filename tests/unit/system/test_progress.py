"""Progress of long steps: plain lines in a file, a bar in a terminal."""

import io
import re

import pytest
from rich.console import Console

from pe_rlhf.system import progress as module
from pe_rlhf.system.progress import progress, say

LINE = re.compile(r"ppo: (\d+)/10, \d+\.\d steps/s, (\d+) s left")


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    with progress("ppo", 10, "steps") as advance:
        for _ in range(5):
            advance(2)
    said = capsys.readouterr()
    assert said.out == ""  # results go there
    matches = [LINE.fullmatch(line) for line in said.err.splitlines()]
    assert [match and match[1] for match in matches] == ["2", "4", "6", "8", "10"]
    assert matches[-1] is not None
    assert matches[-1][2] == "0"


def test_a_short_step_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("ppo", 10, "steps") as advance:
        for _ in range(10):
            advance(1)
    with progress("ppo", 0, "steps"):  # a stage that is resumed at its end
        pass
    assert capsys.readouterr().err == ""


def test_a_step_that_said_something_says_its_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([100.0, 110.0, 116.0, 117.0, 120.0])  # its start, then one for each call
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    with progress("ppo", 10, "steps") as advance:
        for _ in range(3):
            advance(2)
        advance(4)
    # 4 of 10 in 16 s: a quarter per second, 24 s for the other 6. Then 10 of 10 in 20 s.
    assert capsys.readouterr().err.splitlines() == [
        "ppo: 4/10, 0.2 steps/s, 24 s left",
        "ppo: 10/10, 0.5 steps/s, 0 s left",
    ]


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(module, "console", terminal)
    with progress("ppo", 10, "steps") as advance:
        for _ in range(10):
            advance(1)
    assert isinstance(terminal.file, io.StringIO)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.file.getvalue())
    assert "ppo" in drawn
    assert "10/10" in drawn
    assert re.search(r"\d+\.\d steps/s", drawn)


def test_the_bar_goes_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(module, "console", terminal)
    with pytest.raises(RuntimeError, match="inside"), progress("ppo", 10, "steps"):
        raise RuntimeError("inside")
    with progress("ppo", 1, "steps") as advance:  # a second bar would be refused while the first is alive
        advance(1)


def test_a_message_is_said_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    message = f"[bold]not markup[/bold] {'long ' * 60}ends"
    say(message)
    assert capsys.readouterr().err == message + "\n"

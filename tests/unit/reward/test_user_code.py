"""Whatever a user's function does is one failure that names it; nothing of it ends the process, or holds it forever."""

from __future__ import annotations

import io
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reward.errors import InputError, JudgeError
from reward.judges import Comparison, load_function, load_judge, load_score_function, score_responses
from reward.judges.user_code import LIMIT_VARIABLE, call_users_code, time_limit
from tests.failures import raises


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a user's module and load a name of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def write(text: str, load: Any = load_function, name: str = "f") -> Any:
        (tmp_path / "mine.py").write_text(text)
        return load(f"mine:{name}")

    return write


def score(function: Any, in_thread: bool) -> list[float]:
    if not in_thread:
        return score_responses(function, ["p"], ["r"])
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(score_responses, function, ["p"], ["r"]).result()


CALLS = {
    "exit 0": "import sys\ndef f(p, r):\n    sys.exit(0)",
    "exit": "def f(p, r):\n\n    raise SystemExit",
    "quit": "def f(p, r):\n\n    raise SystemExit('done')",
    "base exception": "class Mine(BaseException): pass\ndef f(p, r):\n    raise Mine('x')",
    "generator exit": "def f(p, r):\n\n    raise GeneratorExit",
    "no message": "class Mine(Exception):\n    def __str__(self): raise ValueError\ndef f(p, r): raise Mine",
    "recursion": "def f(p, r):\n    return f(p, r)\n",
    "stop": "def f(p, r):\n\n    raise StopIteration",
}


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("text", CALLS.values(), ids=CALLS)
def test_what_a_call_raises(module: Any, tmp_path: Path, text: str, in_thread: bool) -> None:
    function = module(text)
    with raises("user_code", file=tmp_path / "mine.py"):
        score(function, in_thread)


@pytest.mark.parametrize("text", ["import sys\nsys.exit(0)", "raise BaseException", "exit()", "import os\nx = 1 / 0"])
def test_what_an_import_raises(module: Any, tmp_path: Path, text: str) -> None:
    with raises("user_code", file=tmp_path / "mine.py"):
        module(text)


RESULTS = {
    "bytes": "b'12'",
    "text": "'12'",
    "set": "{1.0, 2.0}",
    "map": "{0: 1.0, 1: 2.0}",
    "generator": "(1.0 for _ in r)",
    "none": "None",
    "complex": "[1j, 2j]",
    "nested": "[[1.0], [2.0]]",
    "too many": "[1.0] * 3",
    "too few": "[1.0]",
    "objects": "[object(), object()]",
    "texts": "['1', '2']",
}


@pytest.mark.parametrize("returned", RESULTS.values(), ids=RESULTS)
def test_results_of_another_form(module: Any, tmp_path: Path, returned: str) -> None:
    function = module(f"def f(p, r):\n    return {returned}")
    with raises("user_code", file=tmp_path / "mine.py"):
        score_responses(function, ["p", "p"], ["r", "s"])


@pytest.mark.parametrize("number", ["10**400", "10**6000", "float('nan')", "-float('inf')"])
def test_numbers_that_no_float_is(module: Any, number: str) -> None:
    with pytest.raises(InputError) as raised:
        score_responses(module(f"def f(p, r):\n    return [0.0, {number}]"), ["p", "p"], ["r", "s"])
    assert (raised.value.kind, raised.value.row) == ("not_finite", 2)


def test_closed_streams_are_opened_again(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # not pytest's own
    function = module("import sys\ndef f(p, r):\n    sys.stdout.close()\n    return [1.0 for _ in r]")
    with raises("user_code"):
        score_responses(function, ["p"], ["r"])
    print("still here")


GREEDY = """
import os
def f(prompts, responses, rows):
    prompts[0][0]["content"] = "other"
    responses.clear()
    rows[0]["answer"] = 7
    os.chdir("/")
    return [1.0]
"""


@pytest.mark.parametrize("in_thread", [False, True])
def test_what_a_function_does_to_its_arguments_and_its_folder_is_not_the_runs(
    module: Any, tmp_path: Path, in_thread: bool
) -> None:
    function, prompts, responses = module(GREEDY), [[{"role": "user", "content": "Hi"}]], ["Hello"]
    columns = {"rows": [{"answer": 3}]}
    given = function, prompts, responses, columns
    if in_thread:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(score_responses, *given).result() == [1.0]
    else:
        assert score_responses(*given) == [1.0]
    assert (prompts, responses) == ([[{"role": "user", "content": "Hi"}]], ["Hello"])
    assert columns == {"rows": [{"answer": 3}]}
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(
    "text",
    ["def f(): return []", "def f(p): return []", "def f(a, b, c, d): return []", "def f(prompts, *, key): return []"],
)
def test_functions_that_cannot_be_called(module: Any, tmp_path: Path, text: str) -> None:
    for load in (load_score_function, load_judge):
        with raises("user_code", file=tmp_path / "mine.py"):
            module(text, load)


JUDGES = {
    "batch size 0": ("batch_size = 0", "return [0.5]"),
    "batch size text": ("batch_size = 'x'", "return [0.5]"),
    "concurrency": ("concurrency = -1", "return [0.5]"),
    "concurrency of a half": ("concurrency = 0.5", "return [0.5]"),
    "no verdicts": ("", "return None"),
    "text": ("", "return 'A'"),
    "a text each": ("", "return ['A']"),
    "none each": ("", "return [None]"),
    "beyond 1": ("", "return [1.5]"),
    "nan": ("", "return [float('nan')]"),
    "huge": ("", "return [10**400]"),
    "preference text": ("", "return [Verdict('x')]"),
    "preference none": ("", "return [Verdict(None)]"),
    "raw bytes": ("", "return [Verdict(0.5, raw=b'A')]"),
    "raw object": ("", "return [Verdict(0.5, raw=object())]"),
    "reason number": ("", "return [Verdict(0.5, reason=3)]"),
    "score text": ("", "return [Verdict(0.5, score_a='high', score_b=1.0)]"),
    "score nan": ("", "return [Verdict(0.5, score_a=float('nan'), score_b=1.0)]"),
    "exit": ("", "raise SystemExit(0)"),
    "compare of nothing": ("def compare(self): pass", None),
}


@pytest.mark.parametrize(("attribute", "body"), JUDGES.values(), ids=JUDGES)
def test_judges_of_another_form(module: Any, tmp_path: Path, attribute: str, body: str | None) -> None:
    compare = "" if body is None else f"    def compare(self, comparisons):\n        {body}\n"
    text = f"from reward.judges import Verdict\nclass f:\n    {attribute or 'pass'}\n{compare}"
    with raises("user_code", file=tmp_path / "mine.py"):
        module(text, load_judge).compare([Comparison("p", "a", "b")])


# ---- time ------------------------------------------------------------------------------------------------------------


# A loop in a thread that was given up would take a core from the tests after this one.
@pytest.mark.parametrize(
    ("body", "in_thread"), [("time.sleep(60)", False), ("time.sleep(60)", True), ("while True: pass", False)]
)
def test_a_call_that_never_returns_is_given_up(
    module: Any, monkeypatch: pytest.MonkeyPatch, body: str, in_thread: bool
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "0.2")
    function = module(f"import time\ndef f(p, r):\n    try:\n        {body}\n    except Exception:\n        pass")
    start = time.monotonic()
    with raises("user_code"):
        score(function, in_thread)
    assert time.monotonic() - start < 20


def test_it_is_said_who_is_being_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("reward.judges.user_code.FIRST_WORD", 0.05)
    call_users_code("judge 'slow:f'", time.sleep, 0.3)
    assert "waiting for judge 'slow:f'" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["x", "0", "-1", "nan", "inf", "1e30"])
def test_a_limit_that_is_none(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, seconds)
    with raises("invalid", key=LIMIT_VARIABLE):
        call_users_code("f", len, [])


@pytest.mark.parametrize("in_thread", [False, True])
def test_the_limit_of_a_recipe_goes_before_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, in_thread: bool
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "50")
    start = time.monotonic()
    with raises("user_code"), time_limit(0.2), time_limit(None):
        if in_thread:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(call_users_code, "f", time.sleep, 10).result()
        call_users_code("f", time.sleep, 10)
    assert time.monotonic() - start < 5
    with time_limit(0.05):
        pass
    call_users_code("f", time.sleep, 0.2)  # over with the block


def test_ctrl_c_and_our_own_failures_pass() -> None:
    def raising(error: BaseException) -> Any:
        raise error

    with pytest.raises(KeyboardInterrupt):
        call_users_code("f", raising, KeyboardInterrupt())
    with pytest.raises(JudgeError):
        call_users_code("f", raising, JudgeError("down", kind="server"))


def test_calls_from_one_thread_are_made_in_one_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        found = {pool.submit(call_users_code, "f", threading.get_ident).result() for _ in range(3)}
    assert len(found) == 1
    assert call_users_code("f", threading.get_ident) == threading.get_ident()

"""Judges that are Python: a score of each response, a comparison, or an object with `compare`, as `module:callable`."""

import hashlib
import importlib
import inspect
import math
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

from reward.errors import Failure, InputError
from reward.judges.base import Comparison, Judge, Verdict
from reward.judges.judge_settings import JudgeSettings
from reward.records import Prompt

ScoreFunction = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]
CompareFunction = Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], Sequence[float | Verdict]]


def _sign_probability(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


@dataclass(frozen=True)
class FunctionJudge:
    """A judge that scores both responses: the higher score wins, equal scores tie.

    probability: maps the difference of scores to the probability that A wins; default: its sign.
    version: see `load_judge`.
    """

    function: ScoreFunction
    identity: str = "function"
    probability: Callable[[float], float] = _sign_probability
    version: str = ""
    sees_order = False
    batch_size = 64
    concurrency = 1

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return one verdict per comparison, in order. Raises `InputError` as `score_responses`."""
        prompts = [comparison.prompt for comparison in comparisons]
        responses_a = [comparison.response_a for comparison in comparisons]
        responses_b = [comparison.response_b for comparison in comparisons]
        scores = score_responses(self.function, prompts + prompts, responses_a + responses_b)
        scores_a, scores_b = scores[: len(comparisons)], scores[len(comparisons) :]
        return [Verdict(self.probability(a - b), a, b) for a, b in zip(scores_a, scores_b, strict=True)]


@dataclass(frozen=True)
class CompareJudge:
    """A judge that is a function of prompts, responses A and responses B, and gives probabilities or verdicts."""

    function: CompareFunction
    identity: str = "function"
    version: str = ""
    sees_order = True
    batch_size = 16
    concurrency = 1

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return one verdict per comparison, in order. Raises `InputError` for anything else that comes back."""
        name = f"judge {_name_of(self.function)}"
        with _users_code(name):
            returned = self.function(
                [c.prompt for c in comparisons],
                [c.response_a for c in comparisons],
                [c.response_b for c in comparisons],
            )
        return checked_verdicts(name, returned, len(comparisons))


@dataclass(frozen=True)
class ForeignJudge:
    """A user's own object with `compare`, and defaults for the attributes of a judge that it lacks."""

    judge: Any
    identity: str
    version: str = ""

    @property
    def sees_order(self) -> bool:
        return bool(getattr(self.judge, "sees_order", True))

    @property
    def batch_size(self) -> int:
        return int(getattr(self.judge, "batch_size", 16))

    @property
    def concurrency(self) -> int:
        return int(getattr(self.judge, "concurrency", 1))

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        name = f"judge {self.identity!r}"
        with _users_code(name):
            returned = self.judge.compare(comparisons)
        return checked_verdicts(name, returned, len(comparisons))


def load_judge(path: str) -> Judge:
    """The judge that "module:callable" names.

    A function of (prompts, responses) scores, a function of (prompts, responses_a, responses_b) compares, and an object
    or a class with `compare` is a judge itself. Its `version` is a hash of its source file: when the file changes,
    earlier verdicts are not reused. Raises `InputError` for anything else, as `load_function` does.
    """
    named = load_function(path)
    version = _version_of(named)
    if hasattr(named, "compare"):
        with _users_code(f"judge {path!r}"):
            return ForeignJudge(named() if inspect.isclass(named) else named, path, version)
    try:
        wanted = [
            p
            for p in inspect.signature(named).parameters.values()
            if p.default is p.empty and p.kind < p.VAR_POSITIONAL
        ]
    except (TypeError, ValueError):  # some builtins have no signature
        return FunctionJudge(named, path, version=version)
    if len(wanted) == 3:
        return CompareJudge(named, path, version)
    return FunctionJudge(named, path, version=version)


class FunctionKind:
    """Makes the judge that `module:callable` names."""

    def __call__(self, settings: JudgeSettings) -> Judge:
        return load_judge(settings.needed_target("name the function: module:callable"))

    def check(self, settings: JudgeSettings, run_dir: Path | None) -> None:
        self(settings)


def _version_of(named: Any) -> str:
    module = inspect.getmodule(named if hasattr(named, "__module__") else type(named))
    try:
        return hashlib.sha256(Path(inspect.getfile(module)).read_bytes()).hexdigest()[:16] if module else ""
    except (TypeError, OSError):  # built in, or made at run time
        return ""


def checked_verdicts(name: str, returned: Any, n: int) -> list[Verdict]:
    """Probabilities or verdicts as verdicts. Raises `InputError` naming the judge for anything else."""
    answers = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(answers, Sequence) or isinstance(answers, str) or len(answers) != n:
        count = f"{len(answers)} answers" if isinstance(answers, Sequence) else type(returned).__name__
        raise _wrong(f"{name} returned {count} for {n} comparisons")
    verdicts: list[Verdict] = []
    for index, answer in enumerate(answers):
        verdict = answer if isinstance(answer, Verdict) else None
        if verdict is None and isinstance(answer, Real) and not isinstance(answer, bool):
            verdict = Verdict(float(answer))
        if verdict is None or not (verdict.invalid or 0 <= verdict.preference <= 1):
            raise _wrong(f"{name} returned {answer!r} for comparison {index}, not a probability in [0, 1]", index)
        verdicts.append(_plain(verdict, name, index))
    return verdicts


def _plain(verdict: Verdict, name: str, index: int) -> Verdict:
    """A user's verdict in plain floats; the preference of an invalid one is NaN, whatever the user gave."""
    scores = {"score_a": verdict.score_a, "score_b": verdict.score_b}
    try:
        numbers = {side: None if score is None else float(score) for side, score in scores.items()}
    except (TypeError, ValueError):
        numbers = {"score_a": math.nan}
    if not all(number is None or math.isfinite(number) for number in numbers.values()):
        raise _wrong(f"{name} returned {verdict!r} for comparison {index}, whose scores are not numbers", index)
    return replace(verdict, preference=math.nan if verdict.invalid else float(verdict.preference), **numbers)


def score_responses(function: ScoreFunction, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Call a score function and check what it returns: one finite number per response.

    One-dimensional arrays and tensors are accepted. Raises `InputError` naming the function, also for what it raises.
    """
    name = f"score function {_name_of(function)}"
    with _users_code(name):
        returned: Any = function(prompts, responses)
    scores = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise _wrong(f"{name} returned {type(returned).__name__}, not a list of numbers")
    if len(scores) != len(responses):
        raise _wrong(f"{name} returned {len(scores)} scores for {len(responses)} responses")
    for index, score in enumerate(scores):
        if not isinstance(score, Real):
            raise _wrong(f"{name} returned {score!r} for response {index}, not a number", index)
        if not math.isfinite(score):
            message = f"{name} returned {score!r} for response {index}, not a finite number"
            raise InputError(message, kind="not_finite", row=index + 1)
    return [float(score) for score in scores]


def load_function(path: str) -> Callable[..., Any]:
    """Import what "module:callable" names; modules in the working directory are found too.

    Raises `InputError` where the text has another form, the module or the name in it does not exist (with the nearest
    one that does), the module needs a package that is not installed, or the name is not callable.
    """
    module_name, _, function_name = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise InputError(f"{path!r} does not name a function as 'module:callable'")
    # A console script does not look for modules in the working directory. It comes last, so it hides no package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if f"{module_name}.".startswith(f"{missing}."):
            raise InputError(
                f"{path!r} names the module {missing!r}, which is neither installed nor in the working directory",
                kind="unknown",
                fix=_nearest(missing, _modules_beside(missing)),
            ) from error
        raise InputError(
            f"{path!r} needs the package {missing!r}, which is not installed", kind="not_installed"
        ) from error
    except ImportError as error:
        raise InputError(f"{path!r} cannot be imported: {error}", kind="user_code") from error
    except Exception as error:  # the module is the user's: its top level can raise anything
        raise InputError(f"{path!r} cannot be imported: it raised {_describe(error)}", kind="user_code") from error

    if not hasattr(module, function_name):
        nearest = _nearest(function_name, dir(module))
        raise InputError(f"module {module_name!r} has no {function_name!r}", kind="unknown", fix=nearest)
    function = getattr(module, function_name)
    if not callable(function):
        raise InputError(f"{path!r} is not callable but {type(function).__name__}")
    return function


@contextmanager
def _users_code(name: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one `InputError`; our own failures pass as they are."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        raise InputError(f"{name} raised {_describe(error)}", kind="user_code") from error


def _wrong(message: str, index: int | None = None) -> InputError:
    """What the user's code returned cannot be used; `index` counts its answers from 0."""
    return InputError(message, kind="user_code", row=None if index is None else index + 1)


def _name_of(function: Callable[..., Any]) -> str:
    return f"'{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}'"


def _describe(error: Exception) -> str:
    """The kind of an exception, what it says, and the line of the file that it was raised in."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{f': {error}' if str(error) else ''}{place}"


def _modules_beside(name: str) -> list[str]:
    """The modules that there are in the place where `name` is not."""
    parent = name.rpartition(".")[0]
    folders = getattr(sys.modules[parent], "__path__", []) if parent else None  # None: all of sys.path
    prefix = f"{parent}." if parent else ""
    return [prefix + module.name for module in pkgutil.iter_modules(folders)]


def _nearest(name: str, candidates: Sequence[str]) -> str | None:
    matches = get_close_matches(name, candidates, n=1)
    return f"did you mean {matches[0]!r}?" if matches else None

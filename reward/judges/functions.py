"""Judges that are Python: a score of each response, a comparison, or an object of one's own, as `module:callable`."""

import hashlib
import importlib
import inspect
import math
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

from reward.errors import InputError, JudgeError
from reward.judges.base import Comparison, Judge, Verdict
from reward.records import Prompt

ScoreFunction = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]
CompareFunction = Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], Sequence[float | Verdict]]


def _sign_probability(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


@dataclass(frozen=True)
class FunctionJudge:
    """A judge that scores both responses: the higher score wins, equal scores tie.

    probability: from the difference of scores to the probability that A wins, where the plain sign is not wanted.
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
        name = _name_of(self.function)
        try:
            returned: Any = self.function(
                [c.prompt for c in comparisons],
                [c.response_a for c in comparisons],
                [c.response_b for c in comparisons],
            )
        except InputError:
            raise
        except Exception as error:  # it is the user's: it can raise anything
            raise InputError(f"judge {name} raised {_describe(error)}") from error
        return checked_verdicts(name, returned, len(comparisons))


@dataclass(frozen=True)
class ForeignJudge:
    """A user's own object with `compare`; what it does not say of itself is assumed here."""

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
        name = repr(self.identity)
        try:
            returned: Any = self.judge.compare(comparisons)
        except (InputError, JudgeError):
            raise
        except Exception as error:  # it is the user's: it can raise anything
            raise InputError(f"judge {name} raised {_describe(error)}") from error
        return checked_verdicts(name, returned, len(comparisons))


def load_judge(path: str) -> Judge:
    """The judge that "module:callable" names.

    A function of (prompts, responses) scores, a function of (prompts, responses_a, responses_b) compares, and an object
    or a class with `compare` is a judge itself. Its `version` is a hash of the file that it is written in: once that is
    another, verdicts of before are not its own. Raises `InputError` for anything else, as `load_function` does.
    """
    named = load_function(path)
    version = _version_of(named)
    if hasattr(named, "compare"):
        try:
            return ForeignJudge(named() if inspect.isclass(named) else named, path, version)
        except Exception as error:
            raise InputError(f"judge {path!r} raised {_describe(error)} when it was made") from error
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
        raise InputError(f"judge {name} returned {count} for {n} comparisons")
    verdicts: list[Verdict] = []
    for index, answer in enumerate(answers):
        verdict = answer if isinstance(answer, Verdict) else None
        if verdict is None and isinstance(answer, Real) and not isinstance(answer, bool):
            verdict = Verdict(float(answer))
        if verdict is None or not (verdict.invalid or 0 <= verdict.preference <= 1):
            raise InputError(f"judge {name} returned {answer!r} for comparison {index}, not a probability in [0, 1]")
        verdicts.append(_plain(verdict, name, index))
    return verdicts


def _plain(verdict: Verdict, name: str, index: int) -> Verdict:
    """A user's verdict as numbers that can be written: one that is invalid has no preference, whatever it says."""
    scores = {"score_a": verdict.score_a, "score_b": verdict.score_b}
    try:
        numbers = {side: None if score is None else float(score) for side, score in scores.items()}
    except (TypeError, ValueError):
        numbers = {"score_a": math.nan}
    if not all(number is None or math.isfinite(number) for number in numbers.values()):
        raise InputError(f"judge {name} returned {verdict!r} for comparison {index}, whose scores are not numbers")
    return replace(verdict, preference=math.nan if verdict.invalid else float(verdict.preference), **numbers)


def score_responses(function: ScoreFunction, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Call a score function and check what it returns: one finite number per response.

    Arrays and tensors of one dimension are welcome. Raises `InputError` naming the function, also for what it raises.
    """
    name = f"score function {_name_of(function)}"
    try:
        returned: Any = function(prompts, responses)
    except InputError:
        raise
    except Exception as error:  # it is the user's: it can raise anything
        raise InputError(f"{name} raised {_describe(error)}") from error
    scores = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise InputError(f"{name} returned {type(returned).__name__}, not a list of numbers")
    if len(scores) != len(responses):
        raise InputError(f"{name} returned {len(scores)} scores for {len(responses)} responses")
    for index, score in enumerate(scores):
        if not isinstance(score, Real) or not math.isfinite(score):
            raise InputError(
                f"{name} returned {score!r} for response {index}, not a finite number",
                kind="not_finite" if isinstance(score, Real) else "user_code",
            )
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
            raise InputError(f"{path!r} names the module {missing!r}, {_no_module(missing)}") from error
        raise InputError(f"{path!r} needs the package {missing!r}, which is not installed") from error
    except ImportError as error:
        raise InputError(f"{path!r} cannot be imported: {error}") from error
    except Exception as error:  # the module is the user's: its top level can raise anything
        raise InputError(f"{path!r} cannot be imported: it raised {_describe(error)}") from error

    if not hasattr(module, function_name):
        raise InputError(f"module {module_name!r} has no {function_name!r}{_nearest(function_name, dir(module))}")
    function = getattr(module, function_name)
    if not callable(function):
        raise InputError(f"{path!r} is not callable but {type(function).__name__}")
    return function


def _name_of(function: Callable[..., Any]) -> str:
    return f"'{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}'"


def _describe(error: Exception) -> str:
    """The kind of an exception, what it says, and the line of the file that it was raised in."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{f': {error}' if str(error) else ''}{place}"


def _no_module(name: str) -> str:
    """Say that a module does not exist, and which one has the nearest name."""
    parent = name.rpartition(".")[0]
    folders = getattr(sys.modules[parent], "__path__", []) if parent else None  # None: all of sys.path
    prefix = f"{parent}." if parent else ""
    hint = _nearest(name, [prefix + module.name for module in pkgutil.iter_modules(folders)])
    return f"which is neither installed nor in the working directory{hint}"


def _nearest(name: str, candidates: Sequence[str]) -> str:
    matches = get_close_matches(name, candidates, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""

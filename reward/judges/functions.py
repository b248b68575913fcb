"""Judges that are Python: a score of each response, a comparison, or an object with `compare`, as `module:callable`."""

import hashlib
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from reward.errors import InputError
from reward.judges.base import Comparison, Judge, Verdict
from reward.judges.judge_settings import JudgeSettings
from reward.judges.user_code import call_users_code, check_arguments, load_function, place_of, source_of
from reward.records import NO_COLUMNS, Columns, Prompt

ScoreFunction = Callable[..., Sequence[float]]
CompareFunction = Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], Sequence[float | Verdict]]


def _sign_probability(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


@dataclass(frozen=True)
class FunctionJudge:
    """A judge that scores both responses: the higher score wins, equal scores tie.

    probability: maps the difference of scores to the probability that A wins; default: its sign.
    version: see `load_judge`. rest: gives back what the function has on a GPU until it is called again.
    refusal: why a prompt cannot be scored, whose verdict is invalid then; None where it can.
    """

    function: ScoreFunction
    identity: str = "function"
    probability: Callable[[float], float] = _sign_probability
    version: str = ""
    rest: Callable[[], None] = lambda: None
    refusal: Callable[[Prompt], str | None] = lambda _: None
    sees_order = False
    batch_size = 64
    concurrency = 1

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return one verdict per comparison, in order. Raises `InputError` as `score_responses`."""
        refused = {i: why for i, each in enumerate(comparisons) if (why := self.refusal(each.prompt)) is not None}
        scored = iter(self._compare([each for i, each in enumerate(comparisons) if i not in refused]))
        return [Verdict.not_understood(refused[i]) if i in refused else next(scored) for i in range(len(comparisons))]

    def _compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
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
        columns = (
            [c.prompt for c in comparisons],
            [c.response_a for c in comparisons],
            [c.response_b for c in comparisons],
        )
        returned = call_users_code(name, self.function, *columns)
        return checked_verdicts(name, returned, len(comparisons), self.function)


@dataclass(frozen=True)
class ForeignJudge:
    """A user's own object with `compare`, and defaults for the attributes of a judge that it lacks."""

    judge: Any
    identity: str
    version: str = ""

    @property
    def sees_order(self) -> bool:
        return bool(call_users_code(f"judge {self.identity!r}", getattr, self.judge, "sees_order", True))

    @property
    def batch_size(self) -> int:
        return self._number("batch_size", 16)

    @property
    def concurrency(self) -> int:
        return self._number("concurrency", 1)

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        name = f"judge {self.identity!r}"
        returned = call_users_code(name, self.judge.compare, comparisons)
        return checked_verdicts(name, returned, len(comparisons), self.judge.compare)

    def _number(self, attribute: str, usual: int) -> int:
        number = call_users_code(f"judge {self.identity!r}", getattr, self.judge, attribute, usual)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            message = f"judge {self.identity!r} has {attribute} {number!r}, which is a number from 1"
            raise _wrong(message, getattr(type(self.judge), "compare", None))
        return number


def load_judge(path: str) -> Judge:
    """The judge that "module:callable" names.

    A function of (prompts, responses) scores, a function of (prompts, responses_a, responses_b) compares, and an object
    or a class with `compare` is a judge itself. Its `version` is a hash of its source file: when the file changes,
    earlier verdicts are not reused. Raises `InputError` for anything else, as `load_function` does.
    """
    named: Any = load_function(path)
    version = _version_of(named)
    if hasattr(named, "compare"):
        made: Any = call_users_code(f"judge {path!r}", named) if inspect.isclass(named) else named
        judge = ForeignJudge(made, path, version)
        check_arguments(path, made.compare, "comparisons")
        assert judge.batch_size  # both are checked where they are asked for
        assert judge.concurrency
        return judge
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
    check_arguments(path, named, "prompts", "responses")
    return FunctionJudge(named, path, version=version)


def load_score_function(
    path: str, columns: Collection[str] = (), arguments: Mapping[str, Any] | None = None
) -> ScoreFunction:
    """The function that "module:callable" names.

    arguments: what it will be called with besides, by name.
    Raises `InputError` where it cannot take prompts, responses and these, or wants a column that the data lacks.
    """
    function = load_function(path)
    positional, named = _arguments(function, "prompts", "responses", dict.fromkeys(columns, ()))
    check_arguments(path, function, *positional, named=named | dict(arguments or {}))
    return function


def _arguments(function: Any, prompts: Any, responses: Any, columns: Columns) -> tuple[list[Any], dict[str, Any]]:
    """What a score function is called with: prompts, responses, and by their names the columns that it takes.

    A function of TRL's, which calls responses `completions`, gets both by name.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return [prompts, responses], {}
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    own = {"prompts": prompts, "completions": responses} if "completions" in parameters else {}
    first = set(own) or set(list(parameters)[:2])
    named = {
        name: values
        for name, values in columns.items()
        if name not in first and name.isidentifier() and (everything or name in parameters)
    }
    if not own:
        return [prompts, responses], named
    return [], {name: value for name, value in own.items() if everything or name in parameters} | named


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


def checked_verdicts(name: str, returned: Any, n: int, function: Any = None) -> list[Verdict]:
    """Probabilities or verdicts as verdicts. Raises `InputError` naming the judge for anything else."""
    answers = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(answers, Sequence) or isinstance(answers, str | bytes) or len(answers) != n:
        is_list = isinstance(answers, Sequence) and not isinstance(answers, str | bytes)
        count = f"{len(answers)} answers" if is_list else type(returned).__name__
        raise _wrong(f"{name} returned {count} for {n} comparisons", function)
    verdicts: list[Verdict] = []
    for index, answer in enumerate(answers):
        verdict = answer if isinstance(answer, Verdict) else None
        if verdict is None and (number := as_number(answer)) is not None and not isinstance(answer, bool):
            verdict = Verdict(number)
        if verdict is None or (plain := _plain(verdict)) is None:
            message = f"{name} returned {_shown(answer)} for comparison {index}, not a probability in [0, 1]"
            raise _wrong(message, function, index)
        verdicts.append(plain)
    return verdicts


def _plain(verdict: Verdict) -> Verdict | None:
    """A user's verdict in plain floats and texts, None where it is none; the preference of an invalid one is NaN."""
    preference = math.nan if verdict.invalid else as_number(verdict.preference)
    scores = {side: as_number(getattr(verdict, side)) for side in ("score_a", "score_b")}
    texts = (verdict.raw, verdict.reason, verdict.invalid)
    if any(
        score is None or not math.isfinite(score)
        for side, score in scores.items()
        if getattr(verdict, side) is not None
    ):
        return None
    if not all(text is None or isinstance(text, str) for text in texts):
        return None
    if preference is None or not (verdict.invalid or 0 <= preference <= 1):
        return None
    return replace(verdict, preference=preference, **scores)


def as_number(value: Any) -> float | None:
    """A real number as a float, ∞ where no float is as large; None for anything else."""
    if not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except Exception:  # a class of the user's that claims to be a number
        return None


def _shown(value: Any) -> str:
    """What the user's code returned, short: its own `repr` may raise or be of any length."""
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}…"


def score_responses(
    function: ScoreFunction,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    columns: Columns = NO_COLUMNS,
    arguments: Mapping[str, Any] | None = None,
) -> list[float]:
    """Call a score function and check what it returns: one finite number per response.

    columns: the other columns of the prompts' rows; the function gets those that its arguments name, all with `**`.
    arguments: further ones by name, in place of a column of that name.
    One-dimensional arrays and tensors are accepted. Raises `InputError` naming the function, also for what it raises.
    """
    name = f"score function {_name_of(function)}"
    positional, named = _arguments(function, prompts, responses, columns)
    returned = call_users_code(name, function, *positional, **(named | dict(arguments or {})))
    scores = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(scores, Sequence) or isinstance(scores, str | bytes):
        raise _wrong(f"{name} returned {type(returned).__name__}, not a list of numbers", function)
    if len(scores) != len(responses):
        raise _wrong(f"{name} returned {len(scores)} scores for {len(responses)} responses", function)
    numbers: list[float] = []
    for index, score in enumerate(scores):
        number = as_number(score)
        if number is None:
            raise _wrong(f"{name} returned {_shown(score)} for response {index}, not a number", function, index)
        if not math.isfinite(number):
            message = f"{name} returned {_shown(score)} for response {index}, not a finite number{place_of(function)}"
            raise InputError(message, kind="not_finite", file=source_of(function), row=index + 1)
        numbers.append(number)
    return numbers


def _wrong(message: str, function: Any, index: int | None = None) -> InputError:
    """What the user's code returned cannot be used; `index` counts its answers from 0."""
    row = None if index is None else index + 1
    return InputError(f"{message}{place_of(function)}", kind="user_code", file=source_of(function), row=row)


def _name_of(function: Callable[..., Any]) -> str:
    return f"'{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}'"

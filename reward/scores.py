"""Ready score functions: (prompts, responses) → one number per response, higher is better.

A function that names a column of the prompts gets it: `answer` below, for rewards that can be verified.
"""

import json
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

from reward.errors import InputError
from reward.records import Prompt


def vader(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """VADER's compound sentiment of each response, in [−1, 1]; 1 is the most positive.

    Raises `InputError` where vaderSentiment is not installed. Source: Hutto and Gilbert, ICWSM 2014.
    """
    analyzer = _vader_analyzer()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]


def varied_cheer(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """VADER's sentiment less the share of words that were said before: cheer that a word said again does not raise."""
    repeated = repetition_penalty(prompts, responses, n=1)
    return [cheer + penalty for cheer, penalty in zip(vader(prompts, responses), repeated, strict=True)]


def length(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Number of characters of each response: the control that shows how much of a win rate is length."""
    return [float(len(response)) for response in responses]


def math_answer(prompts: Sequence[Prompt], responses: Sequence[str], answer: Sequence[object]) -> list[float]:
    """1 for a response whose answer is the one in the column `answer`, else 0.

    The answer of a text is what stands in its last `\\boxed{…}`, else after its last `####` (as in GSM8K), else its
    last number. Numbers are compared as numbers: 1,000 is 1000.0, and 1/2 is 0.5.
    """
    pairs = zip(responses, answer, strict=True)
    found = [(_number(_said(response, last_number=True)), _number(_said(str(known)))) for response, known in pairs]
    return [float(said is not None and said == known) for said, known in found]


def answer_format(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """1 for a response that is `<think>…</think>` and then an answer, else 0."""
    # With a template that has begun the thought already, a response begins inside it.
    pattern = re.compile(r"\s*(<think>)?(?:(?!</?think>).)+</think>\s*(?:(?!</?think>).)*\S\s*", re.DOTALL)
    return [float(pattern.fullmatch(response) is not None) for response in responses]


def length_penalty(
    prompts: Sequence[Prompt], responses: Sequence[str], limit: int = 200, buffer: int = 50, unit: str = "words"
) -> list[float]:
    """0 up to `limit` − `buffer` words (or `unit: characters`), then falling to −1 at `limit`, and −1 beyond it.

    Source: DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), which counts tokens.
    """
    if not 0 <= buffer <= limit:
        raise _wrong_argument(f"length_penalty: buffer {buffer} is not between 0 and limit {limit}")
    over = (len(_units(response, unit)) - (limit - buffer) for response in responses)
    return [-min(1.0, max(0, more) / buffer) if buffer else -float(more > 0) for more in over]


def repetition_penalty(
    prompts: Sequence[Prompt], responses: Sequence[str], n: int = 3, unit: str = "words"
) -> list[float]:
    """Minus the share of a response's runs of n words (or characters) that it has said before; 0 to −1."""
    if n < 1:
        raise _wrong_argument(f"repetition_penalty: n is {n}, not a number from 1")
    found: list[float] = []
    for response in responses:
        units = _units(response, unit)
        runs = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
        found.append(len(set(runs)) / len(runs) - 1 if runs else 0.0)
    return found


def brevity(prompts: Sequence[Prompt], responses: Sequence[str], words: int = 5) -> list[float]:
    """0 for a response of 1 to `words` words, −1 for an empty one, and minus what is beyond, in units of `words`."""
    if words < 1:
        raise _wrong_argument(f"brevity: words is {words}, not a number from 1")
    counts = (len(response.split()) for response in responses)
    return [-max(0, count - words) / words if count else -1.0 for count in counts]


def asks(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """1 for a response that ends with a question mark, else 0."""
    return [float(response.rstrip().endswith("?")) for response in responses]


def matches(prompts: Sequence[Prompt], responses: Sequence[str], pattern: str) -> list[float]:
    """1 for a response that the regular expression matches as a whole, white space around it left out, else 0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise _wrong_argument(f"matches: {pattern!r} is no regular expression: {error}") from error
    return [float(compiled.fullmatch(response.strip()) is not None) for response in responses]


def valid_json(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """1 for a response that is one JSON value, in a fenced block or not, else 0."""
    fence = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
    inner = (found[1] if (found := fence.fullmatch(text.strip())) else text for text in responses)
    return [float(_is_json(text)) for text in inner]


def _is_json(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)  # NaN and Infinity, which Python reads and JSON does not have

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _wrong_argument(message: str) -> InputError:
    return InputError(message, kind="invalid", key="ppo.reward.arguments")


def _units(text: str, unit: str) -> Sequence[str]:
    if unit not in ("words", "characters"):
        raise _wrong_argument(f"unit: {unit!r} is neither words nor characters")
    return text.split() if unit == "words" else text


def _said(text: str, last_number: bool = False) -> str:
    if boxed := re.findall(r"\\boxed\{([^{}]*)\}", text):
        return boxed[-1]
    if "####" in text:
        return text.rpartition("####")[2]
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", text) if last_number else []
    return numbers[-1] if numbers else text


def _number(text: str) -> Fraction | str | None:
    try:
        return Fraction(text.strip(" \n$.").replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return text.strip() or None


@cache
def _vader_analyzer() -> Any:
    """The analyzer, made once: it reads its lexicon from disk."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise InputError(
            "reward.scores:vader needs vaderSentiment",
            kind="not_installed",
            key="reward.scores:vader",
            fix="pip install 'pe-rlhf[demo]'",
        ) from error
    return SentimentIntensityAnalyzer()

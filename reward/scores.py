"""Ready score functions: (prompts, responses) → one number per response, higher is better.

A function that names a column of the prompts gets it: `answer` below, for rewards that can be verified.
"""

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

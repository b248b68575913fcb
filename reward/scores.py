"""Ready score functions: (prompts, responses) → one number per response, higher is better."""

from collections.abc import Sequence
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


@cache
def _vader_analyzer() -> Any:
    """The analyzer, made once: it reads its lexicon from disk."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise InputError(
            "reward.scores:vader needs vaderSentiment", kind="not_installed", fix="pip install 'pe-rlhf[demo]'"
        ) from error
    return SentimentIntensityAnalyzer()

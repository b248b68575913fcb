r"""A chat model that rates a response from 1 to 10, after MT-Bench's single-answer grading (arXiv 2306.05685).

The score is the expectation Σ n·p(n) / Σ p(n) over the ratings as the next token (G-Eval, arXiv 2303.16634), which is
finer than the rating that the model would say: one forward pass. Where ratings have little probability together, where
a server gives no log-probs, and where the first token says too little, the text is read.

Many tokenizers write 10 as 1 and 0. Where there is no token 10, p(1) is that of both, and is used only if it is small.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from reward.judges.base import Comparison, Verdict
from reward.judges.json_answers import objects
from reward.judges.llm import ChatJudge, Completion, raw_logprobs

LEAST, MOST = 1.0, 10.0
RATINGS = tuple(str(number) for number in range(1, 11))
SMALL = 0.01  # share of p(1) that may be 10's: it moves the expectation by 0.09 at most

DIGITS = r"(?<![\w.,/+-])([0-9]+(?:\.[0-9]+)?)"
# Not of a range, such as 7-8 or "7 or 8", and not of another scale, such as 4/5 or 80%.
NUMBER = DIGITS + r"(?![\w%/]|[.,][0-9]|\s*(?:-|–|—|to|or|and)\s*[0-9])"
OF_TEN = re.compile(r"\s*(?:/|out of)\s*(?:10|ten)\b(?![.,]?[0-9])", re.IGNORECASE)
NUMBER_OF_TEN = re.compile(DIGITS + OF_TEN.pattern, re.IGNORECASE)
SCALE = re.compile(r"\(?\b(?:from\s+)?1(?:\.0)?\s*(?:-|–|—|to)\s*10\b\)?", re.IGNORECASE)
MARK = re.compile(r"\[\[\s*([^\[\]]*?)\s*\]\]|\\boxed\s*\{\s*([^{}]*?)\s*\}")
KEY = re.compile(r"(?:\b|_)(?:rating|score|grade|mark)s?\b", re.IGNORECASE)
STATEMENTS = (
    re.compile(
        r"\b(?:rating|score|grade|mark)\b[^\w\n]*?(?:[:=]| [-–—](?= )|\b(?:is|of|would be|as)\b)[^\w\n]*(?:an?\s+)?"
        + NUMBER,
        re.I,
    ),
    re.compile(r"^\W*(?:overall|total|in total)\b[^\w\n]*?[:=][^\w\n]*" + NUMBER, re.IGNORECASE | re.MULTILINE),
    re.compile(r"(?:评分|得分|分数|打分|总分)(?:是|为|[^\w\n])*" + NUMBER),
    re.compile(r"^\W*(?:(?:my|overall|final|the)\s+)*(?:rating|score)\s+" + NUMBER, re.IGNORECASE | re.MULTILINE),
    re.compile(
        r"\b(?:I|we)(?:'d|'ll|\s+would|\s+will)?\s+(?:rate|give|score|grade|award)\b(?:\s+[^\W\d]+){0,5}?\s+" + NUMBER,
        re.IGNORECASE,
    ),
)


class RatingJudge(ChatJudge):
    """Asks a chat model to rate each response by itself; of two, the better rated one wins."""

    sees_order = False
    version = "3"  # of the rules by which answers are read
    kind = "rating"
    labels = RATINGS
    mass_of = "p(1) + … + p(10)"
    no_use = "the model was about to say something else, or its 1 may begin a 10"
    ask_after_reasoning = "Now your rating from 1 to 10: answer with one whole number and nothing else."
    unread = "the answer has no rating from 1 to 10, or several"
    one_token_is_all = False  # a 1 may go on as 10

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict per comparison, with the scores of both; equal responses are rated once."""
        both = [side for c in comparisons for side in (c, c.swap())]
        asked = {json.dumps([side.prompt, side.response_a]): side for side in both}
        found = dict(zip(asked, self._answers(list(asked.values())), strict=True))
        rated = [found[json.dumps([side.prompt, side.response_a])] for side in both]
        return [_verdict(a, b) for a, b in zip(rated[::2], rated[1::2], strict=True)]

    def _of_logprobs(self, answer: Completion) -> Verdict | None:
        score = expected_rating(answer.label_logprobs or {})
        return None if score is None else _scored(score, raw_logprobs(answer))

    def _of_text(self, said: str, first_line: bool) -> Verdict | None:
        score = rating_alone(said) if first_line else parse_rating(said)
        return None if score is None else _scored(score)


def expected_rating(logprobs: dict[str, float]) -> float | None:
    """Σ n·p(n) / Σ p(n) over the ratings that are known; None where there are none, or 1 may be the start of 10."""
    mass = {rating: math.exp(logprob) for rating, logprob in logprobs.items()}
    total = sum(mass.values())
    if not total or ("10" not in mass and mass.get("1", 0.0) > SMALL * total):
        return None
    return sum(float(rating) * p for rating, p in mass.items()) / total


def parse_rating(text: str) -> float | None:
    """The rating from 1 to 10 that an answer states; None for none, for one off the scale, and for several.

    The surest form counts: `[[7]]` or a boxed number, then JSON with a key such as `rating`, then `Rating: 7`, `7/10`,
    "I give it a 7", or a number by itself on the first or last line.
    """
    said = unicodedata.normalize("NFKC", text).replace("⁄", "/")
    said = re.sub(r"(?<=[0-9]) ?分(?![之数钟])", " ", said)  # Chinese: points
    said = re.sub(r"<(\w+)>", r"\1: ", re.sub(r"</\w+>", "", said))  # of XML
    for read in (_marked, _json, _stated):
        if found := set(read(said)):
            value = found.pop()
            return value if not found and value is not None and LEAST <= value <= MOST else None
    return None


def rating_alone(line: str) -> float | None:
    """The number of a line that has nothing else, except emphasis and `/10`."""
    found = re.fullmatch(rf"[\s*_`\"'(]*{NUMBER}[\s*_`\"').!]*", OF_TEN.sub("", line))
    return float(found[1]) if found and LEAST <= float(found[1]) <= MOST else None


def _marked(text: str) -> Iterator[float | None]:
    for found in MARK.finditer(text):
        number = re.fullmatch(NUMBER, OF_TEN.sub("", found[1] if found[1] is not None else found[2]))
        yield float(number[1]) if number else None


def _json(text: str) -> Iterator[float | None]:
    for value in objects(text):
        yield from _of_object(value)


def _of_object(value: Any) -> Iterator[float | None]:
    for key, item in value.items() if isinstance(value, dict) else ():
        if KEY.search(str(key)):
            yield rating_alone(str(item)) if isinstance(item, int | float | str) else None


def _stated(text: str) -> Iterator[float | None]:
    plain = SCALE.sub(" ", re.sub(r"[*_`]+", "", text).replace("’", "'"))
    yield from (float(number) for number in NUMBER_OF_TEN.findall(plain))
    plain = NUMBER_OF_TEN.sub(r"\1", plain)
    yield from (float(number) for statement in STATEMENTS for number in statement.findall(plain))
    lines = [line for line in plain.splitlines() if line.strip()]
    for line in (lines[0], lines[-1]) if lines else ():
        if single := re.fullmatch(rf"\W*?{NUMBER}[\s\"').!]*", line):
            yield float(single[1])
    if len(lines) == 1 and (named := re.fullmatch(rf"\W*[^\W\d][^:\d\n]{{0,40}}:[\W_]*?{NUMBER}[\s\"').!]*", lines[0])):
        yield float(named[1])  # "Bewertung: 7", in any language


def _scored(score: float, raw: str | None = None) -> Verdict:
    return Verdict(0.5, score_a=score, raw=raw)


def _verdict(a: Verdict, b: Verdict) -> Verdict:
    """The comparison of two ratings; invalid where one of them is."""
    wrong = next((side for side in (a, b) if not side.is_valid), None)
    said = a.raw if a is b else f"{a.raw}\n\n{b.raw}"
    masses = [side.label_mass for side in (a, b) if side.label_mass is not None]
    mass = min(masses) if masses else None
    if wrong is not None or a.score_a is None or b.score_a is None:
        why = (wrong and wrong.invalid) or "no rating"
        return Verdict(math.nan, raw=said, reason=a.reason, invalid=why, label_mass=mass)
    preference = (1 + (a.score_a > b.score_a) - (a.score_a < b.score_a)) / 2
    return Verdict(preference, a.score_a, b.score_a, said, a.reason, label_mass=mass)

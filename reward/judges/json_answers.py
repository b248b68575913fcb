"""Verdicts and scores in the JSON objects of a chat model's answer."""

import json
import re
from collections.abc import Iterator
from typing import Any

from reward.judges.answer_words import KEY, NEGATIVE, SCORE_OF
from reward.judges.labels import TIE, lone_label, of_mark

TIES = ("tie", "draw", "both", "neither", "none", "c")


def objects(text: str) -> Iterator[Any]:
    """The JSON objects in a text, one after the other."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start != -1:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


def verdict_in_json(text: str) -> str | None:
    """A, B or `tie`, by the last object that says it under a key such as `winner`."""
    found = None
    for value in objects(text):
        found = _of_object(value) or found
    return found


def scores_in_json(text: str) -> list[tuple[str, float]]:
    """The scores of labels: under `score_a`, under `a` in `scores`, and the `score` of an object that names a label.

    A `rank` is its negative as a score.
    """
    return [found for value in objects(text) for found in _numbers_of(value, "")]


def _of_object(value: Any) -> str | None:
    found = None
    for key, item in value.items() if isinstance(value, dict) else ():
        name = str(key).replace("_", " ")
        if isinstance(item, dict):
            found = _of_object(item) or found
        elif isinstance(item, str) and re.search(rf"\b{KEY}", name, re.I) and not NEGATIVE.search(name):
            words = item.strip().lower()
            order = re.fullmatch(r"([AB]) ?([<>=≈~≫≪]{1,2}) ?([AB])", item.strip(), re.IGNORECASE)
            if order:
                found = of_mark(order[1].upper(), order[2], order[3].upper())
            else:
                found = (TIE if words in TIES else lone_label(item)) or found
    return found


def _numbers_of(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers_of(item, path)
    if not isinstance(value, dict):
        return
    labels = [label for item in value.values() if isinstance(item, str) and (label := lone_label(item))]
    for key, sign in (("score", 1.0), ("rank", -1.0)):
        if len(labels) == 1 and _is_number(value.get(key)):
            yield labels[0], sign * value[key]
    for key, item in value.items():
        name = f"{path} {key}".replace("_", " ")
        if _is_number(item):
            if label := SCORE_OF.search(name):
                yield label[1] or label[2], float(item)
        else:
            yield from _numbers_of(item, name)


def _is_number(item: Any) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool)

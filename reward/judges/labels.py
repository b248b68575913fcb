"""The labels of a verdict: A, B, or `tie`."""

import re

from reward.judges.answer_words import NOUN, SCHOOL_GRADE

TIE = "tie"
CROSSED = re.compile("[❌✗✘✖👎🚫]")  # beside what is not the better one


def lone_label(line: str) -> str | None:
    """The label of a line that has nothing else: "A", "(b).", "Response A"."""
    found = re.fullmatch(rf"\W*(?:(?:the\W+)?(?:{NOUN})[\W_]*)?([AB])\W*", line, re.IGNORECASE)
    other = re.search(r"[?+]", line) or CROSSED.search(line) or SCHOOL_GRADE.search(line)
    return found[1].upper() if found and not other else None


def of_mark(left: str, sign: str | None, right: str | None) -> str:
    """Of `[[A]]`, or of `[[A>>B]]`."""
    if sign is None or right is None:
        return TIE if left == "C" else left
    if sign[0] in "=≈~" or left == right:
        return TIE
    return left if sign[0] in ">≫" else right

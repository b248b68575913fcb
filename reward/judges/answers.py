r"""Reading the verdict in a chat model's answer: which of two responses, A or B, does it call better?

An answer is read in three ways, the surest first; within each the last statement counts.

1. Marks that only a verdict has: `[[A]]`, `[[A>>B]]` and the other labels of Arena-Hard, `\boxed{A}`, a JSON object.
2. Statements: a label by itself on the first or last line, "the better one is A", "B wins", "I prefer A", "Verdict: A".
3. Lines that end in a colon and a label, in any language, where all of them agree; in an answer of one sentence, what
   is said of one side of quality ("A is more helpful"); a sentence of another language that is nothing but a verdict.
4. One score for each: "A: 7/10", "Score B: 4", a JSON object with `score_a` and `score_b`. Equal ones are a tie.
5. An answer that is nothing but "both are bad" or "winner: none" is a tie.

What is not a verdict: the article in "A good answer …", a negation, the worse response, a condition, a concession, a
question, a school grade such as B- or A+. A tie is a statement, too, so that it takes back an earlier verdict.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from reward.judges.answer_words import (
    AFTER_A,
    ALIKE,
    CHINESE_BETTER,
    CHINESE_CONDITION,
    CHINESE_NEGATIVE,
    CHINESE_NOUN,
    CHINESE_TIED,
    CLAUSES,
    CONTRAST,
    EMPHASIS,
    END_TOKENS,
    GRADE,
    GREATER,
    IN_ORDER,
    LABEL,
    LATEX,
    LATEX_SIGN,
    LOSER,
    MARK,
    NAMES_BOTH,
    NEGATIVE,
    NOUN,
    OTHERWISE,
    PAIR,
    PRAISE,
    RANK,
    REASON,
    REFUSAL,
    SAID,
    SCHOOL_GRADE,
    SCORE_IN_PROSE,
    SQUARED,
    STATEMENTS,
    SUBORDINATE,
    THOUGHTS_END,
    THOUGHTS_START,
    TIED,
    UNDECIDED,
    UNSURE,
)
from reward.judges.json_answers import scores_in_json, verdict_in_json
from reward.judges.labels import CROSSED, TIE, lone_label, of_mark
from reward.judges.other_languages import better_of


def without_thoughts(text: str) -> str:
    """The answer without what a reasoning model thought before it; empty if it has not stopped thinking."""
    said = text[ends[-1].end() :] if (ends := list(THOUGHTS_END.finditer(text))) else text
    start = THOUGHTS_START.search(said)
    return (said[: start.start()] if start else said).strip()


def parse_label(text: str) -> str | None:
    """The label, A or B, that an answer calls better; None if it names none, or a tie."""
    found = parse_verdict(text)
    return found if found in ("A", "B") else None


def parse_verdict(text: str) -> str | None:
    """A, B or `tie`, as the answer states it; None if it states nothing that could be understood."""
    said = SCHOOL_GRADE.sub("Q", _in_one_writing(text))
    for read in (_marked, verdict_in_json, _ranked, _stated, _hinted, _in_chinese, _abroad, _scored, _alike):
        if (found := read(said)) is not None:
            return found
    return None


def _in_one_writing(text: str) -> str:
    """What was said, without tokens that end a turn, and with one form of each letter, apostrophe and LaTeX sign."""
    said = END_TOKENS.sub(" ", unicodedata.normalize("NFKC", without_thoughts(text)).translate(SQUARED))
    return LATEX_SIGN.sub(lambda sign: LATEX[sign[1]], said).replace("’", "'").replace("\\_", "_")


def five_way(text: str) -> str | None:
    """Arena-Hard's label, `A>>B`, `A>B`, `A=B`, `B>A` or `B>>A`, of an answer; None if it has none."""
    for mark in reversed(list(MARK.finditer(_in_one_writing(text)))):
        left, sign, right = (part.upper() if part else part for part in mark.groups())
        if sign and left != right:
            if sign[0] in "=≈~":
                return "A=B"
            strong = ">>" if len(sign) == 2 or sign in "≫≪" else ">"
            return f"{left}{strong}{right}" if sign[0] in ">≫" else f"{right}{strong}{left}"
    return None


def _marked(text: str) -> str | None:
    """By the last line with marks; marks of both labels in one line are no verdict."""
    for line in reversed(text.splitlines()):
        if marks := list(MARK.finditer(line)):
            found = {of_mark(*(part and part.upper() for part in mark.groups())) for mark in marks}
            return found.pop() if len(found) == 1 else TIE
    return None


def _ranked(text: str) -> str | None:
    """By its end: a numbered list of both, best first, or a line that has nothing but both in order."""
    lines = [line for line in text.splitlines() if line.strip()]
    ends = [found.groups() for line in lines[-2:] if (found := RANK.fullmatch(line))]
    if [number for number, _ in ends] == ["1", "2"] and ends[0][1] != ends[1][1]:
        return ends[0][1]
    found = IN_ORDER.fullmatch(_plain(lines[-1])) if lines else None
    if found is None or found[1] == found[3]:
        return None
    return of_mark(found[1], ">" if found[2] == "," else found[2], found[3])


def _stated(text: str) -> str | None:
    """By the last statement."""
    lines = [line for line in map(_plain, text.splitlines()) if line.strip(" .-")]
    single = {
        i: label for i, line in enumerate(lines) if not line.rstrip().endswith(":") and (label := lone_label(line))
    }
    if len(set(single.values())) > 1:  # headings, unless one of them is the end of something
        single = {i: label for i, label in single.items() if i == len(lines) - 1 and len(single) < len(lines)}
    found = None
    for i, line in enumerate(lines):
        if lone_label(line):
            found = single[i] if i in single and i in (0, len(lines) - 1) else found
            continue
        sentences = list(_sentences(line))
        for j, sentence in enumerate(sentences):
            edge = (i == 0 and j == 0) or (i == len(lines) - 1 and j == len(sentences) - 1)
            found = _of_sentence(sentence, edge) or found
    return found


def _hinted(text: str) -> str | None:
    """By lines `…: A` of any language that agree; by the one sentence that there is, if it praises one response."""
    lines = [line for line in map(_plain, text.splitlines()) if line.strip(" .-")]
    ends = [re.fullmatch(rf"([^:.!?]{{1,60}}):\W*{LABEL}\W*", PAIR.sub("", _labelled(line)).strip()) for line in lines]
    labels = {m[2] for m in ends if m and not NEGATIVE.search(m[1]) and not GRADE.search(m[1]) and "<" not in m[1]}
    if len(labels) == 1:
        return labels.pop()
    sentences = [sentence for line in lines for sentence in _sentences(line)]
    if labels or len(sentences) != 1 or sentences[0].endswith("?"):
        return None
    heads = [head for clause in CLAUSES.split(sentences[0]) if (head := _head(clause)) is not None]
    found = {m[1] for head in heads for m in PRAISE.finditer(head)}
    return found.pop() if len(found) == 1 else None


def _in_chinese(text: str) -> str | None:
    """By the last clause in Chinese that prefers a response or calls a tie; a condition is no verdict."""
    found = None
    close = re.sub(rf" *{LABEL} *", r"<\1>", _labelled(text))  # some write spaces beside Latin letters
    certain = (part for part in re.split(r"[。!?\n]", close) if not CHINESE_CONDITION.search(part))
    for clause in (clause for part in certain for clause in re.split("[,;]", part)):
        if CHINESE_TIED.search(clause):
            found = TIE
        elif (labels := set(CHINESE_BETTER.findall(clause))) and not CHINESE_NEGATIVE.search(clause):
            one = {left or right for left, right in labels}
            found = one.pop() if len(one) == 1 else TIE
    return found


def _abroad(text: str) -> str | None:
    return better_of(map(_plain, text.splitlines()))


def _alike(text: str) -> str | None:
    """By an answer that is nothing but a word for both or none: "Both are bad", "Winner: none"."""
    return TIE if ALIKE.fullmatch(_plain(text)) else None


def _scored(text: str) -> str | None:
    """By the one score that each response gets, in a JSON object or in prose; with several there is no verdict."""
    scores: dict[str, list[float]] = {"A": [], "B": []}
    for label, score in scores_in_json(text) or _scores_in_prose(text):
        scores[label.upper()].append(score)
    if [len(found) for found in scores.values()] != [1, 1]:
        return None
    a, b = scores["A"][0], scores["B"][0]
    return TIE if a == b else "A" if a > b else "B"


def _scores_in_prose(text: str) -> list[tuple[str, float]]:
    lines = [_labelled(_plain(line)) for line in text.splitlines()]
    return [
        (found[1] or found[3], float(found[2] or found[4]))
        for line in lines
        if not NEGATIVE.search(line)
        for found in SCORE_IN_PROSE.finditer(line)
    ]


def _plain(line: str) -> str:
    """A line without markdown, XML tags as `tag: …`."""
    line = re.sub(r"</[\w:-]+>", "", line)
    line = re.sub(r"<([A-Za-z][\w:-]*)>", r"\1: ", line)
    line = re.sub(r"^\s*(?:>\s+|#+\s*|[-*•]\s+|\d+[.)]\s+)+", "", line)
    return " ".join(re.sub(r"[*`|$\"“”„«»]|(?<!\w)_+|_+(?!\w)", " ", line).split())


def _labelled(text: str) -> str:
    """The text with `<A>` and `<B>` where it speaks of the responses."""

    def label(found: re.Match[str]) -> str:
        return f"<{found[1].upper()}>"

    text = re.sub(rf"\b(?:the )?first (?:{NOUN}|one)\b", "<A>", text, flags=re.IGNORECASE)
    text = re.sub(rf"\b(?:the )?second (?:{NOUN}|one)\b", "<B>", text, flags=re.IGNORECASE)
    # With a noun, "Response A"; in small letters only where no word follows that it could be the article of.
    text = re.sub(rf"\b(?i:(?:the )?{NOUN}s?)[\s_#'(\[]{{1,3}}([AB])(?![\w+])[)\]']?", label, text)
    end = r"(?=\W*$|[.,;:!)]| (?:is|was|wins|won)\b)"
    text = re.sub(rf"\b(?:the )?{NOUN}[\s_]([ab]){end}", label, text, flags=re.IGNORECASE)
    text = re.sub(rf"\b(?:the )?{NOUN}[\s_]*\(([ab])\)", label, text, flags=re.IGNORECASE)
    text = re.sub(rf"(?:{CHINESE_NOUN}) ?([AB])(?![a-zA-Z0-9_])", label, text)
    text = re.sub(r"(?:(?<=[:=→] )|(?<=\bis ))([ab])(?=\W*$)", label, text)
    # By itself; the boundaries hold beside letters of other scripts, too.
    other = r"(?!-\w|\+|&)[^a-zA-Z0-9_\s]"
    text = re.sub(
        rf"(?<![a-zA-Z0-9_<.&+-])(A)(?=\s*$|{other}|\s+(?:[^\w\s]|[^\x00-\u024f]|{AFTER_A}\b|<?B\b))", label, text
    )
    text = re.sub(r"(?<![a-zA-Z0-9_<.&+-])(B)(?![a-zA-Z0-9_+&]|-\w)", label, text)
    text = re.sub(rf"[(\['] ?{LABEL} ?[)\]']", label, text.replace("<<", "<").replace(">>", ">"))
    text = re.sub(rf"{LABEL}'s? (?:{NOUN}|one)\b", label, text, flags=re.IGNORECASE)
    return re.sub(rf"{LABEL}'s\b", r"<\1> is", text)


def _sentences(line: str) -> Iterator[str]:
    yield from (
        part.strip() for part in re.split(r"(?<=[.!?。！？])(?:\s+|$)|(?<=[。！？])", _labelled(line)) if part.strip()
    )


def _of_sentence(sentence: str, edge: bool) -> str | None:
    """What a sentence states. edge: it is the first or last one, where a label needs no verb."""
    if sentence.endswith("?") or any(one.search(sentence) for one in (OTHERWISE, NAMES_BOTH, CROSSED)):
        return None
    found: str | None = None
    sentence = re.sub(r",(?= (?:much|far|way|very|really|clearly)\b)", "", sentence)
    sentence = re.sub(r"\banything but\b", "not", sentence, flags=re.IGNORECASE)
    for clause in CLAUSES.split(sentence):
        said = _of_clause(clause, edge)
        if said is None:
            continue
        # "A is better for some, B is better for others" is no verdict; "A is better written, but B is better" is one.
        found = said if found in (None, said) or CONTRAST.match(clause) or found == TIE else TIE
    refused = REFUSAL.search(sentence) and not TIED.search(sentence)
    return None if found == TIE and refused else found


def _of_clause(clause: str, edge: bool) -> str | None:
    bare = EMPHASIS.sub(" ", clause)
    if (TIED.search(bare) or UNDECIDED.search(bare)) and not re.search(r"\beven (?:better|more|so|though|if)\b", bare):
        return TIE
    head = _head(clause)
    if head is None:
        return None
    labels: set[str] = set()
    for left, sign, right in GREATER.findall(head):
        labels.add(left if sign[0] in ">≫≻" else right)
    head = GREATER.sub(" ", LOSER.sub(" ", head))
    for pattern in (*STATEMENTS, *((SAID,) if edge else ())):
        labels |= set(pattern.findall(head))
        head = pattern.sub(" ", head)
    return None if not labels else labels.pop() if len(labels) == 1 else TIE


def _head(clause: str) -> str | None:
    """What a clause says, without its reason; None for one that says nothing of its own: a condition, a negation."""
    clause = EMPHASIS.sub(" ", PAIR.sub(" ", clause)).strip()
    if SUBORDINATE.match(clause) or UNSURE.search(clause):
        return None
    head = " ".join(REASON.split(clause, maxsplit=1)[0].split())
    return None if NEGATIVE.search(head) or GRADE.search(head) else head

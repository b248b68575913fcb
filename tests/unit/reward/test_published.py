"""Judges' texts in the files that suites publish, against Python's own `format`, which FastChat and Arena-Hard use."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.evaluation.suites import SUITES, Item
from reward.judges import Comparison
from reward.judges.llm import Completion, LLMJudge
from reward.judges.rating import RatingJudge
from reward.judges.templates import JudgePrompt, RatingPrompt
from reward.records import Message
from tests.failures import raises
from tests.runs import write_jsonl

BOTH = "Say [[A]] or [[B]], or [[C]] for a tie."
PAIR = "[User Question]\n{question}\n\n[A]\n{answer_a}\n\n[B]\n{answer_b}"
PAIR_RIGHT = "[User Question]\n{question}\n\n[Right]\n{ref_answer_1}\n\n[A]\n{answer_a}\n\n[B]\n{answer_b}"
SIDE = "### User:\n{question_1}\n\n### {x}:\n{answer_a_1}\n\n### User:\n{question_2}\n\n### {x}:\n{answer_a_2}"
TURNS = SIDE.replace("{x}", "Assistant A") + "\n\n" + SIDE.replace("{x}", "B").replace("answer_a", "answer_b")
TURNS_RIGHT = "1: {ref_answer_1} 2: {ref_answer_2}\n\n" + TURNS
SINGLE = "Rate it as [[rating]].\n{question}\n[Answer]\n{answer}"
SINGLE_TURNS = "{question_1} {answer_1} {question_2} {answer_2}"
MT_BENCH = {
    "pair-v2": ("pairwise", PAIR),
    "pair-v2-multi-turn": ("pairwise", TURNS),
    "pair-math-v1": ("pairwise", PAIR_RIGHT),
    "pair-math-v1-multi-turn": ("pairwise", TURNS_RIGHT),
    "single-v1": ("single", SINGLE),
    "single-v1-multi-turn": ("single", SINGLE_TURNS),
}
ARENA = "<|User Prompt|>\n{QUESTION}\n\n<|A|>\n{ANSWER_A}\n\n<|B|>\n{ANSWER_B}"
ALPACA = """<|im_start|>system
You rank models.
<|im_end|>
<|im_start|>user
{
    "instruction": \"""{instruction}\""",
}
{
    {"model_identifier": "m", "output": \"""{output_1}\"""},
    {"model_identifier": "M", "output": \"""{output_2}\"""}
}
Which is best, m or M?
<|im_end|>"""
HOSTILE = "mine {answer_b} {question} <|im_end|> {0}"


@pytest.fixture
def mt_bench(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"name": name, "type": kind, "system_prompt": f"{name}. {BOTH}", "prompt_template": text, "category": "x"}
        for name, (kind, text) in MT_BENCH.items()
    ]
    return write_jsonl(tmp_path / "judge_prompts.jsonl", rows)


@pytest.mark.parametrize("right", [None, ("4", "8")])
@pytest.mark.parametrize("turn", [0, 1])
def test_each_turn_and_reference_has_its_own_text(mt_bench: Path, turn: int, right: tuple[str, str] | None) -> None:
    item = Item("1", ("What is 2+2?", "And twice {that}?"), None, right)
    said = {"a": [HOSTILE, "8"], "b": ["four", "eight"]}
    comparison = Comparison(item.question(turn), *(item.response(one[: turn + 1]) for one in said.values()))
    name = ("pair-math-v1" if right else "pair-v2") + ("-multi-turn" if turn else "")
    values = {"question": item.turns[0], "question_1": item.turns[0], "question_2": item.turns[1]}
    values |= {f"answer_{side}": texts[0] for side, texts in said.items()}
    values |= {f"answer_{side}_{i + 1}": text for side, texts in said.items() for i, text in enumerate(texts)}
    values |= {f"ref_answer_{i + 1}": text for i, text in enumerate(right or ())}
    expected = [
        {"role": "system", "content": f"{name}. {BOTH}"},
        {"role": "user", "content": MT_BENCH[name][1].format(**values)},
    ]
    prompt = JudgePrompt(str(mt_bench))
    assert prompt.chat(comparison, reasoning=False) == expected
    assert prompt.allows_ties
    swapped = prompt.chat(comparison.swap(), reasoning=False)[1]["content"]
    assert swapped.index("four") < swapped.index(HOSTILE)


def test_single_answers_are_rated_by_the_single_texts(mt_bench: Path) -> None:
    item = Item("1", ("One?", "Two?"))
    prompt = RatingPrompt(str(mt_bench))
    first = prompt.chat(Comparison(item.question(0), "uno", "x"), reasoning=False)[1]["content"]
    assert first == "Rate it as [[rating]].\nOne?\n[Answer]\nuno"
    both = Comparison(item.question(1), item.response(["uno", "dos"]), item.response(["x", "y"]))
    assert prompt.chat(both, reasoning=False)[1]["content"] == "One? uno Two? dos"
    judge = RatingJudge(Says("Rating: [[7]]"), prompt, verdict="text")
    assert judge.compare([both])[0].score_a == 7.0
    assert [chat[0]["role"] for chat in judge._backend.chats] == ["system", "system"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", [ARENA, "{question_1}\n<|A|>\n{answer_1}\n<|B|>\n{answer_2}"])
@pytest.mark.parametrize("as_list", [True, False])
def test_arena_hards_config(tmp_path: Path, text: str, as_list: bool) -> None:
    path = tmp_path / "judge_config.yaml"
    config = {"system_prompt": "End with [[A>>B]], [[A>B]], [[A=B]], [[B>A]] or [[B>>A]].", "temperature": 0}
    path.write_text(json.dumps(config | {"prompt_template": [text] if as_list else text}))
    values = {"QUESTION": "q", "ANSWER_A": "1st", "ANSWER_B": "2nd", "question_1": "q"}
    values |= {"answer_1": "1st", "answer_2": "2nd"}
    chat = JudgePrompt(str(path)).chat(Comparison("q", "1st", "2nd"), reasoning=False)
    assert [message["content"] for message in chat] == [config["system_prompt"], text.format(**values)]
    path.write_text(json.dumps({"prompt_template": text}))  # as of version 2.0, whose system part is in its code
    with raises("invalid", key="judge.template", file=path):
        JudgePrompt(str(path))


class Says:
    """A chat model with given log-probs or text, which keeps what it was asked."""

    identity, batch_size, concurrency = "m", 8, 1

    def __init__(self, text: str, logprobs: dict[str, float] | None = None) -> None:
        self.text, self.logprobs = text, logprobs
        self.chats: list[list[Message]] = []

    def label_logprobs(self, chats: Sequence[list[Message]], labels: Sequence[str]) -> list[Completion]:
        found = None if self.logprobs is None else {x: self.logprobs[x] for x in labels if x in self.logprobs}
        return [Completion("", found, cut=True) for _ in chats]

    def generate(
        self, chats: Sequence[list[Message]], max_tokens: int, temperature: float, seed: int
    ) -> list[Completion]:
        self.chats += chats
        return [Completion(self.text) for _ in chats]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Says("", {"m": math.log(0.6), "M": math.log(0.2), "A": 0.0}), 0.75),  # by hand: 0.6 / (0.6 + 0.2)
        (Says("Both are good.\n\n### Which is best, m or M?\nM"), 0.0),
        (Says("I am sure that it is m"), 1.0),
        (Says("**m**."), 1.0),
        (Says("I prefer A"), None),
        (Says("The first model"), None),
        (Says("", {"A": 0.0}), None),
    ],
)
def test_alpaca_evals_text_and_labels(tmp_path: Path, model: Says, expected: float | None) -> None:
    path = tmp_path / "alpaca_eval_clf.txt"
    path.write_text(ALPACA)
    prompt = JudgePrompt(str(path))
    system, user = prompt.chat(Comparison("Add {a}.", HOSTILE, "theirs"), reasoning=False)
    assert system == {"role": "system", "content": "You rank models."}
    body = ALPACA.split("<|im_start|>user\n")[1].removesuffix("\n<|im_end|>")
    for place, text in (("{instruction}", "Add {a}."), ("{output_2}", "theirs"), ("{output_1}", HOSTILE)):
        body = body.replace(place, text, 1)
    assert user == {"role": "user", "content": body}
    (verdict,) = LLMJudge(model, prompt).compare([Comparison("p", "a", "b")])
    assert (verdict.preference if verdict.is_valid else None) == (expected and pytest.approx(expected))
    with raises("conflict", key="judge.reasoning"):
        LLMJudge(model, prompt, reasoning=True)


def test_a_suite_takes_the_published_text_that_is_in_its_folder(mt_bench: Path) -> None:
    for suite, file in (
        ("mt_bench", mt_bench.name),
        ("arena_hard", "arena-hard-v2.0.yaml"),
        ("alpaca_eval", "clf.txt"),
    ):
        path = mt_bench.parent / file
        path.touch()
        settings: dict[str, Any] = {"judge": "llm:m"}
        SUITES[suite].set_defaults(settings, mt_bench.parent)
        assert settings["judge"]["template"] == str(path)
        settings = {"judge": {"kind": "llm:m", "template": "general"}}
        SUITES[suite].set_defaults(settings, mt_bench.parent)
        assert settings["judge"]["template"] == "general"


def test_what_a_file_lacks_is_said(tmp_path: Path) -> None:
    path = tmp_path / "judge_prompts.jsonl"
    row = {"name": "pair-v2", "type": "pairwise", "system_prompt": BOTH, "prompt_template": PAIR}
    write_jsonl(path, [row])
    item = Item("1", ("One?", "Two?"))
    sides = (item.response(["a", "b"]), item.response(["c", "d"]))
    with raises("invalid", key="judge.template", file=path):  # no text for a second turn
        JudgePrompt(str(path)).chat(Comparison(item.question(1), *sides), reasoning=False)
    with raises("invalid", key="judge.template", file=path):  # nothing that rates
        RatingPrompt(str(path))
    write_jsonl(path, [row | {"prompt_template": PAIR + "{colour}"}])
    with raises("invalid", key="judge.template", file=path):
        JudgePrompt(str(path))
    path.write_text('{"type": "pairwise"}\n')
    with raises("invalid", key="judge.template", file=path):
        JudgePrompt(str(path))


def test_a_template_of_ones_own_has_a_system_part(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja2"
    path.write_text(
        "{% extends 'base.jinja2' %}{% macro system() %}Be strict about {{ messages[0].content }}.{% endmacro %}"
        "{% block task %}Compare.{% endblock %}"
    )
    system, user = JudgePrompt(str(path)).chat(Comparison("rhymes", "a", "b"), reasoning=False)
    assert system == {"role": "system", "content": "Be strict about rhymes."}
    assert user["content"].startswith("Compare.")
    assert "strict" not in user["content"]

"""Verdicts in prose: each sentence with the label that a person reads in it, `tie`, or None for no verdict."""

import pytest

from reward.judges.answers import five_way, parse_label, parse_verdict, without_thoughts
from reward.judges.labels import TIE

SAID = {
    # JSON with an order, small letters in brackets, Chinese
    '{"result": "A=B"}': None, '{"verdict": "B >> A"}': "B", '{"winner": "A < B"}': "B",
    "Output (A) is better.": "A", "Therefore, Output (B) is better.": "B", "Output (a) is worse.": None,
    "我认为回答A更好。": "A", "A回答错误,但B的回答更好。": "B", "回答 A 不好。": None, "两个回答一样好。": None,
    "选择A。": "A", "如果只看长度,A更好。": None, "总体而言,回答B明显优于回答A。": "B", "B不如A。": None,
    "A和B各有优点,难分高下。": None,
    # a label by itself
    "A": "A", " b.": "B", "**A**": "A", "(B)": "B", "Response A": "A", "response_b": "B", "Assistant B.": "B",
    "“A”": "A", "`B`": "B", "### B": "B", "> A": "A", "- **Response B**": "B", "The answer\nB": "B",
    "A.\n\nExplanation: it is correct.": "A", "B\n\nB gives the right year, which the other does not.": "B",
    "I compared both.\n\nA": "A", "Ａ": "A", "A!": "A", "A. Because it is more accurate.": "A",
    "**Response A**\nIt is short.\n\n**Response B**\nIt is long.\n\n**B**": "B",
    # keywords
    "The better response is B.": "B", "Verdict: A": "A", "My answer is Response B, because it is short.": "B",
    "The better response is A because it is accurate.": "A", "Answer: A is better": "A", "Final verdict: **B**": "B",
    "Winner: Response A": "A", "The winner is clearly Assistant B.": "B", "Overall, the stronger answer is A.": "A",
    "Better: B": "B", "My final decision is Response A.": "A", "The verdict goes to B.": "B",
    "Preferred response: (A)": "A", "<verdict>B</verdict>": "B", "<answer>\nA\n</answer>": "A",
    "Final answer → B": "B", "| Winner | A |": "A", "The better of the two is A.": "A", "Best answer = B": "B",
    "Final Answer: Option B": "B", "My choice: A.": "A",
    # a response that is better, wins, is preferred
    "Response B is better.": "B", "A is better.": "A", "I prefer Response B.": "B", "Answer B wins.": "B",
    "Assistant A is the preferred one.": "A", "Response A is clearly the better response.": "A",
    "B clearly wins here.": "B", "A beats B.": "A", "Response B outperforms Response A.": "B", "I'd go with A.": "A",
    "I would choose Response B over A.": "B", "B is superior to A.": "B", "Response A is better than Response B.": "A",
    "A > B": "A", "B >> A": "B", "A < B": "B", "A's answer is better.": "A", "B is my pick.": "B", "I think B.": "B",
    "It's A.": "A", "Definitely B": "B", "Summary B is the stronger summary.": "B", "Response A gets my vote.": "A",
    "Model B does a better job.": "B", "The second response is better.": "B", "I find Response A to be better.": "A",
    "My vote goes to B.": "B", "A is better, no doubt.": "A", "Response B comes out ahead.": "B",
    "I am in favor of A.": "A", "A better than B.": "A", "Response A is preferable.": "A", "I prefer A to B.": "A",
    "I lean towards B.": "B", "Between A and B, B is better.": "B", "Response B is more helpful.": "B",
    "A is better written.": "A", "Without a doubt, A is the best.": "A",
    # clauses: concessions, reasons and contrasts
    "Although A is better written, B is the better answer.": "B",
    "While Response A is longer, Response B is better.": "B", "B is better, although A is more detailed.": "B",
    "Both are good, but A is better.": "A", "A is better, not B.": "A",
    "A is well written but B is better overall.": "B", "Since A is incorrect, B is better.": "B",
    "A is better because it does not ramble.": "A", "It is not that A is bad, but B is better.": "B",
    "Compared to A, B is better.": "B", "A is better; B is worse.": "A", "Neither is perfect, but B is better.": "B",
    # the last statement
    "At first A looks fine. In the end, Response B is better.": "B", "A is better in tone. Overall, B wins.": "B",
    "Accuracy: A\nStyle: A\nOverall: B": "B", "Response A is better. No, wait: Response B is better.": "B",
    "A is better.\n\nVerdict: B": "B", "Winner: B\n\nFinal verdict: A": "A",
    # marks
    "[[A]]": "A", "My final verdict is: [[B]]": "B", "[[A>>B]]": "A",
    "My final verdict is tie or better: [[B>A]]": "B", "[[B>>A]]": "B", "[[A<B]]": "B", "$\\boxed{A}$": "A",
    "\\boxed{\\text{B}}": "B", "A is better in tone.\n[[B]]": "B", "【B】": "B", "[[A]] so far.\nNo: [[B]]": "B",
    "\\boxed{Response A}": "A", '{"winner": "A"}': "A",
    '```json\n{"reason": "B is long", "verdict": "Response A"}\n```': "A", '{"better": "B", "worse": "A"}': "B",
    '{"result": {"winner": "model_b"}}': "B",
    # both, in order
    "A>B": "A", "B < A": "A", "Ranking: [B, A]": "B", "Verdict: Response B > Response A": "B",
    "Ranking:\n1. A\n2. B": "A", "1. Response A\nIt is good.\n2. Response B\nIt is long.\nVerdict: B": "B",
    "Style: A > B\nVerdict: B": "B",
    "A - it is clearer": "A", "A is better (A- against B+).": "A", "-A": "A", "Verdict: A->B\nB": "B",
    # other languages
    "答案：A": "A", "Antwort: B": "B", "Réponse : A": "A", "Ответ: B": "B", "正解：**B**": "B",
    "La mejor respuesta: A.": "A",
    # thoughts
    "</think>\n\nA": "A", "<think>B is better, or is it?</think>A": "A",
    "<think>\nA wins\n</think>\nResponse B is better.": "B", "[THINK]A[/THINK]B": "B",
    "<think>The better one is A": None,
    # no verdict
    "I think both are good": None, "A better response would be shorter": None, "": None, "C": None, "Neither": None,
    "A good answer would be shorter.": None, "A clear and better answer would say why.": None,
    "The worse answer is A": None, "Response A is worse.": None, "A is not better.": None,
    "I don't think Response B is better.": None, "Loser: B": None, "Response B is not the better answer": None,
    "B is never better": None, "Is Response A better?": None, "Rejected: A": None,
    "I'm sorry, but I can't help with that.": None, "As an AI, I have no opinion on A or B.": None,
    "Weaker response: B": None, "A would be better if it were shorter.": None, "If B is better, then say so.": None,
    "Which one is better, A or B?": None, "Some people might say A is better.": None,
    "Response A could be better.": None, "Grade: B": None, "A+": None,
    "B-": None, "B−.": None, "**A-**": None, "[[B-]]": None, '{"winner": "B-"}': None, "Verdict: B- because": None,
    "Option A+": None, "A±": None, "A-\nGood work": None, "Response A: A-\nResponse B: B+": None, "not A": None,
    "Response A:\nIt is good.\nResponse B:\nIt is long.": None, "Accuracy: A\nStyle: B": None, "Answer A or B.": None,
    "Response A is less helpful.": None, "Neither A nor B is better.": None, "A is inferior to B": None,
    "Either A is better or B is better.": None, '{"winner": "none"}': None, "A and B are equal": None,
    "Vitamin B-12": None, "I cannot choose between A and B.": None, "It is a tie.": None,
    "A is better. No, it is a tie.": None, "[[A]] or [[B]]": None,
    "It depends: A is better for children, B is better for adults.": None, "A/B": None, '{"winner": "tie"}': None,
    "[[A=B]]": None, "[[C]]": None, "Both responses are equally good.": None, "Answer with one letter, A or B.": None,
    "Neither response is better.": None, "A user asked for help": None, "A = B": None,
    "If accuracy matters, A; otherwise B.": None, "I can't say that B is better.": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "tied"),
    [
        ("As an AI, I cannot compare these. A responsible answer requires care.", False),
        ("I can't say that B is better.", False),
        ("I'm unable to judge this content.", False),
        ("A = B", True),
        ("I cannot choose between A and B.", True),
    ],
)
def test_a_refusal_is_no_tie(text: str, tied: bool) -> None:
    assert parse_verdict(text) == (TIE if tied else None)


@pytest.mark.parametrize("text", SAID)
def test_the_label_that_an_answer_states(text: str) -> None:
    assert parse_label(text) == SAID[text]


@pytest.mark.parametrize("text", [text for text, label in SAID.items() if label])
def test_the_other_label_is_read_as_surely(text: str) -> None:
    """A and B change places, in marks and words: nothing is read by the letter. Articles stay what they are."""
    turned = text.translate(str.maketrans("ABＡ", "BAＢ")).replace("Bn ", "An ").replace("Bt first", "At first")
    turned = (
        turned.replace("response_b", "response_a")
        .replace("model_b", "model_a")
        .replace(" b.", " a.")
        .replace("second", "first")
    )
    for word in ("lthough", "nswer", "ssistant", "ccuracy", "ntwort"):
        turned = turned.replace(f"B{word}", f"A{word}")
    for word in ("etter", "est", "oth", "etween", "ecause"):
        turned = turned.replace(f"A{word}", f"B{word}")
    assert parse_label(turned) == {"A": "B", "B": "A"}[str(SAID[text])]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("My final verdict is: [[A>>B]]", "A>>B"), ("[[A>B]]", "A>B"), ("[[A=B]]", "A=B"), ("[[B>A]]", "B>A"),
        ("[[B>>A]]", "B>>A"),
        ("[[A<<B]]", "B>>A"), ("[[a>b]]", "A>B"), ("[[A>B]] no, [[B>A]]", "B>A"), ("[[A]]", None), ("A>>B", None),
        ("<think>[[A>>B]]</think>[[A=B]]", "A=B"),
    ],
)  # fmt: skip
def test_the_five_labels_of_arena_hard(text: str, label: str | None) -> None:
    assert five_way(text) == label


@pytest.mark.parametrize(
    "text",
    [
        "[[A=B]]",
        "[[C]]",
        '{"winner": "tie"}',
        "It is a tie.",
        "A is better. No, it is a tie.",
        '{"result": "A=B"}',
        "两个回答一样好。",
    ],
)
def test_a_tie_is_a_statement(text: str) -> None:
    assert parse_verdict(text) == "tie"


@pytest.mark.parametrize(("text", "label"), [("Output (a) is better.", "A"), ("So Output (b) is better.", "B")])
def test_small_letters_in_brackets(text: str, label: str) -> None:
    assert parse_label(text) == label


def test_thoughts_that_do_not_end_leave_nothing() -> None:
    assert without_thoughts("<think>so A, then") == ""
    assert without_thoughts("plain") == "plain"
    assert without_thoughts("so A</think> B") == "B"


def test_a_long_answer_is_read_in_no_time() -> None:
    """Nothing in the patterns grows faster than the text: a model that repeats itself must not stop the evaluation."""
    assert parse_label("A is good and " * 5000 + ". " + "Response A has words " * 5000 + ".\nB") == "B"


OTHERS = {
    # sentences of other languages; with anything else in them they are no verdict
    "Die bessere Antwort ist B.": "B",
    "Antwort B ist deutlich besser.": "B",
    "Antwort B ist nicht besser.": None,
    "Wenn es kurz sein soll, ist A besser.": None,
    "La mejor respuesta es A.": "A",
    "La respuesta B es mejor.": "B",
    "La respuesta A no es mejor.": None,
    "La meilleure réponse est la réponse A.": "A",
    "La réponse B est meilleure que la réponse A.": "B",
    "La réponse B n'est pas meilleure.": None,
    "A resposta B é melhor.": "B",
    "A é melhor.": "A",
    "La risposta migliore è la B.": "B",
    "Antwoord B is beter.": "B",
    "Ответ B лучше, чем ответ A.": "B",
    "Лучше ответ A.": "A",
    "Ответ A не лучше.": None,
    "回答Aの方が優れています。": "A",
    "回答Bがより良いです。": "B",
    "回答Aは良くないです。": None,
    "답변 B가 더 좋습니다.": "B",
    "답변 B가 더 좋지 않습니다.": None,
    "Beide sind lang. Antwort A ist besser.": "A",
    "Ich bevorzuge Antwort A.": "A",
    "Je préfère la réponse B.": "B",
    "Je ne préfère pas la réponse B.": None,
    "Prefiero la respuesta B.": "B",
    "Odpověď B je lepší.": "B",
    "Vastaus A on parempi.": "A",
    "Răspunsul B este mai bun.": "B",
    "Η απάντηση A είναι καλύτερη.": "A",
    "Câu trả lời A tốt hơn.": "A",
    "Jawaban A lebih baik.": "A",
    "คำตอบ B ดีกว่า": "B",
    "उत्तर B बेहतर है": "B",
    "الإجابة A أفضل": "A",
    "『B』の方が優れています。": "B",
    "更好的是A": "A",
    "A 优于 B": "A",
    "B 更胜一筹": "B",
    "Antwort A ist die bessere Wahl.": "A",
    "Antwort A gewinnt.": "A",
    "Antwort A gewinnt nicht.": None,
    "Gana la respuesta B.": "B",
    "A比B好": "A",
    "A不比B好": None,
    # ties
    "Unentschieden": "tie",
    "Beide Antworten sind gleich gut.": "tie",
    "Es ist kein Unentschieden.": None,
    "Empate": "tie",
    "Ambas respuestas son igualmente buenas.": "tie",
    "Égalité": "tie",
    "ничья": "tie",
    "引き分け": "tie",
    "무승부": "tie",
    "Both are bad": "tie",
    "Neither.": "tie",
    "Winner: None": "tie",
    "Both are bad. But A is better.": "A",
    "Both are bad. B tries harder.": None,
    # a refusal, a list of both, and a cross are none
    "As an AI, I cannot choose.": None,
    "I'm sorry, I can't choose.": None,
    "I'm sorry to say it, but A is better.": "A",
    "Sorry, this is a tie.": "tie",
    "I apologize, but both are equally good.": "tie",
    "Sorry, B.": "B",
    "- A\n- B": None,
    "B, A": None,
    "B ❌": None,
    "A ✅\nB ❌": "A",
    # as a computer writes
    r"\boxed{\mathrm{B}}": "B",
    r"\boxed{\textbf{A}}": "A",
    r"\boxed{A \succ B}": "A",
    "A<|eot_id|>": "A",
    "🅱️": "B",
    '{"ranking": [{"model": "A", "rank": 2}, {"model": "B", "rank": 1}]}': "B",
    '[{"response": "A", "score": 3}, {"response": "B", "score": 1}]': "A",
    "Hands down B": "B",
    "I'd pick A any day over B": "A",
    # a score for each
    "Response A: 7/10\nResponse B: 9/10": "B",
    "A: 7/10, B: 7/10": "tie",
    "Score A: 4\nScore B: 2.5": "A",
    "A: 7/10 for tone\nB: 9/10 for tone\nA: 3/10 for facts": None,
    "A: 7/10": None,
    "A fails: 7/10. B: 6/10": None,
    "A: 7/10, B: 9/10, but A is better.": "A",
    '{"score_a": 7, "score_b": 9}': "B",
    '{"A": 1, "B": 2}': None,
    '{"scores": {"A": 8, "response_b": 6.5}, "why": "x"}': "A",
    '{"score_a": 7, "score_b": 9, "winner": "A"}': "A",
    '{"response_a_rating": 3, "response_b_rating": 3}': "tie",
    '{"score_a": null, "score_b": 9}': None,
}


@pytest.mark.parametrize("said", OTHERS)
def test_verdicts_of_other_languages_and_scores(said: str) -> None:
    assert parse_verdict(said) == OTHERS[said]

"""Verdicts in languages other than English: a sentence that says which response is better, or that none is.

Only such sentences are read: the response as A or B, a word for "better" or "I prefer", and the small words between
them; or a word for a tie. So a negation, a condition or a reason is no verdict; it is never read as the wrong one.
Chinese is read by `answers`.
"""

import re
import unicodedata
from collections.abc import Iterable

from reward.judges.answer_words import joined
from reward.judges.labels import TIE

_ARTICLE = "(?:die|der|das|den|la|el|le|les|a|o|il|lo|de|het|en|l')"
_NOUN = joined("""(?:antwort|respuesta|opción|réponse|option|resposta|opção|risposta|opzione|antwoord|optie|odpowiedź
    |svar|svaret|ответ|вариант|відповідь|yanıt|cevap|odpověď|vastaus|răspunsul|η απάντηση|απάντηση|câu trả lời|phản hồi
    |jawaban|respons|คำตอบ|उत्तर|जवाब|الإجابة|الاجابة|الرد|پاسخ|תשובה|válasz|wahl|elección|choix|escolha|scelta|keuze|выбор|assistent|asistente|assistente|ассистент|modell|modelo|modèle|modello
    |model)""")
_IS = "(?:ist|wäre|es|est|é|è|is|jest|är|er|je|on|este|είναι|היא|هي|—|это|-|:)"
_VERY = joined("""(?:deutlich|klar|eindeutig|insgesamt|etwas|claramente|mucho|ligeramente|nettement|clairement
    |légèrement|bien|chiaramente|leggermente|duidelijk|явно|намного|немного|значительно|в целом|klart)""")
_BETTER = joined("""(?:besser|bessere|beste|mejor|meilleure?|migliore|melhor|beter|betere|lepsza|lepszy|najlepsza|bättre
    |bäst|bedre|bedst|best|лучше|лучший|лучшая|краще|кращий|daha iyi|lepší|nejlepší|parempi|paras|mai bun
    |καλύτερη|tốt hơn|lebih baik|ดีกว่า|बेहतर(?: है)?|أفضل|الأفضل|بهتر است|טובה יותר|jobb)""")
_PREFER = joined("""(?:ich (?:bevorzuge|wähle|nehme)|je (?:préfère|choisis)|(?:yo )?(?:prefiero|elijo)
    |(?:eu )?(?:prefiro|escolho)|preferisco|scelgo|ik (?:kies|verkies)|я (?:предпочитаю|выбираю)|wolę|wybieram
    |jag föredrar|jeg foretrækker)""")
_WINS = "(?:gewinnt|gana|gagne|vince|vence|ganha|wint|выигрывает|побеждает|wygrywa|vinner|vinder|kazanır)"
_TIE = re.compile(
    joined("""(?:es ist )?(?:ein )?(?:unentschieden|gleichstand)|(?:es (?:un )?)?empate|(?:un )?(?:pareggio|parità)
    |(?:c'est (?:une )?)?(?:égalité|match nul)|gelijkspel|ничья|нічия|remis|remíza|oavgjort|uafgjort|tasapeli|egalitate
    |berabere|ισοπαλία|döntetlen|hòa|seri|เสมอกัน|تعادل|बराबर|引き分け(?:です)?|同点(?:です)?|무승부(?:입니다)?|동점(?:입니다)?
    |beide(?: antworten)? sind gleich(?: gut|wertig| stark)?
    |ambas(?: respuestas)? son (?:iguales|igual(?:mente)?(?: de)? buenas)
    |les deux(?: réponses)? (?:se valent|sont équivalentes)|beide(?: antwoorden)? zijn even goed
    |ambas(?: as respostas)? são igualmente boas
    |entrambe(?: le risposte)? sono (?:equivalenti|ugualmente (?:buone|valide))
    |оба(?: ответа)? (?:одинаково хороши|равноценны)"""),
    re.IGNORECASE,
)
_THAN = f"(?: (?:als|que|di|dan|чем|che|än|end|ніж) (?:{_ARTICLE} ?)?(?:{_NOUN} )?)"


def _sentence(pattern: str) -> re.Pattern[str]:
    """`#` is the better response, `%` the other one; their letters are capitals, unlike articles."""
    pattern = unicodedata.normalize("NFKC", pattern)  # as answers are
    return re.compile(pattern.replace("#", "(?-i:([AB]))").replace("%", "(?-i:[AB])"), re.IGNORECASE)


_SENTENCES = (
    # La respuesta B es mejor; Ответ B лучше, чем ответ A
    _sentence(
        rf"(?:{_ARTICLE} ?)?(?:{_NOUN} )?# (?:{_IS} )?(?:{_VERY} )?(?:{_ARTICLE} ?)?{_BETTER}(?: {_NOUN})?(?:{_THAN}%)?"
    ),
    # Die bessere Antwort ist B; Лучше ответ A
    _sentence(rf"(?:{_VERY} )?(?:{_ARTICLE} ?)?{_BETTER}(?: {_NOUN})? ?(?:{_IS} )?(?:{_ARTICLE} ?)?(?:{_NOUN} )?#"),
    # La réponse la meilleure est A; la risposta migliore è B
    _sentence(rf"(?:{_ARTICLE} ?)?{_NOUN} (?:{_ARTICLE} ?)?{_BETTER} {_IS} (?:{_ARTICLE} ?)?(?:{_NOUN} )?#"),
    # Antwort A gewinnt; gana la respuesta B
    _sentence(rf"(?:{_ARTICLE} ?)?(?:{_NOUN} )?# {_WINS}"),
    _sentence(rf"{_WINS} (?:{_ARTICLE} ?)?(?:{_NOUN} )?#"),
    # Ich bevorzuge die Antwort A; prefiero la respuesta B
    _sentence(rf"{_PREFER} (?:{_ARTICLE} ?)?(?:{_NOUN} )?#(?:{_THAN}%)?"),
    re.compile(
        joined(r"""(?:回答|応答|返答|答え|アシスタント|選択肢)? ?([AB])(?:の(?:方|ほう|回答))?[がは]
        (?:より|明らかに|全体的に)*(?:優れて(?:います|いる)|(?:良い|よい|いい|好ましい)(?:です)?)""")
    ),
    re.compile(
        joined(r"""(?:답변|응답|대답|선택지)? ?([AB])(?:의 답변)?[가이는은]? ?(?:훨씬[ ]|조금[ ])?(?:더|훨씬)[ ]
        (?:좋습니다|좋다|좋아요|낫습니다|낫다|나아요|우수합니다|우수하다|훌륭합니다|적절합니다)""")
    ),
)


def better_of(lines: Iterable[str]) -> str | None:
    """A, B or `tie`, as the last sentence says that is a verdict in another language; None where there is none."""
    found = None
    for line in lines:
        for sentence in re.split(r"[.!。！]+\s*", line):
            bare = " ".join(re.sub(r"[()\[\]„“”]|,(?= )", " ", re.sub("[「」『』]", "", sentence)).split())
            matches = (pattern.fullmatch(bare) for pattern in _SENTENCES)
            found = next((match[1] for match in matches if match), TIE if _TIE.fullmatch(bare) else found)
    return found

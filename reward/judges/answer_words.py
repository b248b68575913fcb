"""The words by which `answers` reads a verdict. `<A>` and `<B>` are where an answer speaks of a response."""

import re


def joined(pattern: str) -> str:
    """A pattern that is written over several lines."""
    return "".join(line.strip() for line in pattern.splitlines())


def words(pattern: str) -> re.Pattern[str]:
    """Any of the words or phrases, whole and in any case."""
    return re.compile(rf"\b(?:{joined(pattern)})\b", re.IGNORECASE)


LABEL = r"<([AB])>"
NOUN = joined(r"""(?:response|answer|option|assistant|summary|model|candidate|choice|reply|output|completion|version
    |text|ai|chatbot)""")
GOOD = r"(?:better|best|superior|stronger|strongest)"
# What names a verdict, before a colon or "is", and as a key of JSON.
KEY = joined(r"""(?:winner|verdict|answer|better|best|choice|chosen|prefer\w*|label|decision|judge?ment|result|selection
    |selected|pick|conclusion|vote|overall|final|favou?rite|superior|stronger|winning)""")

# A bare A is a label before these words; before any other it is an article.
AFTER_A = joined(r"""(?:(?:\w+ly|also|still|just|by far|far|much|slightly|overall|indeed|thus|therefore|always|then) )*
    (?:is|was|wins?|won|beats?|has|had|does|did|gets?|got|seems?|appears?|looks?|feels?|takes?|comes?|provides?|gives?
    |offers?|answers?|addresses|deserves|outperforms|outshines|surpasses|exceeds|edges|over|than|to|and|or|nor|vs|versus
    |because|since|as|due|but|by|with|would|should|will|can|could|may|might|must|in|for|rather|instead|better than|being
    |while|although|though|isn't|wasn't|doesn't|won't|overall|fails?|lacks?|loses?|lost|follows|contains|covers|includes
    |makes|stays|shows|any (?:day|time)|hands down|easily|(?:better|more|higher)(?=\W*$))""")

# A clause with one of these says of a label that it is not the better one, or nothing.
NEGATIVE = re.compile(
    joined(r"""\b(?:worse|worst|los(?:es?|er|ing|t)|inferior|weak(?:er|est)|less|least|poor(?:er|est)?|fails?|failed|bad
    |wrong|incorrect|reject\w*|dispreferred|dislike\w*|discard\w*|eliminate\w*|unhelpful|runner|second[- ]best|not|never
    |neither|nor|no|none|cannot|cant|hardly|without|unable|refuse\w*|nothing|nobody|far from|avoid)\b|n't\b"""),
    re.IGNORECASE,
)
UNSURE = words(r"""either|whichever|whether|initially|at first|first glance|expected?|supposed|claims?|pretends?|if
    |unless
    |some (?:people|users|may|might|would)|(?:one|you) (?:may|might|could)|others|so (?:is|was|does)
    |(?:could|can|needs? to|has to|have to|should|must) (?:be|do|have been) (?:much |even )?better
    |to (?:decide|determine|choose|see|say)""")
SCHOOL_GRADE = re.compile(r"(?<![A-Za-z0-9_])[AB][-+−±](?![\w<>=+−-])", re.IGNORECASE)
GRADE = words(r"(?:grade|score|rating|mark|point|level|part|section|step|type|class)s?")
# What looks like a negation or a condition, and is none.
EMPHASIS = words(r"""no doubt|without (?:a |any )?(?:doubt|question|hesitation)|no question|not only|not even close
    |doubtless|no contest|beyond doubt|cannot be beaten|not by much|nonetheless|nevertheless
    |if (?:forced|pressed|pushed|anything|only \w+)(?: to \w+)?
    |if (?:i|we|one) (?:had|have|were|was|must|needed) (?:to )?\w+(?: one)?""")
TIED = words(r"""ties?|tied|draw|equal|equivalent|undecided|depends|toss[- ]up
    |equally (?:good|well|strong|helpful|bad|valid|matched|harmless|correct)
    |(?:both|they) are (?:the same|identical|alike|comparable)|no (?:clear |real |single )?(?:winner|preference)
    |neither\b.*\b(?:better|best|wins?|preferred|superior|winner)|not (?:really |clearly )?(?:better|worse) (?:or|nor
    |than)""")
# It is a tie, too, unless it is one of those who will not judge.
UNDECIDED = words(r"""(?:cannot|can't|can not|could not|unable to|won't|hard to|impossible to|refuse to) (?:really )?
    (?:decide|determine|choose|say(?! that)|pick|tell)""")
REFUSAL = words(
    r"as an? (?:ai|assistant|(?:large )?language model)|sorry|apologi[sz]e|against my|polic(?:y|ies)|comply"
)
_BOTH = rf"(?:(?:both|neither|none)(?: of (?:them|the (?:two|{NOUN}s)))?|all)(?: (?:the )?{NOUN}s?)?"
ALIKE = re.compile(
    rf"(?:[^:]*\b{KEY}\b[^:]*(?::| is) ?)?{_BOTH}(?: (?:are|is|were|was)(?: \w+)? (?:good|bad|poor|great|terrible|awful"
    r"|fine|wrong|unhelpful|incorrect|unacceptable|harmful))?\W*",
    re.IGNORECASE,
)
NAMES_BOTH = re.compile(rf"^{LABEL}[\s,;/&]*(?:and |or )?{LABEL}[.!]?$")  # names them, and says nothing
OTHERWISE = re.compile(r"\bif\b.*\b(?:otherwise|else)\b", re.IGNORECASE)
# A line of a numbered list, and one that has both in order: "1. B", "Ranking: [B, A]", "A > B".
RANK = re.compile(rf"\W*([12])[.):]\W*(?:(?:{NOUN})\W*)?([AB])\W*")
IN_ORDER = re.compile(
    rf"(?:[^:]*\b(?i:rank\w*|order|verdict|final|overall|result|preference)\b[^:]*:)?\W*(?:(?i:{NOUN}) )?([AB]) ?"
    rf"([<>=≈≫≪]{{1,2}}|,(?=[^\]]*\])) ?(?:(?i:{NOUN}) )?([AB])\W*"
)

CLAUSES = re.compile(r"[,;—–]|\s-\s|(?=\b(?:but|however|although|though|while|whereas)\b)", re.IGNORECASE)
CONTRAST = re.compile(
    r"\s*(?:but|however|yet|overall|ultimately|still|so|therefore|thus|hence|finally|in the end)\b", re.IGNORECASE
)
SUBORDINATE = re.compile(
    joined(r"""(?:and |but |so |even )?(?:although|though|while|whereas|if|unless|whether|because|since|given|despite
    |when
    |as (?!a result|for me|such|the (?:judge|better))|in spite|had|were|where|which|who|whose|for)\b"""),
    re.IGNORECASE,
)
REASON = words(r"""because|since|due to|given|as (?:it|they|the|its|their|he|she)|although|though|while|whereas|when
    |where
    |which|whose|who|so that|in that|thanks to|despite|even if""")

# "better" is a verdict before these, and one side of quality before others: "better written", "better for beginners".
_FULL = joined(rf"""(?=$|\W*$| ?(?:[,.:;!)]|to <|on the whole|in (?:every|all|general|my)\b|(?:than|{NOUN}|one|choice
    |pick
    |job|work|overall|of|by|here|and|because|quality|again|today|compared|as)\b))""")
_IS = joined(r"""(?:(?:is|was|are|would be|must be|has to be|should be|will be|goes to|seems to be|remains|in|of|for|two
    |the two|both|these|here|clearly|definitely|therefore|thus|again|to be|:|=|->|→|⇒|-|\W) ?)*""")
_THING = rf"(?: (?:{NOUN}s?|one|overall|final|quality|verdict|choice|pick))*"
STATEMENTS = tuple(
    re.compile(joined(pattern), re.IGNORECASE)
    for pattern in (
        # A key: the better response is A, verdict: A
        rf"\b{KEY}\b{_THING} ?{_IS}(?:the )?{LABEL}",
        # A choice: I prefer A
        rf"""\b(?:prefer\w*|choos\w*|chose|pick\w*|select\w*|favou?r\w*|vot(?:e|es|ing|ed) (?:for|goes to)|recommend\w*
        |go(?:es|ing)? (?:with|for|to)|went with|rather (?:have|take|use|read)|opt(?:s|ed)? for|lean\w* (?:towards?|to)
        |giv\w* (?:it|this|the (?:win|edge|point)|my vote) to|in favou?r of|preference(?: is)? for|sid(?:e|ing) with
        |settle\w* on|decid\w* (?:on|for)|crown\w*|award\w*(?: it to)?) (?:(?:the|for|me|towards?|to) )*{LABEL}""",
        # A rank: I rate A higher
        rf"""\b(?:rat(?:e|ing)|rank|lik(?:e|ing)|consider|find|score|hold|deem|judge|think|believe|put|see)\w* {LABEL}
         (?:\w+ ){{0,4}}?(?:higher|highest|more|most|above|first|{GOOD})\b""".replace("\n         ", " "),
        # A verb: A wins
        rf"""{LABEL} (?:\w+ ){{0,3}}?(?:wins?|won|beats?|outperforms?|outshines|surpasses|exceeds|outdoes|edges out
        |ahead
        |chosen|selected|victorious|(?:gets?|has|takes|deserves) (?:(?:my|the) (?:vote|win|preference|edge|nod)|it
        |this one)
        |is what i|(?:is|was|would be|remains) (?:my|the) (?:\w+ ){{0,2}}?(?:choice|pick|preference|answer|verdict
        |selection
        |one))\b""",
        # An adjective: A is better
        rf"{LABEL}[^<>]*?\b(?:{GOOD}{_FULL}|prefer(?:red|able)\b|winn(?:er|ing)\b|favou?red\b|favou?rite\b)",
    )
)
# A label at the end of the first or last sentence: "I'd say A", "Therefore, A".
SAID = re.compile(
    joined(rf"""(?:\b(?:say|think|guess|believe|suppose|it'?s|it is|that'?s|is|be|definitely|probably|clearly|certainly
    |obviously|surely|go|hands down|easily)\b,?|^(?:and|so|then|hence|thus|therefore|but|overall|finally
    |with)?) ?(?:the )?{LABEL}\W*$"""),
    re.IGNORECASE,
)
PRAISE = re.compile(
    joined(rf"""{LABEL}[^<>]*?\b(?:{GOOD}\b|mo(?:re|st) (?:helpful|harmless|useful|accurate|correct|appropriate
    |effective
    |honest|relevant|truthful))"""),
    re.IGNORECASE,
)
GREATER = re.compile(rf"{LABEL} ?(>>?|≫|≻|<<?|≪) ?{LABEL}")
PAIR = re.compile(r"(?:between )?<[AB]> ?(?:and|or|nor|&|/|vs\.?|versus) ?<[AB]>", re.IGNORECASE)
LOSER = re.compile(
    joined(r"""\b(?:over|than|against|instead of|rather than|compared (?:to|with)
    |(?:(?<=preferred )|(?<=preferable )|(?<=superior ))to) <[AB]>"""),
    re.IGNORECASE,
)

_SCORE = "(?:score|rating|points|grade|mark)s?"
# Keys of JSON that hold a response's score, a path of words: `score a`, `response b score`, `scores a`.
SCORE_OF = re.compile(rf"\b{_SCORE}(?: (?:of|for))?(?: {NOUN})? ?([AB])$|\b(?:{NOUN} )?([AB]) {_SCORE}$", re.IGNORECASE)
# "<A>: 7/10" or "Score of <A>: 7".
SCORE_IN_PROSE = re.compile(
    rf"{LABEL}(?: {_SCORE})?\W{{0,3}}(\d+(?:\.\d+)?) ?/ ?\d+|\b{_SCORE}(?: (?:of|for))? {LABEL} ?[:=] ?(\d+(?:\.\d+)?)",
    re.IGNORECASE,
)

CHINESE_NOUN = "回答|答案|回复|答复|响应|助手|选项|模型"
CHINESE_BETTER = re.compile(
    rf"<([AB])>的?(?:{CHINESE_NOUN})?(?:明显|显然|总体上|整体上|稍微|略)?(?:更好|更优|更佳|较好|较优|胜出|获胜|略胜|更胜一筹|优于|好于|胜过"
    r"|比<[AB]>(?:的(?:回答|答案))?(?:更|要|明显|略)*(?:好|优|佳|强))"
    r"|(?:(?:更好|更优|更佳|较好|较优)的(?:回答|答案)?(?:是|为)|选择|选|更喜欢|更倾向于|倾向于|支持|胜者是|获胜者是)(?:了)?<([AB])>"
)
CHINESE_TIED = re.compile("一样好|同样好|平局|平手|不分上下|难分高下|不相上下|没有明显(?:差异|区别|优劣)")
CHINESE_NEGATIVE = re.compile("不|没|未|并非|虽然|尽管|难以|无法")
CHINESE_CONDITION = re.compile("如果|假如|要是|是否|哪个")

MARK = re.compile(
    joined(r"""(?:\[\[|【|\\boxed\s*\{)\s*(?:\\(?:text|math|rm|bf)\w*\s*\{)?\s*(?:(?:response|answer|option|assistant|model)[\s_]+)?
    ([ABC])\s*(?:([<>=≈~≫≪]{1,2})\s*([AB])\s*)?(?:\]\]|】|\})"""),
    re.IGNORECASE,
)
LATEX = {"succ": ">", "gg": ">>", "prec": "<", "ll": "<<", "approx": "=", "sim": "=", "gt": ">", "lt": "<"}
LATEX_SIGN = re.compile(rf"\\({'|'.join(LATEX)})\b")
END_TOKENS = re.compile(r"<\|[\w-]+\|>|</?s>|<(?:end_of_turn|eos)>")
SQUARED = str.maketrans("🅰🅱", "AB")  # which NFKC leaves as they are
THOUGHTS_START = re.compile(
    r"<(?:think|thinking|thought|reasoning|seed:think)>|\[THINK\]|◁think▷|<\|channel\|>analysis", re.IGNORECASE
)
THOUGHTS_END = re.compile(
    joined(r"""</(?:think|thinking|thought|reasoning|seed:think)>|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>
    |assistantfinal"""),
    re.IGNORECASE,
)

"""Judges: who compares two responses and says which one is better.

| module           | what it holds                                                                         |
|------------------|---------------------------------------------------------------------------------------|
| `base`           | `Comparison`, `Verdict`, and `Judge`, the protocol                                    |
| `judge_settings` | `JudgeSettings` and `ServerSettings`: the settings, declared once                     |
| `judge_registry` | the kinds of judges by name                                                           |
| `functions`      | scores and comparisons in Python, and `load_judge` for `module:callable`              |
| `user_code`      | finding and calling what a user wrote                                                 |
| `length`         | longer wins: the control for length bias                                              |
| `reward_model`   | rewards: A wins with probability σ(r_A − r_B)                                         |
| `llm`            | a chat model as a judge, over any `ChatBackend`                                       |
| `rating`         | a chat model that rates one response from 1 to 10                                     |
| `answers`        | the verdict in a chat model's answer; `answer_words` has the patterns                 |
| `templates`      | the prompts of chat models                                                            |
| `jury`           | several judges as one                                                                 |
| `chat_tokens`    | chats and labels as token ids, for local models                                       |
| `endpoint`       | the backend for an OpenAI-compatible server; `server_errors` reads what it refuses    |
"""

from reward.judges.base import Comparison, Judge, Verdict
from reward.judges.functions import CompareJudge, FunctionJudge, load_judge, load_score_function, score_responses
from reward.judges.user_code import load_function

__all__ = [
    "CompareJudge",
    "Comparison",
    "FunctionJudge",
    "Judge",
    "Verdict",
    "load_function",
    "load_judge",
    "load_score_function",
    "score_responses",
]

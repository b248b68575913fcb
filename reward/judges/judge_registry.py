"""The kinds of judges by name, and how a recipe or the command line names one: `KIND` or `KIND:TARGET`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from reward.errors import InputError
from reward.judges.base import Judge
from reward.judges.functions import load_judge
from reward.judges.length import length_judge


@dataclass(frozen=True)
class JudgeSettings:
    """All that a judge can be told; a kind takes what it needs.

    kind: `length`, `function`, `llm`, `reward_model`, or one that was registered.
    target: what the kind works with: `module:callable`, a model's name, a run's directory.
    template: an `llm` judge's prompt: the name of one of `reward/prompts`, or a file.
    reasoning: have it reason first, in `reasoning_tokens` at most. verdict: `probabilities` of the labels, parsed
        `text`, or `auto`: probabilities where they can be had.
    engine: what runs a local model, `hf` or `vllm`, the latter with `gpu_memory_share` of the card.
    base_url: an OpenAI-compatible server; the key comes from the environment variable `api_key_env`.
    attempts: how often a request is sent that fails for a passing reason; answer_attempts: how often the judge is asked
        whose answer cannot be understood. timeout: seconds for one request.
    max_requests, max_cost: stop there. price_in, price_out: per million tokens, in the currency of max_cost.
    """

    kind: str
    target: str | None = None
    template: str = "general"
    reasoning: bool = False
    reasoning_tokens: int = 256
    verdict: str = "auto"
    engine: str = "hf"
    gpu_memory_share: float = 0.5
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    top_logprobs: int = 20
    concurrency: int = 8
    timeout: float = 60.0
    attempts: int = 6
    answer_attempts: int = 3
    max_requests: int | None = None
    max_cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None
    dtype: str = "float32"
    device: str = "auto"


JudgeFactory = Callable[[JudgeSettings], Judge]
_KINDS: dict[str, JudgeFactory] = {}


def register_judge(kind: str, factory: JudgeFactory) -> None:
    """Add a kind of judge. Raises `InputError` for a name that is taken."""
    if kind in _KINDS:
        raise InputError(f"there is a judge {kind!r} already")
    _KINDS[kind] = factory


def judge_kinds() -> list[str]:
    return sorted(_KINDS)


def make_judge(settings: JudgeSettings) -> Judge:
    """The judge of those settings. Raises `InputError` for an unknown kind, with the nearest one."""
    if settings.kind not in _KINDS:
        close = difflib.get_close_matches(settings.kind, _KINDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"judge: {settings.kind!r} is neither one of {', '.join(judge_kinds())} nor 'module:callable'{hint}"
        )
    return _KINDS[settings.kind](settings)


def split_judge_name(name: str) -> tuple[str, str | None]:
    """Kind and target of `KIND`, `KIND:TARGET` or `module:callable`, the last being a `function`."""
    kind, colon, target = name.partition(":")
    if kind in _KINDS or not colon:
        return kind, target or None
    return "function", name


def _function(settings: JudgeSettings) -> Judge:
    if not settings.target:
        raise InputError("judge: function needs what it is: function:module:callable, or module:callable alone")
    return load_judge(settings.target)


def _length(settings: JudgeSettings) -> Judge:
    if settings.target:
        raise InputError(f"judge: length takes nothing more, not {settings.target!r}")
    return length_judge()


register_judge("function", _function)
register_judge("length", _length)

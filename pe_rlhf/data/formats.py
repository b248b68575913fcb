"""Data sets as their authors publish them, turned into rows of ours: `format: NAME` in any data source.

A converter takes one row and gives the columns that it holds: `prompt`, `chosen` and `rejected` with a `margin` where
the data says how much better, or `messages`, or `prompt` and `completion`. It raises `InputError` for a row that is not
of the format, and `Dropped` for a tie. Pairs of scores become the best response against the worst.

| format                 | data sets                                                                                  |
|------------------------|--------------------------------------------------------------------------------------------|
| implicit               | texts that begin with their prompt; TRL's implicit format                                   |
| hh_rlhf                | Anthropic/hh-rlhf                                                                           |
| helpsteer2             | nvidia/HelpSteer2: its scores (two rows a prompt) or its preferences                        |
| helpsteer3             | nvidia/HelpSteer3, preferences                                                              |
| ultrafeedback          | openbmb/UltraFeedback: four completions with scores                                         |
| ultrafeedback_binarized| HuggingFaceH4/ultrafeedback_binarized, trl-lib's and argilla's                              |
| shp                    | stanfordnlp/SHP                                                                             |
| pku_saferlhf           | PKU-Alignment/PKU-SafeRLHF; by safety: columns: {better_response_id: safer_response_id}     |
| tldr                   | openai/summarize_from_feedback (comparisons), CarperAI's and trl-lib's                      |
| nectar                 | berkeley-nest/Nectar: seven ranked answers                                                  |
| arena                  | lmsys/chatbot_arena_conversations, lmsys/lmsys-arena-human-preference-55k, lmarena-ai's     |
| pairwise               | two responses and which one won: response_a, response_b and winner; answer_0, … and scores  |
| openai                 | OpenAI's preference fine-tuning: input, preferred_output, non_preferred_output              |
| rewardbench2           | allenai/reward-bench-2: lists as chosen and rejected, a pair of each with each              |
| sharegpt               | `conversations` of `from` and `value`, also with chosen and rejected                        |
| alpaca                 | instruction, input and output, also with chosen and rejected, or with both as output        |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pe_rlhf.data.regrouping import each_against_each, side_by_side
from pe_rlhf.data.row_table import Row, Rows
from reward.errors import InputError, look_up
from reward.messages import ROLES, TOOL_ROLES, role_of
from reward.records import TRANSCRIPT_START, Dropped

Converter = Callable[[Row], dict[str, Any]]
FORMATS: dict[str, Converter] = {}
SIGNATURES: dict[str, set[str]] = {}
# Formats whose rows are not a pair each.
REGROUPED: dict[str, Callable[[Rows], Rows]] = {"helpsteer2": side_by_side, "rewardbench2": each_against_each}


def register_format(name: str, *columns: str) -> Callable[[Converter], Converter]:
    """Make a converter known as `format: NAME`, and known by its `columns`. Raises `InputError` for a taken name."""

    def register(converter: Converter) -> Converter:
        if name in FORMATS:
            raise InputError(f"there is a format {name!r} already", kind="exists", key="format")
        FORMATS[name] = converter
        if columns:
            SIGNATURES[name] = set(columns)
        return converter

    return register


def format_like(names: Collection[str]) -> str | None:
    """The format that a data set with these columns may be of; None where they look like no other than ours."""
    return next((name for name, columns in SIGNATURES.items() if columns.issubset(names)), None)


def converted(rows: Rows, name: str, key: str, file: str) -> Rows:
    """All rows in our columns, converted when asked for; one that cannot be is an `InputError` in its place."""
    converter = look_up(FORMATS, name, f"{key}: there is no format {name!r}", f"{key}.format", file)

    def convert(row: Row | InputError) -> Row | InputError:
        try:
            return row if isinstance(row, InputError) else converter(row)
        except InputError as error:
            return error
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            reason = f"not of the format {name}: {type(error).__name__}: {error}"
            return InputError(reason, kind="invalid", key="format")

    return REGROUPED.get(name, lambda rows: rows)(rows).map(convert)


def begins_with_prompt(row: Row, *columns: str) -> bool:
    """Whether the texts of these columns all say the row's prompt once more, before they go on."""
    prompt, texts = row.get("prompt"), [row.get(column) for column in columns]
    if not isinstance(prompt, str) or not prompt.strip():
        return False
    return all(isinstance(text, str) and text.startswith(prompt) and text.strip() != prompt.strip() for text in texts)


# ---- pairs -----------------------------------------------------------------------------------------------------------


@register_format("implicit")
def _implicit(row: Row) -> dict[str, Any]:
    """A column with the prompt says where it ends."""
    if begins_with_prompt(row, "chosen", "rejected"):
        return {**row, **{side: row[side].removeprefix(row["prompt"]) for side in ("chosen", "rejected")}}
    return dict(row)


@register_format("hh_rlhf")
def _hh_rlhf(row: Row) -> dict[str, Any]:
    for column in ("chosen", "rejected"):
        if not row[column].startswith(TRANSCRIPT_START):
            raise InputError(
                f"the {column} text is no transcript that begins with 'Human:'", kind="invalid", key=column
            )
    return {"chosen": row["chosen"], "rejected": row["rejected"]}


@register_format("helpsteer2", "response_1", "response_2", "preference_strength")
def _helpsteer2(row: Row) -> dict[str, Any]:
    if "preference_strength" in row:  # below 0: the first is better
        first, second, strength = row["response_1"], row["response_2"], -_number(row, "preference_strength")
    elif "others" in row:
        first, second = row["response"], row["others"]["response"]
        strength = _number(row, "helpfulness") - _number(row["others"], "helpfulness")
    else:
        return {"prompt": _helpsteer_prompt(row["prompt"]), "completion": row["response"]}
    return {"prompt": _helpsteer_prompt(row["prompt"]), **_ordered(first, second, strength)}


@register_format("helpsteer3", "response1", "response2", "overall_preference")
def _helpsteer3(row: Row) -> dict[str, Any]:
    strength = -_number(row, "overall_preference")  # −3: the first is much better
    return {"prompt": row["context"], **_ordered(row["response1"], row["response2"], strength)}


@register_format("ultrafeedback", "instruction", "completions")
def _ultrafeedback(row: Row) -> dict[str, Any]:
    scored = [(_number(answer, "overall_score"), answer["response"]) for answer in row["completions"]]
    return {"prompt": row["instruction"], **_extremes(scored)}


@register_format("ultrafeedback_binarized")
def _ultrafeedback_binarized(row: Row) -> dict[str, Any]:
    if "chosen_response" in row:
        names = ("chosen_response", "rejected_response", "chosen_avg_rating", "rejected_avg_rating")
    elif "chosen-rating" in row:
        names = ("chosen", "rejected", "chosen-rating", "rejected-rating")
    else:
        names = ("chosen", "rejected", "score_chosen", "score_rejected")
    better, worse, high, low = (row.get(name) for name in names)
    found: dict[str, Any] = {"chosen": better, "rejected": worse}
    if isinstance(better, str):  # otherwise they are whole dialogues, the prompt included
        found["prompt"] = row.get("prompt") or row["instruction"]
    if high is not None and low is not None:
        if high == low:
            raise Dropped("a tie: both responses have the same score", kind="conflict")
        found["margin"] = float(high) - float(low)
        if found["margin"] < 0:  # a few rows are labelled against their scores
            found["margin"] = 0.0
    return found


@register_format("shp", "human_ref_A", "human_ref_B")
def _shp(row: Row) -> dict[str, Any]:
    """`score_ratio`: how many times the votes of the other; its logarithm is a difference of rewards."""
    sign = 1 if _number(row, "labels") == 1 else -1
    ratio = row.get("score_ratio")
    pair = _ordered(row["human_ref_A"], row["human_ref_B"], sign)
    margin = None if ratio is None else math.log(max(1.0, float(ratio)))
    return {"prompt": row["history"], **pair, "margin": margin}


@register_format("pku_saferlhf", "response_0", "response_1", "better_response_id")
def _pku_saferlhf(row: Row) -> dict[str, Any]:
    better = _index(row, "better_response_id")
    return {"prompt": row["prompt"], "chosen": row[f"response_{better}"], "rejected": row[f"response_{1 - better}"]}


@register_format("tldr", "summaries", "choice")
def _tldr(row: Row) -> dict[str, Any]:
    if "summaries" in row:
        info, choice = row["info"], _index(row, "choice")
        post = info.get("post") or info["article"]
        heads = [("SUBREDDIT: r/", info.get("subreddit")), ("TITLE: ", info.get("title"))]
        start = "".join(f"{head}{text}\n\n" for head, text in heads if text)
        texts = [summary["text"] for summary in row["summaries"]]
        said = {"chosen": texts[choice], "rejected": texts[1 - choice]}
        return {"prompt": f"{start}POST: {post}\n\nTL;DR:", **said}
    if "chosen" in row:
        return {name: row[name] for name in ("prompt", "chosen", "rejected")}
    return {"prompt": row["prompt"], "completion": row["completion"] if "completion" in row else row["label"]}


@register_format("nectar", "prompt", "answers")
def _nectar(row: Row) -> dict[str, Any]:
    """The first in rank against the last; ranks are no strengths, so there is no margin."""
    scored = [(-_number(answer, "rank"), answer["answer"]) for answer in row["answers"]]
    return {"prompt": row["prompt"], **_extremes(scored), "margin": None}


@register_format("arena", "conversation_a", "conversation_b")
def _arena(row: Row) -> dict[str, Any]:
    if "winner" in row:
        sides = {"model_a": 1, "model_b": -1}
        said, first, second = sides.get(row["winner"], 0), row["conversation_a"], row["conversation_b"]
    else:
        said = int(_number(row, "winner_model_a") - _number(row, "winner_model_b"))
        asked, *answers = (json.loads(row[name]) for name in ("prompt", "response_a", "response_b"))
        first, second = ([*_dialogue(asked, answer)] for answer in answers)
    if len(first) > 2 and first[:-1] != second[:-1]:
        raise Dropped("the dialogues part before their last turn", kind="conflict")
    return _ordered(first, second, said) | {"margin": None}


# What the columns are called that hold the two responses, and the one that says which won.
STEMS = ("response", "answer", "completion", "output", "reply", "summary")
SIDES = (("a", "b"), ("A", "B"), ("1", "2"), ("0", "1"))
WINNERS = ("winner", "preference", "preferred", "choice", "label", "better")
NO_WINNER = ("tie", "draw", "both", "neither", "equal", "none")


@register_format("pairwise", "winner")
def _pairwise(row: Row) -> dict[str, Any]:
    """The winner is what its column's name ends in, as `b`, `1` or `response_b`; without one, scores say it."""
    pairs = ((f"{stem}{join}", sides) for sides in SIDES for stem in STEMS for join in ("_", ""))
    stem, sides = next((stem, sides) for stem, sides in pairs if all(f"{stem}{side}" in row for side in sides))
    first, second = (row[f"{stem}{side}"] for side in sides)
    prompt = next(row[name] for name in ("prompt", "question", "instruction") if name in row)
    if (column := next((name for name in WINNERS if name in row), None)) is None:
        strength = _number(row, f"score_{sides[0]}") - _number(row, f"score_{sides[1]}")
        return {"prompt": prompt, **_ordered(first, second, strength)}
    said, names = re.sub(r".*[_ ]", "", str(row[column]).strip().lower()), [side.lower() for side in sides]
    if said not in (*names, *NO_WINNER):
        what = f"column {column!r} is {row[column]!r}, neither {names[0]}, {names[1]} nor a tie"
        raise InputError(what, kind="invalid", key=column)
    won = 0.0 if said in NO_WINNER else 1.0 if said == names[0] else -1.0
    return {"prompt": prompt, **_ordered(first, second, won), "margin": None}


@register_format("openai", "preferred_output", "non_preferred_output")
def _openai(row: Row) -> dict[str, Any]:
    said = row["input"]
    prompt = said["messages"] if isinstance(said, Mapping) else said
    return {"prompt": prompt, "chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}


@register_format("rewardbench2")
def _rewardbench2(row: Row) -> dict[str, Any]:
    """One of the pairs of a row; a side that has no response is still a list."""
    for side in ("chosen", "rejected"):
        if not row[side]:
            raise InputError(f"column {side!r} holds no response", kind="empty", key=side)
    return {name: row.get(name) for name in ("prompt", "chosen", "rejected", "subset")}


# ---- dialogues -------------------------------------------------------------------------------------------------------


@register_format("sharegpt", "conversations")
def _sharegpt(row: Row) -> dict[str, Any]:
    said = row.get("conversations") or row.get("messages") or row["conversation"]
    if system := row.get("system"):
        said = [{"from": "system", "value": system}, *said]
    messages = [_turn(turn) for turn in said]
    if "chosen" not in row:
        return {"messages": messages}
    return {"prompt": messages, "chosen": [_turn(row["chosen"])], "rejected": [_turn(row["rejected"])]}


@register_format("alpaca", "instruction", "output")
def _alpaca(row: Row) -> dict[str, Any]:
    """And its kind: Dolly (context, response), Orca's pairs (system, question), distilabel's (system, input)."""
    main = row.get("instruction") or row.get("question") or row["input" if "system" in row else "instruction"]
    beside = row.get("input") or row.get("context")
    asked = f"{main}\n\n{beside}" if main and beside and main != beside else main or beside or ""
    prompt: list[dict[str, str]] = [{"role": "user", "content": asked}]
    if system := row.get("system") or row.get("system_prompt"):
        prompt.insert(0, {"role": "system", "content": system})
    if "chosen" in row:
        return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
    answer = row["output"] if "output" in row else row["response"]
    if isinstance(answer, list):  # LLaMA-Factory's older pairs, the better one first
        chosen, rejected = answer
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {"prompt": prompt, "completion": answer}


# ---- parts -----------------------------------------------------------------------------------------------------------


def _ordered(first: Any, second: Any, strength: float) -> dict[str, Any]:
    """The better one as `chosen`; `strength` is positive where that is the first."""
    if strength == 0:
        raise Dropped("a tie", kind="conflict")
    chosen, rejected = (first, second) if strength > 0 else (second, first)
    return {"chosen": chosen, "rejected": rejected, "margin": float(abs(strength))}


def _extremes(scored: list[tuple[float, Any]]) -> dict[str, Any]:
    best, worst = max(scored, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])
    return _ordered(best[1], worst[1], best[0] - worst[0])


def _number(row: Mapping[str, Any], column: str) -> float:
    value = row[column]
    if isinstance(value, bool) or value is None or not math.isfinite(number := float(value)):
        raise InputError(f"column {column!r} is {value!r}, not a number", kind="invalid", key=column)
    return number


def _index(row: Mapping[str, Any], column: str) -> int:
    """Which of two responses: 0 or 1."""
    value = _number(row, column)
    if value == -1:
        raise Dropped("a tie", kind="conflict")
    if value not in (0, 1):
        raise InputError(f"column {column!r} is {row[column]!r}, not 0 or 1", kind="invalid", key=column)
    return int(value)


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    role = role_of(turn)
    if role not in ROLES:
        what = "tool calls" if role in TOOL_ROLES else f"the role {role!r}"
        if role is None:
            what = f"neither from and value nor role and content, but {', '.join(turn)}"
        raise InputError(f"a turn of the dialogue holds {what}", kind="invalid", key="conversations")
    return {"role": role, "content": turn["value"] if "value" in turn else turn.get("content")}


def _dialogue(asked: list[str], answers: list[str]) -> list[dict[str, str]]:
    turns = zip(asked, answers, strict=True)
    sides = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(sides, turn, strict=True)]


def _helpsteer_prompt(text: str) -> Any:
    """Several turns are one text with marks between them."""
    first, *others = re.split(r"<extra_id_1>(User|Assistant)\n", text)
    messages = [{"role": "user", "content": first.strip("\n") if others else first}]
    for role, said in zip(others[::2], others[1::2], strict=True):
        messages.append({"role": role.lower(), "content": said.strip("\n")})
    if len(messages) > 1 and not messages[-1]["content"]:
        messages.pop()
    return messages if others else text

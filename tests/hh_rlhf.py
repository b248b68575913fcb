"""Dialogues of hh-rlhf, read apart from the code under test."""

from __future__ import annotations

import re

Dialogue = list[dict[str, str]]

PARTS = ("helpful-base", "harmless-base")
ROLES = {"Human": "user", "Assistant": "assistant"}


def messages_of(transcript: str) -> Dialogue:
    turns = re.findall(r"\n\n(Human|Assistant): ?(.*?)(?=\n\nHuman:|\n\nAssistant:|\Z)", transcript, re.DOTALL)
    return [{"role": ROLES[speaker], "content": said} for speaker, said in turns]


def pair_of(row: dict[str, str]) -> tuple[Dialogue, str, str] | None:
    """The prompt and both responses; None for a row that holds no pair."""
    chosen, rejected = messages_of(row["chosen"]), messages_of(row["rejected"])
    texts = [dialogue[-1]["content"].strip() for dialogue in (chosen, rejected)]
    if chosen[:-1] != rejected[:-1] or texts[0] == texts[1] or not all(texts) or chosen[-1]["role"] != "assistant":
        return None
    if len(chosen) < 2 or chosen[-2]["role"] == "assistant":
        return None
    return chosen[:-1], texts[0], texts[1]


def alternates(dialogue: Dialogue) -> bool:
    """Whether the turns are the user's and the assistant's by turns, as some templates want them."""
    return [message["role"] for message in dialogue] == [("user", "assistant")[i % 2] for i in range(len(dialogue))]

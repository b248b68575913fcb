"""How pages write numbers, durations, prompts and verdicts."""

from __future__ import annotations

import re
from typing import Any

Row = dict[str, Any]


def conversation(prompt: str | list[Row]) -> str:
    """A prompt as text: a single message as it is, a longer conversation with its roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def preferred(preference: float | None) -> str:
    """Which side the judge prefers; `preference` is the policy's share of the win."""
    if preference is None:
        return "no verdict"
    if preference == 0.5:
        return "tie"
    return "policy" if preference > 0.5 else "anchor"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def number(value: float | None) -> str:
    """Whole numbers with thousands apart, others with three significant digits, a dash for what is not known."""
    if value is None:
        return "–"
    whole = isinstance(value, int) or abs(value) >= 1000
    value += 0.0  # −0.0 becomes 0.0
    text = f"{value:,.0f}" if whole else f"{value:#.3g}".rstrip(".")
    return text.replace("-", "−").replace(",", "\u202f")


def gibibytes(mib: float) -> str:
    return f"{mib / 1024:.2f} GiB"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def slug(name: str) -> str:
    """A name, a path or an address as part of a folder's name."""
    return re.sub(r"[^\w.]+", "_", name).strip("_.")[-40:]

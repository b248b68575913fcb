"""Suites of prompts with a baseline's answers, by name: `pe-rlhf evaluate --suite NAME`.

A suite is one file and one entry here.
"""

from __future__ import annotations

import difflib

from pe_rlhf.evaluation.suites import alpaca_eval, arena_hard, mt_bench
from pe_rlhf.evaluation.suites.suite import Item, Suite
from reward.errors import InputError

__all__ = ["SUITES", "Item", "Suite", "find_suite"]

SUITES = {module.SUITE.name: module.SUITE for module in (alpaca_eval, arena_hard, mt_bench)}


def find_suite(name: str) -> Suite:
    """The suite of that name. Raises `InputError` for another one."""
    if name not in SUITES:
        close = difflib.get_close_matches(name, SUITES, n=1)
        raise InputError(
            f"--suite: {name!r} is none of {', '.join(SUITES)}",
            kind="unknown",
            key="--suite",
            fix=f"did you mean {close[0]!r}?" if close else None,
        )
    return SUITES[name]

"""Suites of prompts with a baseline's answers, by name: `pe-rlhf evaluate --suite NAME`.

A suite is one file and one entry here.
"""

from __future__ import annotations

from pe_rlhf.evaluation.suites import alpaca_eval, arena_hard, mt_bench
from pe_rlhf.evaluation.suites.suite import Item, Suite
from reward.errors import look_up

__all__ = ["SUITES", "Item", "Suite", "find_suite"]

SUITES = {module.SUITE.name: module.SUITE for module in (alpaca_eval, arena_hard, mt_bench)}


def find_suite(name: str) -> Suite:
    """The suite of that name. Raises `InputError` for another one."""
    return look_up(SUITES, name, f"--suite: there is no suite {name!r}", "--suite")

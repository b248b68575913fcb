"""Which of several training processes this is, from what the launcher has set; without torch."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def is_main() -> bool:
    """Whether this process is the one that writes files and talks to people: rank 0, or the only one."""
    return not launched() or os.environ["RANK"] == "0"

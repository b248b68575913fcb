"""Where files that are made once are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where converted models are kept: `$PE_RLHF_CACHE`, else `~/.cache/pe-rlhf`."""
    return Path(os.environ.get("PE_RLHF_CACHE") or Path.home() / ".cache" / "pe-rlhf")

"""The command line: one file a command."""

from pe_rlhf.cli.main import main

__all__ = ["main"]

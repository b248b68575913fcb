"""How many rows of a data set were too long for the model, for one line at the start of a stage."""

from __future__ import annotations

from dataclasses import dataclass

from pe_rlhf.system.progress import say


@dataclass
class Cuts:
    """Counts rows whose prompt lost its middle, and rows of which a response lost its end."""

    prompts: int = 0
    responses: int = 0

    def count(self, prompt: bool, response: bool) -> None:
        """Count one row."""
        self.prompts += prompt
        self.responses += response

    def say(self, key: str, of: int, limit: int) -> None:
        """Say it, where anything was cut; `of` is the number of rows."""
        lost = {"prompts lost their middle": self.prompts, "rows the end of a response": self.responses}
        if parts := [f"{count} {what}" for what, count in lost.items() if count]:
            say(f"{key}: cut to {limit} tokens, of {of} rows: {', '.join(parts)}; raise max_length where they matter")

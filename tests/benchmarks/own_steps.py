"""The project's side of the benchmarks: the steps of the PPO and the reward stage, timed, in a process of their own.

python own_steps.py ppo    --model DIR --data PROMPTS --steps 3 --output FILE.json
python own_steps.py reward --model DIR --data PAIRS   --steps 2 --output FILE.json [--tuning full] [--last-layers 12]

`--profile` prints the operations of all steps that take most of their time, by the CPU time of each itself.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from pe_rlhf.system.processes import openmp_environment

os.environ |= openmp_environment()  # as the command line does; before torch is imported

import torch

from pe_rlhf.config import DataSource, PPOConfig, RewardConfig, RolloutConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.preference_pairs import Pairs, encode_pair
from pe_rlhf.data.prompt_order import PromptSet
from pe_rlhf.data.rows import load_preferences, load_prompts
from pe_rlhf.model.backbone import Backbone, FastPath, load_backbone
from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.scoring.scorers import AdapterScorer
from pe_rlhf.stages.ppo_collect import collect_experience
from pe_rlhf.stages.ppo_update import update
from pe_rlhf.stages.reward import accumulate

PROMPTS, NEW_TOKENS, PAIRS, MAX_TOKENS = 16, 48, 16, 512


AddRole = Callable[[Backbone, str], None]


def ppo_steps(
    backbone: Backbone, add: AddRole, data: Path, steps: int, micro_batch_tokens: int
) -> tuple[list[float], list[int]]:
    """16 prompts, 48 new tokens, 2 epochs × 2 minibatches; policy, value and reward on one backbone."""
    codec = TextCodec(backbone.tokenizer)
    source = DataSource(path=str(data))
    config = PPOConfig(
        prompts=source,
        rollout=RolloutConfig(max_new_tokens=NEW_TOKENS),
        batch_size=PROMPTS,
        micro_batch_tokens=micro_batch_tokens,
    )
    for role in ("policy", "value", "reward"):
        add(backbone, role)
    groups = [RoleGroup(role, backbone.role_parameters(role), 1e-4) for role in ("policy", "value")]
    optimizer = RoleOptimizer(groups, config.optimizer, total_steps=4 * steps)
    scorer = AdapterScorer(backbone, "reward", config.micro_batch_tokens)
    sampler = HFRollout(backbone, "policy", config.rollout)
    prompts = load_prompts(source, "--data")
    seconds, tokens = [], []
    for step in range(steps):
        start = time.perf_counter()
        batch = prompts[step * PROMPTS : (step + 1) * PROMPTS]
        asked = PromptSet(batch, [codec.encode_prompt(prompt) for prompt in batch], {})
        rollout = sampler.generate(asked.ids, seed=step)
        experience, _ = collect_experience(backbone, scorer, codec, asked, rollout, config.kl.beta, config)
        update(backbone, optimizer, experience, config.kl.beta, config, seed=0, step=step)
        seconds.append(time.perf_counter() - start)
        tokens.append(int(experience.sequences.lengths_B.sum()))
    return seconds, tokens


def reward_steps(
    backbone: Backbone, add: AddRole, data: Path, steps: int, micro_batch_tokens: int
) -> tuple[list[float], list[int]]:
    """16 preference pairs per optimizer step, in file order; pairs over 512 tokens are left out, as TRL does."""
    config = RewardConfig(micro_batch_tokens=micro_batch_tokens)
    add(backbone, "reward")
    optimizer = RoleOptimizer([RoleGroup("reward", backbone.role_parameters("reward"), 1e-4)], config.optimizer, steps)
    codec = TextCodec(backbone.tokenizer, "none")
    source = DataSource(path=str(data))
    _, encoded, _ = load_preferences(source, "--data", config.max_bad_share, lambda row: encode_pair(row, codec, 10**6))
    pairs = _short(Pairs(encoded, backbone.pad_token_id))
    seconds, tokens = [], []
    for step in range(steps):
        rows = list(range(step * PAIRS, (step + 1) * PAIRS))
        start = time.perf_counter()
        accumulate(backbone, optimizer, pairs, rows, config)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        tokens.append(int(pairs.subset(rows).responses().lengths_B.sum()))
    return seconds, tokens


def _short(pairs: Pairs) -> Pairs:
    lengths = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs.pairs]
    return pairs.subset([row for row, length in enumerate(lengths) if length <= MAX_TOKENS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["ppo", "reward"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tuning", choices=["adapter", "full"], default="adapter")
    parser.add_argument("--last-layers", type=int, help="adapters only on the last blocks")
    parser.add_argument("--micro-batch-tokens", type=int, default=512, help="in one forward pass: memory against speed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = ppo_steps if args.stage == "ppo" else reward_steps

    def add(backbone: Backbone, role: str) -> None:
        if args.tuning == "full":
            backbone.add_own_weights(role)
        else:
            backbone.add_adapter(role, rank=16, alpha=32, last_layers=args.last_layers)

    backbone = load_backbone(args.model, dtype=args.dtype, fast=FastPath(trunk_cache_mib=1024))
    with torch.profiler.profile() if args.profile else nullcontext() as profile:
        seconds, tokens = run(backbone, add, args.data, args.steps, args.micro_batch_tokens)
    if profile is not None:
        print(profile.key_averages().table("self_cpu_time_total", row_limit=25, max_name_column_width=40))
    args.output.write_text(json.dumps({"seconds_per_step": seconds, "tokens_per_step": tokens}) + "\n")


if __name__ == "__main__":
    main()

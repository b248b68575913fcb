"""Time the optimizer step of TRL's RewardTrainer: 16 preference pairs, LoRA r 16 or full tuning, on the CPU.

Pairs longer than 512 tokens are dropped (TRL's own rule for `max_length`) and the rest is read in the order of the
file, 16 a step. Gradient checkpointing is off: TRL switches it on by default to save memory at the cost of time.
The 16 pairs are accumulated from micro-batches, padded each on its own. In one batch they need 22 GB where the longest
sequence has 308 tokens (SmolLM2-135M, LoRA), and most batches of hh-rlhf hold a longer one.

    python trl_reward.py --model DIR --pairs helpful-base.jsonl.gz --tuning lora --steps 2 --output FILE.json
"""

import argparse
import gzip
import json
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from measure import StepClock, lora_config, write_report
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

PAIRS = 16
MAX_TOKENS = 512


def load_pairs(path: Path) -> Dataset:
    """Rows `chosen` and `rejected` (text, or lists of messages) of a JSON-lines file, gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return Dataset.from_list([{"chosen": row["chosen"], "rejected": row["rejected"]} for row in rows])


def build_trainer(args: argparse.Namespace, clock: StepClock, output_dir: str) -> RewardTrainer:
    config = RewardConfig(
        output_dir=output_dir,
        max_steps=args.steps,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=PAIRS // args.micro_batch,
        train_sampling_strategy="sequential",
        max_length=MAX_TOKENS,
        gradient_checkpointing=False,
        bf16=args.dtype == "bfloat16",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=1, dtype=getattr(torch, args.dtype)
        ),
        args=config,
        train_dataset=load_pairs(args.pairs),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=lora_config("SEQ_CLS") if args.tuning == "lora" else None,
        callbacks=[clock],
    )
    if len(trainer.train_dataset) < PAIRS * args.steps:
        raise SystemExit(f"{args.pairs}: {PAIRS * args.steps} pairs of up to {MAX_TOKENS} tokens are needed")
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory with safetensors and tokenizer")
    parser.add_argument("--pairs", type=Path, required=True, help="JSON lines with the keys `chosen` and `rejected`")
    parser.add_argument("--tuning", choices=["lora", "full"], required=True)
    parser.add_argument("--micro-batch", type=int, choices=[1, 2, 4, 8, 16], default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    clock = StepClock()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = build_trainer(args, clock, output_dir)
        trainer.train()
    # `num_tokens` counts all tokens since the start; the tokenizer's padding is not among them.
    seen = [0] + [int(row["num_tokens"]) for row in trainer.state.log_history if "loss" in row]
    tokens = [after - before for before, after in pairwise(seen)]
    write_report(args.output, clock.seconds, tokens, tuning=args.tuning, micro_batch=args.micro_batch)


if __name__ == "__main__":
    main()

"""The held-out accuracy of TRL's RewardTrainer with LoRA r 16, one epoch, on pairs that another program wrote.

    python trl_reward_accuracy.py --model DIR --train train.jsonl --eval eval.jsonl --template FILE --learning-rate 1e-4
        --seed 1 --output FILE.json

Rows have `chosen` and `rejected`, lists of messages. Training pairs longer than `--max-length` are dropped (TRL's own
rule); of held-out pairs none is dropped or cut.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from measure import StepClock, lora_config, write_report
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer


def read(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@torch.no_grad()
def score(model, tokenizer, messages: list[dict]) -> float:
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    return model(**ids).logits[0, 0].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--train", "--eval", "--template", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--model", required=True, help="Hugging Face directory with safetensors and tokenizer")
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = args.template.read_text(encoding="utf-8")
    clock = StepClock()
    micro = min(4, args.batch_size)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=torch.float32),
            args=RewardConfig(
                output_dir=output_dir,
                num_train_epochs=1,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=args.batch_size // micro,
                learning_rate=args.learning_rate,
                seed=args.seed,
                max_length=args.max_length,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(read(args.train)),
            processing_class=tokenizer,
            peft_config=lora_config("SEQ_CLS"),
            callbacks=[clock],
        )
        trainer.train()
    model = trainer.model.eval()
    right = [
        score(model, tokenizer, row["chosen"]) > score(model, tokenizer, row["rejected"]) for row in read(args.eval)
    ]
    counts = {"eval_accuracy": sum(right) / len(right), "eval_pairs": len(right)}
    write_report(args.output, clock.seconds, [], train_pairs=len(trainer.train_dataset), **counts)


if __name__ == "__main__":
    main()

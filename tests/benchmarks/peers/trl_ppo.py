"""Time the PPO step of TRL 1.12's PPOTrainer, the last release with one, with LoRA policy and LoRA value model.

The setting: 16 prompts of up to 64 tokens, 48 new tokens, 2 epochs of 2 minibatches, LoRA r 16 on all linear layers,
on the CPU, in fp32 or with a base in bf16 and autocast. What TRL offers to be faster in it is used: the anchor is the
policy without its adapter (no fourth model), no gradient checkpointing, no sample generations, and all 16 episodes in
one forward pass.

    PYTHONPATH=<directory with trl 1.12.0> python trl_ppo.py --model DIR --prompts FILE --steps 3 --output FILE.json
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from measure import StepClock, lora_config, write_report
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

EPISODES = 16
NEW_TOKENS = 48
MAX_PROMPT_TOKENS = 64


def load_prompts(path: Path, tokenizer, count: int) -> Dataset:
    """The first `count` prompts, each as a user's turn in the model's chat template."""
    rows = [json.loads(line) for line in path.read_text().splitlines()][:count]
    if len(rows) < count:
        raise SystemExit(f"{path}: {count} prompts are needed, {len(rows)} are there")
    turns = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    ids = [tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"] for turn in turns]
    if max(map(len, ids)) > MAX_PROMPT_TOKENS:
        raise SystemExit(f"{path}: a prompt has more than {MAX_PROMPT_TOKENS} tokens in the chat template")
    return Dataset.from_dict({"input_ids": ids})


def meter_generation() -> tuple[list[float], list[int]]:
    """Note the seconds and the tokens (prompt and response, without padding) of each rollout from here on."""
    generate, seconds, tokens = ppo_trainer.batch_generation, [], []

    def metered(model, queries, batch_size, pad_token_id, generation_config):
        start = time.perf_counter()
        query_responses, logits = generate(model, queries, batch_size, pad_token_id, generation_config)
        seconds.append(time.perf_counter() - start)
        tokens.append(int((query_responses != pad_token_id).sum()))
        return query_responses, logits

    ppo_trainer.batch_generation = metered
    return seconds, tokens


def build_trainer(args: argparse.Namespace, clock: StepClock, output_dir: str) -> PPOTrainer:
    # TRL finds the padding by comparing ids, so pad must differ from eos; `<|endoftext|>` (unk) occurs in no dialogue.
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left", pad_token="<|endoftext|>")
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    heads = [
        AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=getattr(torch, args.dtype))
        for _ in ("reward", "value")
    ]
    for model in heads:
        model.config.pad_token_id = tokenizer.pad_token_id
    reward, value = heads
    config = PPOConfig(
        output_dir=output_dir,
        total_episodes=EPISODES * args.steps,
        per_device_train_batch_size=EPISODES,
        gradient_accumulation_steps=1,
        num_ppo_epochs=2,
        num_mini_batches=2,
        response_length=NEW_TOKENS,
        stop_token="eos",
        temperature=1.0,
        learning_rate=1e-4,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=args.dtype == "bfloat16",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward.requires_grad_(False).eval(),
        value_model=get_peft_model(value, lora_config("SEQ_CLS")),
        train_dataset=load_prompts(args.prompts, tokenizer, EPISODES * args.steps),
        peft_config=lora_config("CAUSAL_LM"),
        callbacks=[clock],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory with safetensors and tokenizer")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with the key `prompt`")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    clock = StepClock()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = build_trainer(args, clock, output_dir)
        generate_seconds, tokens = meter_generation()
        trainer.train()
    write_report(args.output, clock.seconds, tokens, generate_seconds_per_step=generate_seconds)


if __name__ == "__main__":
    main()

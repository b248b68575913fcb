"""Short PPO runs of every adapter init on a small chat model, made cheerful: does any crash, and what does each learn?

    python tests/benchmarks/ppo_inits.py --data ../shared/data/tinychat3m --output runs/ppo-inits

Each run is a process of its own, `pe-rlhf run`, so that one that dies takes no other with it; one that is there already
is not run again. One learning rate for all inits: the table says what happens then, not which init is best when tuned.
The KL at step 0 is computed from the trainer's own log-probs, and must be 0 exactly.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from pe_rlhf.adapters.lora import inits as _registers  # noqa: F401
from pe_rlhf.adapters.lora.init_registry import get_init, init_names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with hf/ and chat_val.txt")
    parser.add_argument("--output", type=Path, default=Path("runs/ppo-inits"))
    parser.add_argument("--inits", nargs="*", default=init_names())
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    for init in arguments.inits:
        get_init(init)  # a slip shows before the first run
    arguments.output.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(arguments.output, arguments.data.resolve(), arguments.steps, arguments.learning_rate)
    results = [
        run(recipe, arguments.output / f"{init}-{seed}", init, seed)
        for seed in arguments.seeds
        for init in arguments.inits
    ]
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)


def write_recipe(folder: Path, data: Path, steps: int, learning_rate: float) -> Path:
    dialogues = (data / "chat_val.txt").read_text(encoding="utf-8").split("\n\n")
    prompts = [text.split("\nBot:")[0] + "\nBot:" for text in dialogues if text.startswith("User:")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    path = folder / "recipe.yaml"
    ppo = {
        "prompts": str((folder / "prompts.jsonl").resolve()),
        "reward": [{"function": "reward.scores:vader"}],
        "rollout": {"max_new_tokens": 32, "old_logprobs": "trainer"},
        "kl": {"beta": 0.01},
        "steps": steps,
        "batch_size": 48,
        "epochs": 1,
        "minibatches": 2,
        "micro_batch_tokens": 4096,
        "learning_rate": learning_rate,
    }
    adapter = {"rank": 8, "alpha": 16}
    path.write_text(yaml.safe_dump({"model": str(data / "hf"), "threads": 1, "adapter": adapter, "ppo": ppo}))
    return path


def run(recipe: Path, folder: Path, init: str, seed: int) -> dict[str, Any]:
    """One run; its reward and KL at every step, or how it ended."""
    result: dict[str, Any] = {"init": init, "seed": seed, "exit_code": 0}
    if not (folder / "ppo" / "summary.json").is_file():
        command = [sys.executable, "-m", "pe_rlhf", "run", str(recipe), "--run-dir", str(folder), "--resume"]
        done = subprocess.run(
            [*command, f"adapter.init={init}", f"seed={seed}"], capture_output=True, text=True, check=False
        )
        result["exit_code"] = done.returncode
        if done.returncode != 0:
            result["error"] = done.stderr.strip().splitlines()[-1:]
    metrics = folder / "ppo" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    for key in ("reward", "kl", "entropy", "policy_grad_norm"):
        result[key] = [line[key] for line in lines]
    print(
        f"{init} seed {seed}: exit {result['exit_code']}, reward {[round(r, 3) for r in result['reward']]}", flush=True
    )
    return result


def print_table(results: list[dict[str, Any]]) -> None:
    table = Table(title="PPO, gold score by init; mean (min – max) over seeds")
    for heading in (
        "init",
        "runs",
        "crashed",
        "KL at step 0",
        "score, first step",
        "score, last step",
        "KL, last step",
    ):
        table.add_column(heading, justify="left" if heading == "init" else "right")
    for init in dict.fromkeys(result["init"] for result in results):
        own = [result for result in results if result["init"] == init]
        finished = [result for result in own if result["exit_code"] == 0]
        firsts, lasts, kls = ([r[key][at] for r in finished] for key, at in (("reward", 0), ("reward", -1), ("kl", -1)))
        zero = max((abs(result["kl"][0]) for result in finished), default=float("nan"))
        crashed = str(len(own) - len(finished))
        table.add_row(init, str(len(own)), crashed, f"{zero:g}", spread(firsts), spread(lasts), spread(kls))
    Console(width=120).print(table)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} – {max(values):.3f})" if values else "–"


if __name__ == "__main__":
    main()

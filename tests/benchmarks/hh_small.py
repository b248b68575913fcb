"""Real preferences on two cores: reward models of ours and of TRL, then PPO under a gold reward model. Resumable.

    make results NAME=hh_small
    python -m tests.benchmarks.hh_small --dir /tmp/tiny model=random:tiny-llama ppo.steps=2 --rates 1e-3 --seeds 1

It is `recipes/hh_small.yaml` several times, with hh_rlhf/{harmless,helpful}-base.jsonl.gz in the working directory:

1. The reward stage on harmless and on helpful pairs, with pe-rlhf and with TRL's RewardTrainer: both have the same
   pairs, template, LoRA, batch size and one epoch, and the rates of `--rates` on seed 0. The one with the best held-out
   accuracy then runs with `--seeds`, and only those are reported.
2. A gold reward model on harmless pairs that no other sees.
3. `pe-rlhf compare` of one arm over the seeds: reward stage, PPO with the gold model's word on the way, evaluation.

Every run has a folder or a file of its own; what is there is not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from pe_rlhf.comparison.run_statistics import seeds_estimate
from pe_rlhf.config import Recipe
from pe_rlhf.config.load import find_recipe, load_recipe
from pe_rlhf.data.rows import load_preferences
from pe_rlhf.model.names import resolve_model
from reward.winrate import wilson_interval
from tests.benchmarks.results import markdown, table

PARTS = ("harmless", "helpful")
SOURCES = ("reward.data", "reward.eval_data", "ppo.prompts", "evaluate.prompts")
GOLD = ["seed=100", "reward.data.split=train[1160:]", "reward.eval_data.split=train[:1060]", "reward.epochs=2"]
PEER = Path(__file__).parent / "peers" / "trl_reward_accuracy.py"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings of the recipe: model=… ppo.steps=…")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--only-page", action="store_true", help="from what is there")
    args = parser.parse_intermixed_args()
    folder = args.dir.resolve()
    code, rows = 0, read_rows(folder)
    if not args.only_page:
        rows = [row for part in PARTS for of in (ours, trl) for row in tuned(of, part, folder, args)]
        best = next(row["learning_rate"] for row in rows if row["library"] == "pe-rlhf")
        gold = folder / "gold"
        if not (gold / "reward" / "summary.json").exists():
            own("run", "--to", "reward", "--run-dir", gold, *resumed(gold), *args.overrides, *GOLD)
        settings = [
            f"evaluate.judge=reward_model:{gold}",
            f"reward.learning_rate={best}",
            f"compare.seeds={args.seeds}",
        ]
        settings += ["compare.arms=[{name: LoRA, init: lora}]", "compare.share=nothing"]
        command = [sys.executable, "-m", "pe_rlhf", "compare", "hh_small", "--dir", folder / "ppo"]
        code = subprocess.run([*command, *args.overrides, *settings], check=False).returncode
    if not rows:
        sys.exit(f"{folder}: no reward model of hh_small has finished there")
    write(folder, rows, shlex.join(["make", "results", "NAME=hh_small"]), args.seeds)
    sys.exit(code)


def own(command: str, *words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pe_rlhf", command, "hh_small", *map(str, words)], check=True)


def resumed(run: Path) -> list[str]:
    return ["--resume"] if (run / "recipe.yaml").exists() else []


def of_part(part: str, overrides: list[str]) -> list[str]:
    """The recipe's settings for the pairs of a part."""
    return [*overrides, *(f"{source}.path=hh_rlhf/{part}-base.jsonl.gz" for source in SOURCES)]


def tuned(of: Any, part: str, folder: Path, args: argparse.Namespace) -> list[Row]:
    """A library's runs on a part at the rate that was best on seed 0."""
    trials = {rate: of(part, rate, 0, folder, args.overrides) for rate in args.rates}
    rate = max(trials, key=lambda rate: trials[rate]["eval_accuracy"])
    return [of(part, rate, seed, folder, args.overrides) for seed in args.seeds]


def ours(part: str, rate: float, seed: int, folder: Path, overrides: list[str]) -> Row:
    run = folder / "reward" / f"{part}-{rate:g}-{seed}"
    if not (run / "reward" / "summary.json").exists():
        settings = [*of_part(part, overrides), f"reward.learning_rate={rate:g}", f"seed={seed}"]
        own("run", "--to", "reward", "--run-dir", run, *resumed(run), *settings)
    return row_of(
        "pe-rlhf", part, rate, seed, json.loads((run / "reward" / "summary.json").read_text(encoding="utf-8"))
    )


def trl(part: str, rate: float, seed: int, folder: Path, overrides: list[str]) -> Row:
    output = folder / "trl" / f"{part}-{rate:g}-{seed}.json"
    if not output.exists():
        recipe = load_recipe(find_recipe("hh_small"), of_part(part, overrides))
        files = write_pairs(recipe, output.parent / part)
        assert recipe.reward is not None
        sizes = ["--batch-size", recipe.reward.batch_size, "--max-length", recipe.reward.max_length]
        words = ["--model", plain_model(recipe, folder), *files, "--learning-rate", rate, "--seed", seed, *sizes]
        subprocess.run([sys.executable, *map(str, [PEER, *words, "--output", output])], check=True)
    return row_of("TRL", part, rate, seed, json.loads(output.read_text(encoding="utf-8")))


def row_of(library: str, part: str, rate: float, seed: int, summary: Row) -> Row:
    kept = {key: summary[key] for key in ("eval_accuracy", "eval_pairs", "train_pairs", "peak_rss_mib")}
    seconds = summary["seconds_per_step"]
    step = fmean(seconds) if isinstance(seconds, list) else seconds
    return {"library": library, "pairs": part, "learning_rate": rate, "seed": seed, **kept, "seconds_per_step": step}


def plain_model(recipe: Recipe, folder: Path) -> str:
    """The recipe's model as a folder with safetensors and tokenizer, which TRL takes."""
    from pe_rlhf.model.backbone import load_backbone

    target = folder / "model"
    if not target.exists():
        backbone = load_backbone(resolve_model(recipe.model))
        backbone.tokenizer.save_pretrained(target)
        backbone.model.save_pretrained(target)
    return str(target)


def write_pairs(recipe: Recipe, folder: Path) -> list[str | Path]:
    """The recipe's training and held-out pairs as messages, and its chat template: the options that name the files."""
    folder.mkdir(parents=True, exist_ok=True)
    assert recipe.reward is not None
    options: list[str | Path] = ["--template", folder / "template.jinja"]
    (folder / "template.jinja").write_text(recipe.chat_template, encoding="utf-8")
    for name, key in (("train", "data"), ("eval", "eval_data")):
        source = getattr(recipe.reward, key)
        _, records, _ = load_preferences(source, f"reward.{key}", recipe.reward.max_bad_share, lambda record: record)
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for record in records:
                assert isinstance(record.prompt, tuple | list)
                sides = {"chosen": record.chosen, "rejected": record.rejected}
                pair = {k: [*record.prompt, {"role": "assistant", "content": text}] for k, text in sides.items()}
                file.write(json.dumps(pair) + "\n")
        options += [f"--{name}", folder / f"{name}.jsonl"]
    return options


def read_rows(folder: Path) -> list[Row]:
    """The reward models of the last start."""
    path = folder / "rows.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write(folder: Path, rows: list[Row], command: str, seeds: list[int]) -> None:
    """results.csv (reward models), ppo.csv, the figures, and summary.json with two tables for the page."""
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    with (folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    ppo = json.loads((folder / "ppo" / "summary.json").read_text(encoding="utf-8"))
    shutil.copy(folder / "ppo" / "results.csv", folder / "ppo.csv")
    for path in (folder / "ppo").glob("*.svg"):
        shutil.copy(path, folder)
    facts = {"command": command, "seeds": ", ".join(map(str, seeds)), "date": ppo["date"], "machine": ppo["machine"]}
    tables = [accuracies(rows), "[ppo.csv](ppo.csv)", table(ppo), controlled(folder / "ppo")]
    (folder / "summary.json").write_text(json.dumps(facts | {"tables": tables}), encoding="utf-8")


def accuracies(rows: list[Row]) -> str:
    """Mean held-out accuracy over the seeds, its interval over them, and Wilson's for one run's pairs."""
    told: list[Row] = []
    for part, library in dict.fromkeys((row["pairs"], row["library"]) for row in rows):
        own_rows = [row for row in rows if (row["pairs"], row["library"]) == (part, library)]
        values = [row["eval_accuracy"] for row in own_rows]
        mean, pairs = seeds_estimate(values, (0.0, 1.0)), own_rows[0]["eval_pairs"]
        low, high = wilson_interval(mean.value, pairs)
        told.append(
            {
                "pairs": part,
                "library": library,
                "rate": f"{own_rows[0]['learning_rate']:g}",
                "held-out accuracy": f"{mean.value:.3f} ({low:.3f} – {high:.3f} over {pairs} pairs)",
                "by seed": ", ".join(f"{value:.3f}" for value in values),
                "seconds per step": f"{fmean(row['seconds_per_step'] for row in own_rows):.1f}",
                "peak MiB": f"{max(row['peak_rss_mib'] for row in own_rows):,.0f}",
            }
        )
    return markdown(told)


def controlled(comparison: Path) -> str:
    """The win-rates of PPO's policies by the gold model, as they are and with the length controlled."""
    rows: list[Row] = []
    for path in sorted(comparison.glob("runs/*/seed-*/evaluate/summary.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        names = {"win-rate": "win_rate", "length-controlled": "length_controlled_win_rate", "KL": "kl"}
        names |= {"gold score": "gold_policy", "anchor's": "gold_anchor", "length": "mean_length_policy"}
        values = {name: found.get(key) for name, key in names.items()}
        rows.append({"run": path.parts[-3]} | {k: "" if v is None else f"{v:.3f}" for k, v in values.items()})
    return markdown(rows)


if __name__ == "__main__":
    main()

"""Does the project work on this card, and how fast? One command, at most 7 minutes on an H100-class card.

    python -m tests.gpu.acceptance --output OUT [--quick] [--only attention passes]

It needs torch, transformers, peft and the small dependencies of requirements.txt; no vLLM, no hub, no network. Checks
have expected outcomes, timings have ceilings that are measured in the same run. Every row is printed and kept in
OUT/acceptance.json; the exit code is 1 where an expectation was missed. `--quick` runs on a CPU with tiny models, so
that the script itself stays right.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from pe_rlhf.config.load import load_recipe
from tests.gpu import numerics, speed
from tests.gpu.harness import Bench, run_checks

SMOKE_FIGURES = ("reward", "kl", "entropy", "policy_loss")


def smoke(bench: Bench, folder: Path) -> None:
    """The smoke recipe through the command line: fp32 as on the CPU, the device's own defaults, a split bf16 base."""
    card = bench.device.type
    runs: dict[str, list[str]] = {"cpu float32": ["backbone.device=cpu", "backbone.dtype=float32"]}
    if bench.cuda:
        runs[f"{card} float32"] = ["backbone.dtype=float32"]
        runs[f"{card} defaults"] = []
        if importlib.util.find_spec("deepspeed") is not None:
            runs[f"{card} zero3"] = ["deepspeed=zero3"]
    first: dict[str, dict[str, float]] = {}
    for name, settings in runs.items():
        run = folder / f"smoke-{name.replace(' ', '-')}"
        command = [sys.executable, "-m", "pe_rlhf", "run", "smoke", *settings, "ppo.steps=2", "--run-dir", str(run)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        last = "" if ended.returncode == 0 else f": {ended.stderr.strip().splitlines()[-1:]}"
        what = f"pe-rlhf run smoke, {name}: exit code"
        bench.expect("8", what, f"{ended.returncode}{last}", "0", ended.returncode == 0)
        if ended.returncode == 0:
            lines = (run / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            first[name] = json.loads(lines[0])
            recipe = load_recipe(run / "recipe.yaml")
            assert recipe.ppo is not None
            found = f"{recipe.backbone.dtype}, {recipe.ppo.micro_batch_tokens:,}"
            bench.note("8", f"dtype and micro_batch_tokens, {name}", found)
    if len(first) == len(runs) and bench.cuda:
        own, wide = first["cpu float32"], first[f"{card} float32"]
        differs = max(abs(own[k] - wide[k]) for k in SMOKE_FIGURES if k in own and k in wide)
        bench.expect("8", "first step on the card against the CPU's, fp32", differs, "< 1e-3", differs < 1e-3)
        for name, metrics in first.items():
            limit = 1e-3 if "float32" in name else 0.05
            if (mismatch := metrics.get("logprob_mismatch")) is not None:
                bench.expect("8", f"sampler against trainer, {name}", mismatch, f"< {limit}", mismatch < limit)
            if name.endswith("zero3"):  # the same run, with a base that is gathered layer by layer
                differs = max(abs(metrics[k] - first[f"{card} defaults"][k]) for k in SMOKE_FIGURES if k in metrics)
                bench.expect("8", "first step with a split base against a whole one", differs, "< 1e-2", differs < 1e-2)


def main() -> None:
    run_checks(
        __doc__,
        "acceptance",
        lambda bench, folder: {
            "environment": lambda: numerics.environment(bench),
            "attention": lambda: numerics.attention(bench),
            "packed": lambda: numerics.packed(bench),
            "step_zero": lambda: numerics.step_zero(bench),
            "narrow_adapters": lambda: numerics.narrow_adapters(bench),
            "determinism": lambda: numerics.determinism(bench),
            "spectra": lambda: numerics.spectra(bench),
            "memory": lambda: speed.memory(bench),
            "fingerprint": lambda: speed.fingerprint(bench),
            "small_models": lambda: speed.small_models(bench),
            "passes": lambda: speed.passes(bench),
            "smoke": lambda: smoke(bench, folder),
            "zero": lambda: numerics.zero(bench),
        },
    )


if __name__ == "__main__":
    main()

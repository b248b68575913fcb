"""Does the project work on this card, and how fast? One command, at most 7 minutes on an H100-class card.

    python -m tests.gpu.acceptance --output OUT [--quick] [--only attention passes]

It needs torch, transformers, peft and the small dependencies of requirements.txt; no vLLM, no hub, no network. Checks
have expected outcomes, timings have ceilings that are measured in the same run. Every row is printed and kept in
OUT/acceptance.json; the exit code is 1 where an expectation was missed. `--quick` runs on a CPU with tiny models, so
that the script itself stays right.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from pe_rlhf.config.load import load_recipe
from tests.gpu import numerics, speed
from tests.gpu.harness import Bench

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="tiny models, on whatever device there is")
    parser.add_argument("--only", nargs="*", help="names of checks")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.quick:
        parser.error("there is no GPU here; --quick checks the script itself")
    if args.quick:
        torch.set_num_threads(1)  # more cost more than they give on tiny models
    args.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PE_RLHF_CACHE", str(args.output / "cache"))
    bench = Bench(device, args.quick)
    checks: dict[str, Callable[[Bench], None]] = {
        "environment": numerics.environment,
        "attention": numerics.attention,
        "packed": numerics.packed,
        "step_zero": numerics.step_zero,
        "narrow_adapters": numerics.narrow_adapters,
        "determinism": numerics.determinism,
        "spectra": numerics.spectra,
        "memory": speed.memory,
        "fingerprint": speed.fingerprint,
        "small_models": speed.small_models,
        "passes": speed.passes,
        "smoke": lambda bench: smoke(bench, args.output),
        "zero": numerics.zero,
    }
    for name, check in checks.items():
        if args.only and name not in args.only:
            continue
        start = time.perf_counter()
        try:
            check(bench)
        except Exception as error:  # one broken check must not hide the others
            traceback.print_exc()
            bench.expect(name, "ends without an error", f"{type(error).__name__}: {error}"[:300], "no error", False)
        bench.free()
        bench.note(name, "seconds", time.perf_counter() - start)
        report = bench.as_json() | {"quick": args.quick, "device": str(device)}
        (args.output / "acceptance.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    failed = [row for row in bench.rows if row.ok is False]
    print(f"\n{len(bench.rows)} rows, {sum(row.ok is True for row in bench.rows)} as expected, {len(failed)} not:")
    for row in failed:
        print(f"  {row.check} {row.what}: {row.found}, expected {row.expected}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

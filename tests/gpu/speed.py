"""Timings against ceilings that are measured in the same run: passes of each role, micro-batch sizes, sampling."""

from __future__ import annotations

import time
from functools import partial
from typing import Literal

import torch

from pe_rlhf.config import SamplingConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.system.memory import reset_peak_memory
from tests.gpu.harness import Bench, move, sequences

ROLES = ("lora", "pissa_like")


def passes(bench: Bench) -> None:
    """A 7B-shaped model: what an adapter costs beside the anchor's pass, and how much of the card is used."""
    backbone = bench.backbone("7B")
    backbone.add_adapter("lora", rank=16, alpha=32)
    backbone.add_adapter("pissa_like", init="orthogonal", rank=16, alpha=32)  # B0 ≠ 0, and no SVD to wait for
    for role in ROLES:
        move(backbone, role)
    tokens = (4096, 8192) if bench.cuda else (64,)
    for count in tokens:
        rows = sequences(count // 1024 or 1, 512 if bench.cuda else 24, 512 if bench.cuda else 40, 500)
        forward = {role: bench.milliseconds(partial(_forward, backbone, role, rows)) for role in ("anchor", *ROLES)}
        both = {role: bench.milliseconds(partial(_both, backbone, role, rows)) for role in ROLES}
        bench.note("5", f"{count} tokens: anchor forward, ms", forward["anchor"])
        plain = bench.milliseconds(partial(_anchor_both, backbone, rows)) - forward["anchor"]
        bench.note("5", f"{count} tokens: anchor backward, ms", plain)
        for role in ROLES:
            ratio = forward[role] / forward["anchor"]
            _aim(bench, "5", f"{count} tokens, {role}: forward / anchor's", ratio, 1.15)
            backward = both[role] - forward[role]
            _aim(bench, "5", f"{count} tokens, {role}: backward / anchor's backward", backward / plain, 1.25)
        flops = _flops(backbone) * count
        rate = 2 * flops / both["lora"] / 1e9
        share = rate / bench.peak_tflops
        if bench.cuda:
            bench.expect("5", f"{count} tokens: share of the bf16 peak in an update", share, ">= 0.40", share >= 0.40)
        if bench.cuda:
            bench.note("5", f"{count} tokens: peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30)
            torch.cuda.reset_peak_memory_stats()
    rows = sequences(4, 512, 512, 500) if bench.cuda else sequences(1, 24, 40, 500)
    if bench.cuda:
        _launches(bench, backbone, rows)
    sampling(bench, backbone)


def _aim(bench: Bench, check: str, what: str, found: float, limit: float) -> None:
    """A ratio that is only meaningful on a GPU."""
    if bench.cuda:
        bench.expect(check, what, found, f"<= {limit}", found <= limit)
    else:
        bench.note(check, what, found)


def _flops(backbone: Backbone) -> float:
    """Operations of a forward pass per token: two for each weight that takes part in a product."""
    embedding = backbone.model.get_input_embeddings().weight.numel()  # type: ignore[union-attr,operator]
    whole = sum(p.numel() for name, p in backbone.model.named_parameters() if ".adapters." not in name)
    return 2.0 * (whole - embedding)


def _forward(backbone: Backbone, role: str, rows: object) -> None:
    with torch.no_grad(), backbone.role(role):
        backbone.response_logprobs(rows)  # type: ignore[arg-type]


def _both(backbone: Backbone, role: str, rows: object) -> None:
    for parameter in backbone.role_parameters(role).values():
        parameter.grad = None
    with backbone.role(role):
        backbone.response_logprobs(rows)[0].sum().backward()  # type: ignore[arg-type]


def _anchor_both(backbone: Backbone, rows: object) -> None:
    """Forward and backward without an adapter: the gradient goes through the frozen base down to the embeddings."""
    embeddings = backbone.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())  # type: ignore[union-attr]
    try:
        with backbone.role("anchor"):
            backbone.response_logprobs(rows)[0].sum().backward()  # type: ignore[arg-type]
    finally:
        hook.remove()


def _launches(bench: Bench, backbone: Backbone, rows: object) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        _both(backbone, "lora", rows)
        bench.sync()
    counts = {event.key: event.count for event in record.key_averages()}
    wanted = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cudaStreamSynchronize", "cudaMemcpyAsync")
    bench.note("5", "calls of an update's pass", ", ".join(f"{key} {counts.get(key, 0)}" for key in wanted))
    top = sorted(record.key_averages(), key=lambda e: -e.self_device_time_total)[:12]
    for event in top:
        bench.note("5", f"  {event.key[:70]}", f"{event.self_device_time_total / 1e3:.1f} ms, {event.count} calls")


def sampling(bench: Bench, backbone: Backbone) -> None:
    """Sampling by transformers: milliseconds per token with the adapter beside the base, merged, and without."""
    new, count = (32, 64) if bench.cuda else (4, 2)
    prompts = [list(range(3 + i, 67 + i)) if bench.cuda else [3 + i, 4, 5] for i in range(count)]
    backbone.eos_token_ids = []
    ways: list[tuple[str, Literal["adapter", "merged", "auto"]]]
    ways = [("anchor", "adapter"), ("lora", "adapter"), ("lora", "merged"), ("lora", "auto")]
    for role, sync in ways:
        config = SamplingConfig(max_new_tokens=new, batch_size=count, sync=sync)
        rollout = HFRollout(backbone, role, config)
        taken = bench.milliseconds(partial(rollout.generate, prompts, 0), 1)
        bench.note("7", f"HF sampling, {role}, sync {sync}: ms per token of {count} rows", taken / new)
    bench.free()


def small_models(bench: Bench) -> None:
    """A 0.5B-shaped model: how much larger micro-batches gain."""
    backbone = bench.backbone("0.5B")
    backbone.add_adapter("lora", rank=16, alpha=32)
    move(backbone, "lora")
    taken = {}
    for count in (1024, 8192, 32768) if bench.cuda else (64, 128):
        rows = sequences(max(1, count // 1024), 512 if bench.cuda else 24, 512 if bench.cuda else 40, 500)
        taken[count] = bench.milliseconds(partial(_both, backbone, "lora", rows)) / count
        bench.note("6", f"0.5B, update in passes of {count} tokens: µs per token", 1e3 * taken[count])
    if bench.cuda:
        share = 2 * _flops(backbone) / taken[32768] / 1e9 / bench.peak_tflops
        bench.expect("6", "0.5B, 32k tokens: share of the bf16 peak", share, ">= 0.20", share >= 0.20)


def memory(bench: Bench) -> None:
    """What a stage has freed is given back before the next one, whose vLLM engine needs it."""
    if not bench.cuda:
        return
    blocks = [torch.empty(2**28, device=bench.device, dtype=torch.uint8) for _ in range(16)]
    before = torch.cuda.memory_reserved() / 2**30
    del blocks
    reset_peak_memory()
    after = torch.cuda.memory_reserved() / 2**30
    bench.expect(
        "9",
        "GiB kept after a stage that used 4 GiB more",
        f"{before:.1f} → {after:.1f}",
        "4 less",
        before - after > 3.9,
    )


def fingerprint(bench: Bench) -> None:
    """Seconds that the base's identity takes, the first time and again."""
    backbone = bench.backbone("0.5B")
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        _ = backbone.anchor_sha256
        taken.append(time.perf_counter() - start)
    size = sum(p.nbytes for p in backbone.model.parameters()) / 1e9
    bench.note("13", "fingerprint, seconds per GB", taken[0] / size)
    bench.expect(
        "13", "fingerprint again, share of the first time", taken[1] / taken[0], "< 0.1", taken[1] < 0.1 * taken[0]
    )

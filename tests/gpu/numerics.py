"""Checks of what is computed: attention, step 0, bf16 adapters, determinism, spectral inits, ZeRO."""

from __future__ import annotations

import copy
import math
import statistics
import time
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from pe_rlhf.adapters.lora.anchored import AnchoredLoRA, anchored_tensors
from pe_rlhf.adapters.lora.inits.svd import full_svd
from pe_rlhf.config import LoRAConfig
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.fast.varlen import takes_segments
from pe_rlhf.types import Sequences
from tests.gpu.harness import Bench, move, relative_error, sequences
from tests.tiny import INITS, add_role


def environment(bench: Bench) -> None:
    """Versions, card, and the largest rate of a bf16 product, which the timings are compared with."""
    import transformers

    bench.note("0", "torch, transformers", f"{torch.__version__}, {transformers.__version__}")
    if bench.cuda:
        free, total = torch.cuda.mem_get_info()
        bench.note("0", "card", f"{torch.cuda.get_device_name()}, {total / 2**30:.0f} GiB, {free / 2**30:.0f} free")
        bench.note("0", "cuDNN, attention by cuDNN", f"{torch.backends.cudnn.version()}, {_cudnn_attention()}")
    n = 8192 if bench.cuda else 512
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    bench.peak_tflops = 2 * n**3 / bench.milliseconds(lambda: a @ b, 10) / 1e9
    bench.note("0", f"bf16 product of {n}³, TFLOP/s", bench.peak_tflops)
    with suppress(ImportError):
        import inspect

        from torch.nn.attention import varlen

        bench.note("0", "varlen_attn", str(inspect.signature(varlen.varlen_attn)))


def _cudnn_attention() -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled()


def attention(bench: Bench) -> None:
    """cuDNN's attention has NaN gradients for some masked shapes; a backbone on a GPU must not use it."""
    if bench.cuda:
        torch.backends.cuda.enable_cudnn_sdp(True)
        bench.note("1", "NaN in grad_q, mask of 704, cuDNN on", _nan_gradients(masked=True))
        bench.note("1", "NaN in grad_q, causal 704, cuDNN on", _nan_gradients(masked=False))
        first, again = _first_calls(bench)
        bench.note("2", "new shape, cuDNN on: first and second call, ms", f"{first:.2f}, {again:.2f}")
    backbone = bench.backbone("0.5B", layers=2)
    if bench.cuda:
        bench.expect(
            "1", "a backbone switches cuDNN's attention off", not _cudnn_attention(), "True", not _cudnn_attention()
        )
        found = _nan_gradients(masked=True)
        bench.expect("1", "NaN in grad_q, mask of 704, with a backbone", found, "0", found == 0)
        first, again = _first_calls(bench)
        text = f"{first:.2f}, {again:.2f}"
        bench.expect("2", "new shape: first and second call, ms", text, "first < 5 ms over", first - again < 5)
    # Pairs with equal prompts: prefix and rest are 704 keys, a masked pass.
    prompt = torch.arange(576).remainder(200).add(3).tolist()
    responses = [list(range(first, first + 128)) for first in (3, 9)]
    pairs = Sequences.pack([prompt, prompt], responses, 0)
    backbone.add_adapter("policy", rank=8, alpha=16)
    move(backbone, "policy")
    with backbone.role("policy"):
        backbone.response_logprobs(pairs)[0].sum().backward()
    gradients = [p.grad for p in backbone.role_parameters("policy").values() if p.grad is not None]
    finite = all(bool(g.isfinite().all()) for g in gradients)
    bench.expect("1", "gradients of a pair with 704 keys are finite", finite, "True", finite)


def packed(bench: Bench) -> None:
    """Packed passes in bf16 against fp32 ones over each row by itself: shared prompts, windows, rows of all lengths."""
    if bench.cuda:
        bench.note("14", "varlen kernel", takes_segments(*2 * (torch.empty(1, 1, 64, device="cuda").bfloat16(),)))
    prompts = [list(range(3, 40)), list(range(3, 40)), list(range(60, 75)), [80, 81]]
    rows = Sequences.pack(prompts, [list(range(90, 90 + n)) for n in (40, 25, 60, 3)], 0)
    for name in ("qwen2", "mistral with a window of 24"):
        narrow = bench.model("0.5B", layers=3)
        if name.startswith("mistral"):
            narrow = _mistral(bench)
        wide = load_backbone(copy.deepcopy(narrow).float())
        backbone = load_backbone(narrow)
        found, expected = (_gradients(b, rows) for b in (backbone, wide))
        for what, own, true in zip(("log-probs", "gradients"), found, expected, strict=True):
            error = relative_error(own, true)
            bench.expect("14", f"{name}, packed bf16 against fp32 row by row, {what}", error, "< 0.05", error < 0.05)


def _gradients(backbone: Backbone, rows: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and all gradients of a policy that has moved; in fp32 row by row, so that nothing is packed."""
    backbone.add_adapter("policy", rank=8, alpha=16)
    move(backbone, "policy", 0.02)
    single = [rows.take(torch.tensor([i])) for i in range(len(rows))]
    parts = [rows] if backbone.model.dtype == torch.bfloat16 else single
    with backbone.role("policy"):
        logprobs = torch.cat([backbone.response_logprobs(part)[0] for part in parts])
        logprobs.square().sum().backward()
    gradients = [p.grad.flatten() for p in backbone.role_parameters("policy").values() if p.grad is not None]
    return logprobs.detach().float(), torch.cat(gradients)


def _mistral(bench: Bench) -> PreTrainedModel:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 24}
    torch.manual_seed(0)
    with bench.device:
        return MistralForCausalLM(MistralConfig(**sizes, **heads)).eval().to(torch.bfloat16)  # type: ignore[arg-type]


def _nan_gradients(*, masked: bool, length: int = 704, width: int = 64) -> int:
    """NaN in the gradient of a query whose logits are about −120 (pytorch issue 196678, trl issue 7181)."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, length, width, device="cuda", dtype=torch.bfloat16) * 0.1 for _ in range(2))
    v = torch.randn(1, 1, length, width, device="cuda", dtype=torch.bfloat16)
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(width)
    q.requires_grad_()
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[None, None] if masked else None
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).sum().backward()
    assert q.grad is not None
    return int((~q.grad.isfinite()).sum())


def _first_calls(bench: Bench) -> tuple[float, float]:
    """Median milliseconds of the first and the second call, over shapes that were not seen before."""
    taken: tuple[list[float], list[float]] = ([], [])
    start = int(time.time()) % 61
    for i in range(12):
        length = 200 + 3 * i + start
        q, k, v = (
            torch.randn(4, 14, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        mask = torch.ones(4, 1, length, length, dtype=torch.bool, device="cuda").tril()
        for call in taken:
            bench.sync()
            begin = time.perf_counter()
            F.scaled_dot_product_attention(q, k, v, mask).sum().backward()
            bench.sync()
            call.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(taken[0]), statistics.median(taken[1])


def step_zero(bench: Bench) -> None:
    """Every init starts as the anchor, to the bit, in every dtype; the anchor is the model that was loaded."""
    settings = [("bf16", torch.bfloat16, False), ("fp32", torch.float32, False), ("fp16", torch.float16, False)]
    if bench.cuda:
        settings.append(("fp32 with TF32", torch.float32, True))
    for name, dtype, tf32 in settings:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        model = bench.model("0.5B", dtype, layers=2)
        ids = [torch.randint(3, 500, (2, n), device=bench.device) for n in (1, 7, 300)]
        with torch.no_grad():
            original = [model(rows).logits for rows in ids]
        backbone = Backbone(model)
        wrong: list[str] = []
        for init in INITS:  # those that look at data are in the unit tests
            add_role(backbone, init, init, rank=16, alpha=32)
            with torch.no_grad():
                anchor = [backbone(rows).logits for rows in ids]
                with backbone.role(init):
                    played = [backbone(rows).logits for rows in ids]
            if not all(map(torch.equal, played, anchor)) or not all(map(torch.equal, anchor, original)):
                wrong.append(init)
            wrong += _packed_differs(backbone, init)
        bench.expect("3", f"{name}: inits that are not bit-identical at step 0", wrong or "none", "none", not wrong)
    torch.backends.cuda.matmul.allow_tf32 = False


def _packed_differs(backbone: Backbone, role: str) -> list[str]:
    rows = sequences(3, 20, 30, 500)
    with torch.no_grad():
        anchor, _ = backbone.response_logprobs(rows)
        with backbone.role(role):
            found, _ = backbone.response_logprobs(rows)
    return [] if torch.equal(anchor, found) else [f"{role} (packed)"]


def narrow_adapters(bench: Bench) -> None:
    """After k steps of Adam, how much of the update arrives: in our bf16 pass, at a bf16 server, merged into bf16."""
    wide, narrow, rank = (18944, 3584, 16) if bench.cuda else (192, 128, 8)
    generator = torch.Generator(bench.device).manual_seed(0)
    W0 = torch.randn(wide, narrow, device=bench.device, generator=generator) * 0.02
    U, S, V = torch.svd_lowrank(W0, q=rank, niter=4)
    factors = {
        "lora": (torch.randn(rank, narrow, device=bench.device, generator=generator) / narrow**0.5, None),
        "pissa": ((S.sqrt()[:, None] * V.T) / 2**0.5, U * S.sqrt() / 2**0.5),
    }
    x = torch.randn(256, narrow, device=bench.device, generator=generator).bfloat16()
    for name, (A0, B0) in factors.items():
        B0 = torch.zeros(wide, rank, device=bench.device) if B0 is None else B0
        for steps in (1, 20):
            adapter = AnchoredLoRA(anchored_tensors(A0, B0), LoRAConfig(rank=rank, alpha=2.0 * rank)).to(bench.device)
            with torch.no_grad():
                for p in adapter.parameters():
                    p.add_(1e-4 * steps * torch.randn(p.shape, device=bench.device, generator=generator).sign())
                A, B = adapter.lora_A.double(), adapter.lora_B.double()
                true = 2.0 * (x.double() @ A.T @ B.T - x.double() @ A0.double().T @ B0.double().T)
                own = adapter.add_low_rank(x, torch.zeros(256, wide, device=bench.device, dtype=torch.bfloat16))
                f, change_OI = adapter.lora_factors(), adapter.delta_weight(W0)
                assert f is not None
                assert change_OI is not None
                low = (x.float() @ f.A_RI.bfloat16().float().T).bfloat16()
                served = f.scale * (low.float() @ f.B_OR.bfloat16().float().T)
                kept = (W0.bfloat16().float() + change_OI).bfloat16().float() - W0.bfloat16().float()
                share = float((kept * change_OI).sum() / change_OI.square().sum())
            for what, found in (("our pass", own), ("a bf16 server", served)):
                error = relative_error(found, true)
                bench.expect("4", f"{name}, {steps} steps, {what}: error of the update", error, "< 0.01", error < 0.01)
            bench.note("4", f"{name}, {steps} steps: share of the update that a bf16 merge keeps", share)


def determinism(bench: Bench) -> None:
    """The same update twice from one state: to the bit, or to rounding?"""
    backbone = bench.backbone("0.5B", layers=4)
    backbone.add_adapter("policy", rank=8, alpha=16)
    move(backbone, "policy")
    rows = sequences(4, 100, 150, 500)

    def gradients() -> list[torch.Tensor]:
        for p in backbone.role_parameters("policy").values():
            p.grad = None
        with backbone.role("policy"):
            backbone.response_logprobs(rows)[0].sum().backward()
        return [p.grad.clone() for p in backbone.role_parameters("policy").values() if p.grad is not None]

    first, second = gradients(), gradients()
    same = all(map(torch.equal, first, second))
    error = max(relative_error(b, a) for a, b in zip(first, second, strict=True) if a.any())
    bench.note("12", "the same gradient twice, bit-identical", f"{same}, largest relative difference {error:.2g}")
    bench.expect("12", "the same gradient twice, to rounding", error, "< 0.01", error < 0.01)


def spectra(bench: Bench) -> None:
    """Spectral inits: seconds for one large layer, and the least directions against fp64 on a CPU."""
    small = torch.randn(768, 768, generator=torch.Generator().manual_seed(0))
    ours = full_svd(small.to(bench.device))
    _, _, Vh = torch.linalg.svd(small.double())
    kept = float((ours.Vh_KI[-16:].cpu().double() @ Vh[-16:].T).norm() / 4)  # 1: the same subspace
    bench.expect("11", "least 16 directions: overlap with fp64's on a CPU", kept, "> 0.999", kept > 0.999)
    if bench.cuda:
        for shape in ((3584, 3584), (18944, 3584)):
            layer = torch.randn(*shape, device=bench.device) * 0.02
            bench.sync()
            start = time.perf_counter()
            full_svd(layer)
            bench.sync()
            seconds = time.perf_counter() - start
            bench.expect("11", f"full_svd of {shape[0]} × {shape[1]}, seconds", seconds, "< 5", seconds < 5)


def zero(bench: Bench) -> None:
    """ZeRO 0 to 3 in one process against plain AdamW: the same weights; a bf16 base stays bf16 when it is split."""
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        bench.note("10", "DeepSpeed", "not installed, not checked")
        return
    from pe_rlhf.config import OptimizerConfig
    from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer
    from pe_rlhf.optim.zero import init_processes

    init_processes(True)
    torch.manual_seed(0)
    start = {"w": nn.Parameter(torch.randn(64, 32, device=bench.device))}
    target = torch.randn(64, 32, device=bench.device)
    ends = {}
    for stage in (None, 0, 1, 2, 3):
        weights = copy.deepcopy(start)
        settings = None if stage is None else {"zero_optimization": {"stage": stage}}
        optimizer = RoleOptimizer([RoleGroup("policy", weights, 1e-2)], OptimizerConfig(), 5, settings)
        for _ in range(5):
            optimizer.backward((weights["w"] - target).square().mean())
            optimizer.step()
        ends[stage] = weights["w"].detach().clone()
    for stage in (0, 1, 2, 3):
        error = relative_error(ends[stage], ends[None])
        bench.expect("10", f"ZeRO {stage} against AdamW, 5 steps", error, "< 1e-6", error < 1e-6)

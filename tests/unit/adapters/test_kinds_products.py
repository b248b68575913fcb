"""Every way in which kinds multiply, against a dense weight under autograd; ten steps on fp32 and on bf16 bases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pe_rlhf.adapters.layer import AdapterLayer, weight_out_in
from tests.unit.adapters import dense

OUT, IN, TOKENS = 24, 16, 7
Tensors = dict[str, Tensor]


def bat(t: Tensors, W: Tensor) -> Tensor:
    rank = t["miss_block"].shape[-1]
    rows = []
    for D, row in zip(t["miss_block"], W.split(rank), strict=True):
        rows.append(torch.cat([block @ D + D for block in row.split(rank, dim=1)], dim=1))
    return torch.cat(rows)


def loha(t: Tensors, W: Tensor) -> Tensor:
    rank = t["hada_w1_b"].shape[0]
    return 8 / rank * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def miss(t: Tensors, W: Tensor) -> Tensor:
    D = t["miss_block"]
    return torch.stack([D[i % len(D)] for i in range(W.shape[1])], dim=1)


def vera(t: Tensors, W: Tensor) -> Tensor:
    out_features, in_features = W.shape
    A = (2 * torch.rand(in_features, 8, generator=torch.Generator().manual_seed(0)) - 1).T / in_features**0.5
    B = (2 * torch.rand(out_features, 8, generator=torch.Generator().manual_seed(1)) - 1) / 8**0.5
    return t["vera_lambda_b"][:, None] * (B.to(W.dtype) @ (t["vera_lambda_d"][:, None] * A.to(W.dtype)))


def tinylora(t: Tensors, W: Tensor) -> Tensor:
    roots = t["S_R"].sqrt().diag()
    mixed = sum(v * P for v, P in zip(t["tinylora_v"], t["projections_KRR"], strict=True))
    return t["U_OR"] @ roots @ mixed @ roots @ t["Vh_RI"]


def lora(t: Tensors, W: Tensor) -> Tensor:
    delta = 2.0 * t["lora_B"] @ t["lora_A"]
    return delta - 2.0 * t["initial_B_OR"] @ t["initial_A_RI"] if "initial_B_OR" in t else delta


def dora(t: Tensors, W: Tensor) -> Tensor:
    moved = W + lora(t, W)
    return t["magnitude"][:, None] * moved / moved.norm(dim=1, keepdim=True).detach() - W


def adalora(t: Tensors, W: Tensor) -> Tensor:
    return 2.0 * (t["lora_B"] @ torch.diag(t["lora_E"][:, 0]) @ t["lora_A"])


LOW_RANK = {"rank": 4, "alpha": 8}
Case = tuple[Callable[[Tensors, Tensor], Tensor], dict[str, Any]]
CASES: dict[str, Case] = {
    "lora": (lora, LOW_RANK),
    "lora, pissa": (lora, {"init": "pissa", **LOW_RANK}),
    "dora": (dora, LOW_RANK),
    "dora, pissa": (dora, {"init": "pissa", **LOW_RANK}),
    "adalora": (adalora, {"target_rank": 4, **LOW_RANK}),
    "bat": (bat, {"rank": 4}),
    "bat, one block across": (bat, {"rank": 8}),
    "loha, by its factors": (loha, {"rank": 1}),
    "loha, by its matrix": (loha, {"rank": 4}),
    "miss": (miss, {"rank": 4}),
    "miss, a block that is cut": (miss, {"rank": 5}),
    "tinylora": (tinylora, {"rank": 3, "size": 5}),
    "vera": (vera, {"rank": 8, "d_initial": 1.0}),
}
WHOLE = [(base, torch.float32) for base in ("linear", "linear with a hook", "conv1d", "no bias")]
OF_THE_WEIGHT = ("bat", "dora")


def made(case: str, base: str, dtype: torch.dtype) -> tuple[AdapterLayer, nn.Module]:
    torch.manual_seed(0)
    width = 8 if "one block" in case else IN
    module = Conv1D(OUT, width) if base == "conv1d" else nn.Linear(width, OUT, bias=base != "no bias")
    if base == "linear with a hook":
        module.register_forward_hook(lambda _module, _inputs, y: y)
    module.to(dtype).requires_grad_(False)
    return dense.made(module, case.split(",")[0], **CASES[case][1])[1], module


@pytest.mark.parametrize("case", [case for case in CASES if case.split(",")[0] not in OF_THE_WEIGHT])
def test_a_change_of_its_own_is_that_of_a_dense_matrix(case: str) -> None:
    delta, given = CASES[case]
    dense.check_all(
        case.split(",")[0], lambda t: delta(t, torch.zeros(dense.OUT, dense.IN, dtype=torch.double)), **given
    )


@pytest.mark.parametrize(("base", "dtype"), [*WHOLE, ("linear", torch.bfloat16)])
@pytest.mark.parametrize("case", [case for case in CASES if case.split(",")[0] in OF_THE_WEIGHT])
def test_ten_steps_of_a_change_of_the_weight_are_those_of_a_dense_one(case: str, base: str, dtype: torch.dtype) -> None:
    layer, module = made(case, base, dtype)
    W = weight_out_in(module).double()
    dense.check_training(module, layer, lambda t: CASES[case][0](t, W))
    assert layer(torch.zeros(0, 5, W.shape[1], dtype=dtype), module).shape == (0, 5, OUT)


@pytest.mark.parametrize(
    ("base", "dtype"), [*WHOLE, ("linear", torch.bfloat16), ("conv1d", torch.bfloat16), ("linear", torch.float16)]
)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_a_dense_weight(case: str, base: str, dtype: torch.dtype) -> None:
    layer, module = made(case, base, dtype)
    x = torch.randn(2, TOKENS, weight_out_in(module).shape[1]).to(dtype).requires_grad_()
    assert torch.equal(layer(x, module), module(x))  # the start, whichever way it is computed
    before = weight_out_in(module).clone()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    own = {n: t.detach().double().requires_grad_(n in layer.trained) for n, t in layer.state_dict().items()}
    W, wide = before.double(), x.detach().double().requires_grad_()
    bias = getattr(module, "bias", None)
    expected = nn.functional.linear(wide, W + CASES[case][0](own, W), None if bias is None else bias.double())
    found = layer(x, module)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights.to(dtype)).sum().backward()
    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert apart(found, expected) < close
    assert apart(x.grad, wide.grad) < close
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert apart(parameter.grad, own[name].grad) < close, name
    assert torch.equal(weight_out_in(module), before)
    with torch.no_grad():
        assert apart(layer(x, module), expected) < close


def apart(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float(((found.double() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize(("kind", "independent"), [("miss", 1), ("bat", 4)])
def test_the_blocks_of_bat_are_not_collinear_as_those_of_bone_are(kind: str, independent: int) -> None:
    """Of the four input blocks of a block of outputs, after a step: Bone changes each by the same matrix."""
    layer, module = made(kind, "linear", torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(2, TOKENS, IN), module).square().sum().backward()
    optimizer.step()
    delta = layer.delta_weight(weight_out_in(module))
    assert delta is not None
    for rows in delta.split(4):
        blocks = torch.stack([block.flatten() for block in rows.split(4, dim=1)])
        assert int(torch.linalg.matrix_rank(blocks.double(), rtol=1e-5)) == independent


def test_a_factor_that_is_not_trained_gets_no_gradient() -> None:
    layer, module = made("loha, by its matrix", "linear", torch.float32)
    layer.get_parameter("hada_w1_b").requires_grad_(False)
    with torch.no_grad():
        layer.get_parameter("hada_w2_b").add_(1.0)
    layer(torch.randn(3, IN), module).sum().backward()
    assert [n for n, p in layer.named_parameters() if p.grad is None] == ["hada_w1_b"]

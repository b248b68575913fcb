"""Layers whose kinds multiply in more than one way, each way against a dense weight under autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pe_rlhf.adapters.kind import LayerContext, find_kind
from pe_rlhf.adapters.layer import AdapterLayer, weight_out_in

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


CASES: dict[str, tuple[Callable[[Tensors, Tensor], Tensor], dict[str, Any]]] = {
    "bat": (bat, {"rank": 4}),
    "bat, one block across": (bat, {"rank": 8}),
    "loha by its factors": (loha, {"rank": 1}),
    "loha by its matrix": (loha, {"rank": 4}),
    "miss": (miss, {"rank": 4}),
    "miss, a block that is cut": (miss, {"rank": 5}),
    "tinylora": (tinylora, {"rank": 3, "size": 5}),
    "vera": (vera, {"rank": 8}),
}
BASES = ("linear", "linear with a hook", "conv1d", "no bias")


def made(case: str, base: str, dtype: torch.dtype) -> tuple[AdapterLayer, nn.Module]:
    torch.manual_seed(0)
    width = 8 if "one block" in case else IN
    module = Conv1D(OUT, width) if base == "conv1d" else nn.Linear(width, OUT, bias=base != "no bias")
    if base == "linear with a hook":
        module.register_forward_hook(lambda _module, _inputs, y: y)
    module.to(dtype).requires_grad_(False)
    name = case.split(",")[0].split()[0]
    kind = find_kind(name)(find_kind(name).settings_type(kind=name, **CASES[case][1]))
    weight_OI = weight_out_in(module).float()
    return kind.build(kind.tensors(LayerContext(weight_OI, torch.Generator().manual_seed(1))), weight_OI), module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", BASES)
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
    dense = nn.functional.linear(wide, W + CASES[case][0](own, W), None if bias is None else bias.double())
    found = layer(x, module)
    weights = torch.randn_like(dense)
    (dense * weights).sum().backward()
    (found * weights.to(dtype)).sum().backward()
    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert apart(found, dense) < close
    assert apart(x.grad, wide.grad) < close
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert apart(parameter.grad, own[name].grad) < close, name
    assert torch.equal(weight_out_in(module), before)
    with torch.no_grad():
        assert apart(layer(x, module), dense) < close


def apart(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float(((found.double() - expected).norm() / expected.norm()).detach())


def test_a_factor_that_is_not_trained_gets_no_gradient() -> None:
    layer, module = made("loha by its matrix", "linear", torch.float32)
    layer.get_parameter("hada_w1_b").requires_grad_(False)
    with torch.no_grad():
        layer.get_parameter("hada_w2_b").add_(1.0)
    layer(torch.randn(3, IN), module).sum().backward()
    assert [n for n, p in layer.named_parameters() if p.grad is None] == ["hada_w1_b"]

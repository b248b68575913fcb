"""Kinds of adapters against dense oracles: a layer, and a function that gives its ΔW from its tensors in fp64."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pe_rlhf.adapters.kind import AdapterKind, LayerContext, kind_of
from pe_rlhf.adapters.layer import AdapterLayer, weight_out_in
from pe_rlhf.adapters.layer_statistics import LayerStatistics
from pe_rlhf.config.adapter import settings_of

IN, OUT = 13, 22  # neither is a multiple of the ranks and blocks in the tests
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Delta = Callable[[dict[str, Tensor]], Tensor]


def base_layer(module: str = "linear", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A base with a random weight and bias, always the same; `conv1d` has its weight the other way round."""
    base = Conv1D(OUT, IN) if module == "conv1d" else nn.Linear(IN, OUT)
    generator = torch.Generator().manual_seed(5)
    weight_OI, bias_O = torch.randn(OUT, IN, generator=generator), torch.randn(OUT, generator=generator)
    base.load_state_dict({"weight": weight_OI.T if module == "conv1d" else weight_OI, "bias": bias_O})
    return base.to(dtype).requires_grad_(False)


def gradients(count: int = 1) -> LayerStatistics:
    generator = torch.Generator().manual_seed(9)
    return LayerStatistics(tuple(torch.randn(OUT, IN, generator=generator) for _ in range(count)))


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(7)).to(dtype)


def settings(name: str, **given: Any) -> Any:
    """The settings of a kind as a recipe gives them."""
    return settings_of(name).model_validate({"kind": name, **given})


def made(
    base: nn.Module, name: str, statistics: LayerStatistics | None = None, **given: Any
) -> tuple[AdapterKind[Any], Any]:
    """A kind and a fresh layer of it for a base."""
    kind = kind_of(settings(name, **given))
    weight_OI = weight_out_in(base).float()
    context = LayerContext(weight_OI, torch.Generator().manual_seed(3), statistics or LayerStatistics())
    return kind, kind.build(kind.tensors(context), weight_OI)


def perturbed(layer: AdapterLayer, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def wide(layer: AdapterLayer) -> dict[str, Tensor]:
    """Copies of a layer's tensors, numbers in fp64, parameters as leaves."""
    trained = dict(layer.named_parameters())
    return {
        name: tensor.detach().double().requires_grad_(name in trained) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in layer.state_dict().items()
    }


def check_fresh(name: str, statistics: LayerStatistics | None = None, **given: Any) -> None:
    """A fresh layer gives its base's bits, with and without a gradient, and its numbers are fp32."""
    for module in ("linear", "conv1d"):
        for dtype in DTYPES:
            base = base_layer(module, dtype)
            kind, layer = made(base, name, statistics, **given)
            x = inputs(dtype)
            with torch.no_grad():
                assert torch.equal(layer(x, base), base(x)), (module, dtype)
            y = layer(x, base)
            assert y.dtype == dtype
            assert torch.equal(y, base(x)), (module, dtype)
            assert y.requires_grad
            assert torch.equal(layer(x[:0], base), base(x[:0]))
            layer(x[:0], base).sum().backward()  # an expert that saw no token
            assert all(parameter.dtype == torch.float32 for parameter in layer.parameters())
            sizes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
            assert kind.sizes(OUT, IN) == sizes


def check_output_and_gradients(base: nn.Module, layer: AdapterLayer, delta: Delta) -> None:
    """Output, and gradients of inputs and parameters, are those of autograd on a dense weight in fp64.

    On a narrow base they are within a few percent of them.
    """
    dtype = weight_out_in(base).dtype
    upstream = torch.randn(2, 5, OUT, generator=torch.Generator().manual_seed(8)).to(dtype)
    x = inputs(dtype).requires_grad_()
    y = layer(x, base)
    names = [name for name, _ in layer.named_parameters()]
    found = torch.autograd.grad((upstream * y).sum(), [x, *layer.parameters()])

    tensors, dense_x = wide(layer), inputs(dtype).double().requires_grad_()
    bias: Any = base.bias
    expected_y = F.linear(dense_x, weight_out_in(base).double() + delta(tensors), bias.double())
    leaves = [dense_x, *(tensors[name] for name in names)]
    expected = torch.autograd.grad((upstream.double() * expected_y).sum(), leaves)
    for name, gradient, dense in zip(["x", *names], found, expected, strict=True):
        assert (gradient - dense).norm() <= 0.03 * dense.norm(), name
    if dtype != torch.float32:
        return
    torch.testing.assert_close(y.double(), expected_y, atol=3e-5, rtol=1e-5)
    for name, gradient, dense in zip(["x", *names], found, expected, strict=True):
        torch.testing.assert_close(gradient.double(), dense, atol=2e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def check_training(base: nn.Module, layer: AdapterLayer, delta: Delta, steps: int = 10) -> None:
    """That many steps of AdamW end where those of a dense implementation in fp64 end; the base keeps its bytes.

    On a narrow base they end within a few percent of it.
    """
    before = weight_out_in(base).clone()
    tensors = wide(layer)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    options: dict[str, Any] = {"lr": 0.02, "eps": 1e-4, "weight_decay": 0.01}
    own, dense = torch.optim.AdamW(layer.parameters(), **options), torch.optim.AdamW(leaves, **options)
    bias = None if (given := getattr(base, "bias", None)) is None else given.double()
    for x, target in batches(steps, *before.shape):
        x = x.to(before.dtype)
        own.zero_grad()
        (layer(x, base).float() - target).square().mean().backward()
        own.step()
        dense.zero_grad()
        weight_OI = weight_out_in(base).double() + delta(tensors)
        (F.linear(x.double(), weight_OI, bias) - target.double()).square().mean().backward()
        dense.step()
    expected = delta(tensors).detach()
    assert expected.norm() > 0.1
    found: Any = layer.delta_weight(before.float())
    assert_close(found, expected, before.dtype)
    assert torch.equal(weight_out_in(base), before)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """After some steps: to fp32's rounding, and on a narrow base to three percent of the whole."""
    if dtype == torch.float32:
        torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-3)
    assert (found - expected).norm() < 0.03 * expected.norm()


def batches(count: int, outputs: int = OUT, inputs: int = IN) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    for _ in range(count):
        yield torch.randn(3, 4, inputs, generator=generator), torch.randn(3, 4, outputs, generator=generator)


def check_saved(base: nn.Module, kind: AdapterKind[Any], layer: AdapterLayer) -> None:
    """A layer that is saved and built again has the same tensors and computes the same bits."""
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    again = kind.build(state, weight_out_in(base).float())
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == {n: t.dtype for n, t in state.items()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again(inputs(), base), layer(inputs(), base))


def check_change(base: nn.Module, layer: AdapterLayer, delta: Delta) -> None:
    """ΔW and, where there are some, the product of the factors are the dense oracle's."""
    expected = delta(wide(layer)).detach()
    found = layer.delta_weight(weight_out_in(base).float())
    assert found is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    factors = layer.lora_factors()
    assert (factors is not None) == layer.has_lora_factors
    if factors is not None:
        product = factors.scale * factors.B_OR.double() @ factors.A_RI.double()
        torch.testing.assert_close(product, expected, atol=1e-5, rtol=1e-5)


def check_narrow(name: str, delta: Delta, statistics: LayerStatistics | None = None, **given: Any) -> None:
    """On a bf16 base the change of the output is right to two percent."""
    base = base_layer(dtype=torch.bfloat16)
    with torch.no_grad():
        base.weight.zero_()  # type: ignore[operator]  # it would swallow the change's last bits
        base.bias.zero_()  # type: ignore[operator]
    _, layer = made(base_layer(dtype=torch.bfloat16), name, statistics, **given)
    perturbed(layer, 0.01)
    x = inputs(torch.bfloat16)
    expected = F.linear(x.double(), delta(wide(layer)).detach())
    assert ((layer(x, base).detach().double() - expected).norm() / expected.norm()) < 0.02


def check_all(name: str, delta: Delta, statistics: LayerStatistics | None = None, **given: Any) -> None:
    """Everything that every kind with a ΔW owes, on both layouts of the base."""
    check_fresh(name, statistics, **given)
    check_narrow(name, delta, statistics, **given)
    for module in ("linear", "conv1d"):
        narrow = base_layer(module, torch.bfloat16)
        _, layer = made(narrow, name, statistics, **given)
        check_training(narrow, layer, delta)
        check_output_and_gradients(narrow, layer, delta)
        base = base_layer(module)
        kind, layer = made(base, name, statistics, **given)
        check_training(base, layer, delta)
        perturbed(layer)
        check_output_and_gradients(base, layer, delta)
        check_change(base, layer, delta)
        check_saved(base, kind, layer)

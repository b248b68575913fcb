"""Anchored layers of any init for the tests, and their change of the weight computed densely."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pe_rlhf.adapters.layer_statistics import InputMoments, LayerStatistics
from pe_rlhf.adapters.lora.anchored import AnchoredLoRA
from pe_rlhf.adapters.specs import AdapterSpec, new_adapters
from pe_rlhf.config import LoRAConfig

IN, OUT, RANK, SCALE = 12, 20, 3, 1.5
ZERO_PRODUCT = {
    "lora",
    "gaussian",
    "rlpo",
    "rlmo",
    "eva",
    "mica",
}  # A0 or B0 is zero by definition: nothing to subtract


def base_layer(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A base module with random weight and bias; `conv1d` stores its weight the other way round."""
    base = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(generator=generator)
    return base.to(dtype).requires_grad_(False)


def dense_base(base: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight as out × in, told by its shape, and bias, in fp32."""
    weight, bias = base.weight, base.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    return (weight if weight.shape == (OUT, IN) else weight.T).float(), bias.float()


def spec_for(init: str, dropout: float = 0.0) -> AdapterSpec:
    return AdapterSpec(LoRAConfig(init=init, rank=RANK, alpha=SCALE * RANK, dropout=dropout), ("layer",))


def adapter_for(base: nn.Module, init: str, dropout: float = 0.0) -> AnchoredLoRA:
    generator = torch.Generator().manual_seed(9)
    gradients = torch.randn(OUT, IN, generator=generator), torch.randn(OUT, IN, generator=generator)
    x_NI = torch.randn(40, IN, generator=generator)
    moments = InputMoments(x_NI.T @ x_NI / len(x_NI), x_NI.mean(0), len(x_NI))
    original_OI = dense_base(base)[0] + 0.1 * gradients[0]
    statistics = {"layer": LayerStatistics(gradients, moments, original_OI)}
    adapter = new_adapters(spec_for(init, dropout), lambda _: dense_base(base)[0], lambda _: 0, statistics)["layer"]
    assert isinstance(adapter, AnchoredLoRA)
    return adapter


def initial(adapter: AnchoredLoRA) -> tuple[Tensor, Tensor]:
    """A0 and B0, copied before anything is trained."""
    return adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone()


def dense_delta(adapter: AnchoredLoRA, A0: Tensor, B0: Tensor, scale: float = SCALE) -> Tensor:
    """s·(B·A − B0·A0) in fp64: the left-hand form, which the adapter does not compute."""
    A, B = adapter.lora_A.detach().double(), adapter.lora_B.detach().double()
    return scale * (B @ A - B0.double() @ A0.double())


def perturbed(adapter: AnchoredLoRA, size: float = 0.3) -> AnchoredLoRA:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)))
    return adapter


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(7)).to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())

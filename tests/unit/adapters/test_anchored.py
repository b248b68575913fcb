"""What an anchored layer computes: its output and gradients, in fp32 and in narrow dtypes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pe_rlhf.adapters.layer_statistics import InputMoments, LayerStatistics
from pe_rlhf.adapters.lora.anchored import AnchoredLoRA, lora_scale
from pe_rlhf.adapters.specs import AdapterSpec, new_adapters
from pe_rlhf.config import LoRAConfig
from tests.tiny import ALL_INITS
from tests.unit.adapters.anchored import (
    IN,
    OUT,
    SCALE,
    adapter_for,
    base_layer,
    dense_base,
    dense_delta,
    initial,
    inputs,
    perturbed,
    relative_error,
)


def test_scale_is_alpha_over_rank_or_over_its_root() -> None:
    assert lora_scale(32, 16, "standard") == 2.0
    assert lora_scale(32, 16, "rslora") == 8.0
    assert lora_scale(1, 3, "rslora") == pytest.approx(1 / math.sqrt(3))


@pytest.mark.parametrize("init", ALL_INITS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_output_and_gradients_equal_the_published_form_computed_densely(kind: str, init: str) -> None:
    base = base_layer(kind)
    adapter = adapter_for(base, init)
    A0, B0 = initial(adapter)
    perturbed(adapter)
    upstream = torch.randn(2, 5, OUT, generator=torch.Generator().manual_seed(8))

    x = inputs().requires_grad_()
    y = adapter(x, base)
    leaves = {**dict(adapter.named_parameters()), "x": x}
    found = torch.autograd.grad((upstream * y).sum(), list(leaves.values()))

    A, B = (parameter.detach().clone().requires_grad_() for parameter in (adapter.lora_A, adapter.lora_B))
    dense_x = inputs().requires_grad_()
    W0, bias = dense_base(base)
    residual = W0 - SCALE * B0 @ A0  # what PiSSA and its kin put in place of the base weight
    expected_y = F.linear(dense_x, residual + SCALE * B @ A, bias)
    dense = {"lora_A": A, "lora_B": B, "x": dense_x}
    expected = torch.autograd.grad((upstream * expected_y).sum(), [dense[name] for name in leaves])

    torch.testing.assert_close(y, expected_y, atol=2e-5, rtol=1e-5)
    for gradient, expected_gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ALL_INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_adapter_changes_not_one_bit(dtype: torch.dtype, init: str) -> None:
    base = base_layer("linear", dtype)
    adapter = adapter_for(base, init)
    x = inputs(dtype)
    y = base(x)
    assert torch.equal(adapter.add_low_rank(x, y.clone()), y)
    assert adapter.lora_A.dtype == adapter.lora_B.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ALL_INITS)
def test_on_a_narrow_base_the_adapters_part_is_right_to_one_percent(init: str, dtype: torch.dtype) -> None:
    base = base_layer("linear", dtype)
    adapter = adapter_for(base, init)
    A0, B0 = initial(adapter)
    perturbed(adapter, 1e-3)  # far less than A0 and B0: what is left of a difference of large products would be noise
    x = inputs(dtype)
    found = adapter.add_low_rank(x, torch.zeros(2, 5, OUT, dtype=dtype))  # nothing of the base that could swallow it
    assert found.dtype == dtype
    assert relative_error(found, F.linear(x.double(), dense_delta(adapter, A0, B0))) < 0.01


@pytest.mark.parametrize("init", ALL_INITS)
def test_gradients_on_a_bf16_base_are_right_to_one_percent_and_no_wide_copy_of_the_input_is_kept(init: str) -> None:
    base = base_layer("linear", torch.bfloat16)
    adapter = adapter_for(base, init)
    A0, B0 = initial(adapter)
    perturbed(adapter)
    x, upstream = inputs(torch.bfloat16).requires_grad_(), torch.randn(2, 5, OUT).to(torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        y = adapter(x, base)
    assert all(
        tensor.dtype == torch.bfloat16 for tensor in kept if tensor.shape[-1] == IN and tensor.numel() == x.numel()
    )
    leaves = {**dict(adapter.named_parameters()), "x": x}
    found = torch.autograd.grad(y, list(leaves.values()), upstream)

    A, B = (parameter.detach().clone().requires_grad_() for parameter in (adapter.lora_A, adapter.lora_B))
    wide_x, W0 = x.detach().float().requires_grad_(), dense_base(base)[0]
    expected_y = F.linear(wide_x, W0 + SCALE * (B @ A - B0 @ A0))
    dense = {"lora_A": A, "lora_B": B, "x": wide_x}
    expected = torch.autograd.grad(expected_y, [dense[name] for name in leaves], upstream.float())
    assert [gradient.dtype for gradient in found] == [torch.float32] * (len(leaves) - 1) + [torch.bfloat16]
    for gradient, expected_gradient in zip(found, expected, strict=True):
        assert relative_error(gradient, expected_gradient) < 0.01


@pytest.mark.parametrize("init", ALL_INITS)
def test_after_one_step_of_adam_a_bf16_server_has_the_update_to_one_percent(init: str) -> None:
    """As vLLM computes a LoRA: factors in bf16, x·A summed in fp32 and rounded to bf16, then times B."""
    wide, narrow, rank = 320, 192, 8
    generator = torch.Generator().manual_seed(3)
    decay = torch.linspace(0, 5, narrow).neg().exp()  # a spectrum that falls, so that PiSSA's product is most of W0
    left, right = (torch.linalg.qr(torch.randn(n, narrow, generator=generator))[0] for n in (wide, narrow))
    W0 = left * decay @ right.T
    moments = InputMoments(torch.eye(narrow), torch.zeros(narrow), 100)
    gradients = torch.randn(wide, narrow, generator=generator), torch.randn(wide, narrow, generator=generator)
    spec = AdapterSpec(LoRAConfig(init=init, rank=rank, alpha=2.0 * rank), ("layer",))
    statistics = {"layer": LayerStatistics(gradients, moments, W0 + gradients[0])}
    adapter = new_adapters(spec, lambda _: W0, lambda _: 0, statistics)["layer"]
    assert isinstance(adapter, AnchoredLoRA)
    A0, B0 = initial(adapter)
    with torch.no_grad():  # Adam's first step is the learning rate times the sign
        for parameter in adapter.parameters():
            parameter.add_(1e-4 * torch.randn(parameter.shape, generator=generator).sign())
    x = torch.randn(64, narrow, generator=generator).bfloat16()
    expected = F.linear(x.double(), dense_delta(adapter, A0, B0, scale=2.0))

    factors = adapter.lora_factors()
    assert factors is not None
    low = (x.float() @ factors.A_RI.bfloat16().float().T).bfloat16().float()
    served = factors.scale * (low @ factors.B_OR.bfloat16().float().T)
    assert relative_error(served, expected) < 0.01
    own = adapter.add_low_rank(x, torch.zeros(64, wide, dtype=torch.bfloat16))
    assert relative_error(own, expected) < 0.01


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_a_pass_after_a_step_of_the_optimizer_has_the_new_adapter(init: str, fused: bool) -> None:
    """A fused AdamW changes parameters without counting up their versions: nothing may be kept between passes."""
    base = base_layer("linear", torch.bfloat16)
    adapter = adapter_for(base, init)
    A0, B0 = initial(adapter)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, fused=fused)
    x = inputs(torch.bfloat16)
    for _ in range(3):
        y = adapter.add_low_rank(x, torch.zeros(2, 5, OUT, dtype=torch.bfloat16))
        (y.float() - 1).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            found = adapter.add_low_rank(x, torch.zeros(2, 5, OUT, dtype=torch.bfloat16))
        assert relative_error(found, F.linear(x.double(), dense_delta(adapter, A0, B0))) < 0.01


def test_where_the_input_needs_no_gradient_the_adapter_still_gets_its_own() -> None:
    """The first block of a model whose embeddings are frozen."""
    base = base_layer("linear")
    adapter = perturbed(adapter_for(base, "lora"))
    x, upstream = inputs(), torch.randn(2, 5, OUT)
    adapter(x, base).backward(upstream)
    low_NR = x.flatten(0, 1) @ adapter.lora_A.detach().T
    assert adapter.lora_B.grad is not None
    torch.testing.assert_close(adapter.lora_B.grad, SCALE * upstream.flatten(0, 1).T @ low_NR, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ALL_INITS)
def test_dropout_gives_both_terms_the_same_input_and_rests_in_eval_mode(init: str) -> None:
    base = base_layer("linear")
    adapter = adapter_for(base, init, dropout=0.4)
    A0, B0 = initial(adapter)
    x = inputs()
    y = base(x)
    adapter.train()
    assert torch.equal(
        adapter.add_low_rank(x, y.clone()), y
    )  # still the identity: the dropped-out input is one and the same

    perturbed(adapter)
    torch.manual_seed(1)
    found = adapter.add_low_rank(x, y.clone())
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.4, training=True)
    delta = SCALE * (adapter.lora_B @ adapter.lora_A - B0 @ A0)
    torch.testing.assert_close(found, y + F.linear(dropped, delta), atol=2e-5, rtol=1e-5)

    adapter.eval()
    torch.testing.assert_close(adapter.add_low_rank(x, y.clone()), y + F.linear(x, delta), atol=2e-5, rtol=1e-5)

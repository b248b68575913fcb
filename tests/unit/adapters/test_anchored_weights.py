"""What an anchored layer is outside a pass: its tensors, its factors, and its weight merged into the base's."""

import copy

import pytest
import torch
from torch import Tensor

from pe_rlhf.adapters.layer import RoleState, WrappedLayer, count_trainable, merged_weight, weight_out_in
from pe_rlhf.adapters.lora.anchored import AnchoredLoRA
from pe_rlhf.adapters.specs import saved_adapter
from tests.pairwise import every_pair
from tests.tiny import ALL_INITS
from tests.unit.adapters.anchored import (
    IN,
    OUT,
    RANK,
    SCALE,
    ZERO_PRODUCT,
    adapter_for,
    base_layer,
    dense_base,
    initial,
    inputs,
    perturbed,
    spec_for,
)


@pytest.mark.parametrize("init", ALL_INITS)
def test_factors_and_delta_weight_equal_the_dense_difference(init: str) -> None:
    base = base_layer("linear")
    adapter = adapter_for(base, init)
    A0, B0 = initial(adapter)
    W0 = dense_base(base)[0]
    start_OI = adapter.delta_weight(W0)
    assert start_OI is not None
    assert not start_OI.any()
    perturbed(adapter)
    expected = SCALE * (
        adapter.lora_B.detach().double() @ adapter.lora_A.detach().double() - (B0.double() @ A0.double())
    )
    factors = adapter.lora_factors()
    assert factors is not None
    assert factors.A_RI.shape[0] == (RANK if init in ZERO_PRODUCT else 2 * RANK)
    product = factors.scale * factors.B_OR.double() @ factors.A_RI.double()
    torch.testing.assert_close(product, expected, atol=1e-6, rtol=1e-6)
    moved_OI = adapter.delta_weight(W0)
    assert moved_OI is not None
    torch.testing.assert_close(moved_OI.double(), expected, atol=1e-5, rtol=1e-5)


def test_factors_are_copies() -> None:
    adapter = perturbed(adapter_for(base_layer("linear"), "lora"))
    before = adapter.lora_B.detach().clone()
    factors = adapter.lora_factors()
    assert factors is not None
    factors.B_OR.zero_()
    assert torch.equal(adapter.lora_B, before)


@pytest.mark.parametrize("init", ALL_INITS)
def test_only_a_and_b_are_trained(init: str) -> None:
    adapter = adapter_for(base_layer("linear"), init)
    sizes = {"lora_A": RANK * IN, "lora_B": RANK * OUT}
    if init == "mica":
        del sizes["lora_B"]
    assert {name: parameter.numel() for name, parameter in adapter.named_parameters()} == sizes
    assert count_trainable(adapter) == sum(sizes.values())
    initials = {"initial_A_RI", "initial_B_OR"}
    assert set(adapter.state_dict()) == {"lora_A", "lora_B"} | (set() if init in ZERO_PRODUCT else initials)


@pytest.mark.parametrize("init", ALL_INITS)
def test_a_saved_adapter_comes_back_exactly(init: str) -> None:
    base = base_layer("linear")
    spec = spec_for(init)
    adapter = perturbed(adapter_for(base, init))
    state = copy.deepcopy(adapter.state_dict())
    loaded = saved_adapter(spec, dense_base(base)[0], state)
    assert isinstance(loaded, AnchoredLoRA)
    assert loaded.state_dict().keys() == state.keys()
    assert dict(loaded.named_parameters()).keys() == dict(adapter.named_parameters()).keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    x = inputs()
    assert torch.equal(loaded(x, base), adapter(x, base))


def test_a_state_that_does_not_fit_or_lacks_a_factor_is_refused() -> None:
    spec = spec_for("lora")
    weight_OI = torch.zeros(OUT, IN)
    state = adapter_for(base_layer("linear"), "lora").state_dict()
    with pytest.raises(ValueError, match="lora_A"):
        saved_adapter(spec, weight_OI.T, state)
    del state["lora_B"]
    with pytest.raises(KeyError):
        saved_adapter(spec, weight_OI, state)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_wrapper_adds_the_active_role_alone(kind: str) -> None:
    base, state = base_layer(kind), RoleState()
    layer = WrappedLayer(base, state)
    layer.adapters["policy"] = perturbed(adapter_for(base, "pissa"))
    x = inputs()
    y = base(x)
    assert torch.equal(layer(x), y)
    state.active = "value"  # a role without an adapter on this layer
    assert torch.equal(layer(x), y)
    state.active = "policy"
    assert not torch.allclose(layer(x), y, atol=0.1)


@every_pair(dtype=(torch.float32, torch.bfloat16), kind=("linear", "conv1d"), init=ALL_INITS)
def test_a_merged_weight_is_a_fresh_one_in_the_layout_of_the_base(dtype: torch.dtype, kind: str, init: str) -> None:
    base = base_layer(kind, dtype)
    weight = base.weight
    assert isinstance(weight, Tensor)
    layer = WrappedLayer(base, RoleState())
    adapter = adapter_for(base, init)
    A0, B0 = initial(adapter)
    layer.adapters["policy"] = perturbed(adapter)
    before = weight.clone()
    merged = merged_weight(layer, "policy")
    expected_OI = dense_base(base)[0] + SCALE * (adapter.lora_B @ adapter.lora_A - B0 @ A0)
    expected = expected_OI.T if kind == "conv1d" else expected_OI
    assert merged.dtype == dtype
    assert merged.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(merged.float(), expected.detach(), atol=1e-5, rtol=tolerance)
    merged.add_(1)
    assert torch.equal(weight, before)


def test_merging_a_role_without_an_adapter_here_gives_a_copy_of_the_base() -> None:
    base = base_layer("linear")
    weight = base.weight
    assert isinstance(weight, Tensor)
    before = weight.clone()
    merged = merged_weight(WrappedLayer(base, RoleState()), "policy")
    assert torch.equal(merged, before)
    merged.add_(1)
    assert torch.equal(weight, before)


def test_weight_out_in_reads_either_layout() -> None:
    x = inputs()
    for kind in ("linear", "conv1d"):
        base = base_layer(kind)
        assert isinstance(base.bias, Tensor)
        torch.testing.assert_close(x @ weight_out_in(base).T + base.bias, base(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_merged_weight_is_rounded_once_and_has_the_bases_dtype(kind: str) -> None:
    """The sum is taken in fp32. Rounded to bf16 first, the change would be off by its own rounding, too."""
    base = base_layer(kind).to(torch.bfloat16)
    layer = WrappedLayer(base, RoleState())
    adapter = adapter_for(base, "pissa")
    A0, B0 = initial(adapter)
    layer.adapters["policy"] = perturbed(adapter)
    weight_OI, _ = dense_base(base)
    change_OI = adapter.scale * (adapter.lora_B @ adapter.lora_A - B0 @ A0)
    once_OI = (weight_OI + change_OI.detach()).to(torch.bfloat16)
    assert not torch.equal(once_OI, weight_OI.to(torch.bfloat16) + change_OI.detach().to(torch.bfloat16))
    merged = merged_weight(layer, "policy")
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged if merged.shape == (OUT, IN) else merged.T, once_OI)

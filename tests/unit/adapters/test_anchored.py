import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pe_rlhf.adapters.layer import RoleState, WrappedLayer, count_trainable, merged_weight, weight_out_in
from pe_rlhf.adapters.layer_statistics import InputMoments, LayerStatistics
from pe_rlhf.adapters.lora.anchored import AnchoredLoRA, lora_scale
from pe_rlhf.adapters.specs import AdapterSpec, new_adapters, saved_adapter
from pe_rlhf.config import LoRAConfig
from tests.pairwise import every_pair
from tests.tiny import ALL_INITS

IN, OUT, RANK, SCALE = 12, 20, 3, 1.5
ZERO_B = {"lora", "gaussian", "rlpo", "rlmo", "eva"}  # inits whose B0 is zero by definition: nothing to subtract


def base_layer(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A base module with random weight and bias; `conv1d` stores its weight the other way round."""
    base = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(generator=generator)
    return base.to(dtype).requires_grad_(False)


def dense_base(base: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight as out × in, told by its shape alone, and bias, in fp32."""
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
    statistics = {"layer": LayerStatistics(gradients, moments)}
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
    found = torch.autograd.grad((upstream * y).sum(), [adapter.lora_A, adapter.lora_B, x])

    A, B = (parameter.detach().clone().requires_grad_() for parameter in (adapter.lora_A, adapter.lora_B))
    dense_x = inputs().requires_grad_()
    W0, bias = dense_base(base)
    residual = W0 - SCALE * B0 @ A0  # what PiSSA and its kin put in place of the base weight
    expected_y = F.linear(dense_x, residual + SCALE * B @ A, bias)
    expected = torch.autograd.grad((upstream * expected_y).sum(), [A, B, dense_x])

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


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


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
    found = torch.autograd.grad(y, [adapter.lora_A, adapter.lora_B, x], upstream)

    A, B = (parameter.detach().clone().requires_grad_() for parameter in (adapter.lora_A, adapter.lora_B))
    wide_x, W0 = x.detach().float().requires_grad_(), dense_base(base)[0]
    expected_y = F.linear(wide_x, W0 + SCALE * (B @ A - B0 @ A0))
    expected = torch.autograd.grad(expected_y, [A, B, wide_x], upstream.float())
    assert [gradient.dtype for gradient in found] == [torch.float32, torch.float32, torch.bfloat16]
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
    statistics = {"layer": LayerStatistics(gradients, moments)}
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
    assert factors.A_RI.shape[0] == (RANK if init in ZERO_B else 2 * RANK)
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
    assert {name for name, p in adapter.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert count_trainable(adapter) == RANK * (IN + OUT)
    initials = {"initial_A_RI", "initial_B_OR"}
    assert set(adapter.state_dict()) == {"lora_A", "lora_B"} | (set() if init in ZERO_B else initials)


@pytest.mark.parametrize("init", ALL_INITS)
def test_a_saved_adapter_comes_back_exactly(init: str) -> None:
    base = base_layer("linear")
    spec = spec_for(init)
    adapter = perturbed(adapter_for(base, init))
    state = copy.deepcopy(adapter.state_dict())
    loaded = saved_adapter(spec, dense_base(base)[0], state)
    assert isinstance(loaded, AnchoredLoRA)
    assert loaded.state_dict().keys() == state.keys()
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

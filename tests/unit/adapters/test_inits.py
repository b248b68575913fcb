import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from pe_rlhf.adapters.lora.anchored import lora_scale
from pe_rlhf.adapters.lora.init_registry import INITS, InitContext, get_init, register_init
from pe_rlhf.model.backbone import load_backbone
from reward.errors import InputError
from tests.failures import raises
from tests.tiny import tiny_model

SHAPES = [(24, 24), (40, 16), (16, 40)]  # out × in: square, tall, wide


def weight(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def run(init: str, weight_OI: Tensor, rank: int, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    return get_init(init)(InitContext(weight_OI, rank, scale, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rank", "scale"), [(1, 2.0), (4, 0.5), (16, 1.0)])
@pytest.mark.parametrize("init", ["pissa", "milora"])
def test_spectral_inits_hold_a_part_of_the_dense_svd(
    init: str, shape: tuple[int, int], rank: int, scale: float
) -> None:
    weight_OI = weight(shape)
    A_RI, B_OR = run(init, weight_OI, rank, scale)
    U, S, Vh = np.linalg.svd(weight_OI.double().numpy(), full_matrices=False)
    part = slice(0, rank) if init == "pissa" else slice(len(S) - rank, len(S))
    assert A_RI.shape == (rank, shape[1])
    assert B_OR.shape == (shape[0], rank)
    np.testing.assert_allclose((scale * B_OR @ A_RI).numpy(), (U[:, part] * S[part]) @ Vh[part], atol=1e-5)
    # Both factors carry the same share: A·Aᵀ = Bᵀ·B = S/s.
    np.testing.assert_allclose((A_RI @ A_RI.T).numpy(), np.diag(S[part]) / scale, atol=1e-4)
    np.testing.assert_allclose((B_OR.T @ B_OR).numpy(), np.diag(S[part]) / scale, atol=1e-4)


def test_pissa_and_milora_of_complementary_ranks_add_up_to_the_weight() -> None:
    weight_OI = weight((24, 24))
    (A, B), (minor_A, minor_B) = run("pissa", weight_OI, 10), run("milora", weight_OI, 14)
    torch.testing.assert_close(B @ A + minor_B @ minor_A, weight_OI, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_equals_that_of_peft(shape: tuple[int, int], rslora: bool) -> None:
    weight_OI = weight(shape)
    linear = nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data.copy_(weight_OI)
    config = LoraConfig(r=4, lora_alpha=12, init_lora_weights="pissa", target_modules=["0"], use_rslora=rslora)
    peft_model = get_peft_model(nn.Sequential(linear), config)  # type: ignore[arg-type]
    expected_OI = peft_model.get_submodule("base_model.model.0").get_delta_weight("default")  # type: ignore[operator]
    scale = lora_scale(12, 4, "rslora" if rslora else "standard")
    A_RI, B_OR = run("pissa", weight_OI, 4, scale)
    torch.testing.assert_close(scale * B_OR @ A_RI, expected_OI, atol=1e-5, rtol=1e-5)


def spread_out(model: PreTrainedModel, targets: list[str]) -> PreTrainedModel:
    """The model with singular values that lie apart. PEFT's SVD is in fp32: between values that are nearly equal its
    cut is off by more than rounding, and on some CPUs by more than on others."""
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in targets and parameter.dim() == 2:
            U, S, Vh = torch.linalg.svd(parameter.detach().double(), full_matrices=False)
            parameter.data.copy_((U * (S * 0.8 ** torch.arange(len(S)))) @ Vh)
    return model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_pissa_equals_that_of_peft_on_every_layer_of_a_model(family: str) -> None:
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "gpt_neo": ["v_proj", "c_fc"]}[family]
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules=targets)
    peft_model = get_peft_model(spread_out(tiny_model(family), targets), config)  # type: ignore[arg-type]
    backbone = load_backbone(spread_out(tiny_model(family), targets))
    backbone.add_adapter("policy", init="pissa", rank=3, alpha=6, targets=targets)
    state = backbone.role_state("policy")
    names = backbone.adapter_spec("policy").modules
    assert len(names) == {"llama": 4, "gpt2": 6, "gpt_neo": 4}[family]
    for name in names:
        layer = peft_model.get_submodule(f"base_model.model.{name}")
        delta = layer.get_delta_weight("default").detach()  # type: ignore[operator]
        expected_OI = delta.T if family == "gpt2" else delta
        found_OI = 2.0 * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
        torch.testing.assert_close(found_OI, expected_OI, atol=1e-5, rtol=1e-5)


def test_lora_draws_a_uniformly_within_its_bounds_and_b_is_zero() -> None:
    A_RI, B_OR = run("lora", torch.zeros(8, 100), rank=50)
    bound = 1 / math.sqrt(100)  # sqrt(6 / ((1 + a²)·in)) with a = sqrt(5)
    assert A_RI.abs().max() <= bound
    # 5000 draws: the extremes come close to the bounds, the variance is bound²/3.
    assert A_RI.max() > 0.99 * bound
    assert A_RI.min() < -0.99 * bound
    assert float(A_RI.var()) == pytest.approx(bound**2 / 3, rel=0.05)
    assert B_OR.shape == (8, 50)
    assert not B_OR.any()


def test_lora_has_the_bounds_of_peft() -> None:
    config = LoraConfig(r=50, target_modules=["0"])
    peft_model = get_peft_model(nn.Sequential(nn.Linear(100, 8)), config)  # type: ignore[arg-type]
    peft_A = dict(peft_model.named_parameters())["base_model.model.0.lora_A.default.weight"].detach()
    A_RI, _ = run("lora", torch.zeros(8, 100), rank=50)
    assert float(A_RI.abs().max()) == pytest.approx(float(peft_A.abs().max()), rel=0.01)


def test_lora_follows_the_seed() -> None:
    first, again, other = (run("lora", torch.zeros(8, 8), 4, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_role_and_layer_draws_its_own_numbers() -> None:
    backbones = [load_backbone(tiny_model("llama")) for _ in range(3)]
    for backbone, seed in zip(backbones, (0, 0, 1), strict=True):
        backbone.add_adapter("policy", rank=4, seed=seed)
        backbone.add_adapter("value", rank=4, seed=seed)
    states = [
        {**{f"policy.{k}": v for k, v in b.role_state("policy").items()}, **b.role_state("value")} for b in backbones
    ]
    drawn = [{name: t for name, t in state.items() if name.endswith("lora_A")} for state in states]
    assert all(torch.equal(t, drawn[1][name]) for name, t in drawn[0].items())
    assert not any(torch.equal(t, drawn[2][name]) for name, t in drawn[0].items())
    fingerprints = {tuple(t.flatten().tolist()[:8]) for t in drawn[0].values()}
    assert len(fingerprints) == len(drawn[0]) == 2 * 14


@pytest.mark.parametrize("init", ["pissa", "milora", "rlpo", "rlmo", "olora", "orthogonal", "mica", "geora"])
def test_a_rank_above_the_number_of_singular_values_is_refused(init: str) -> None:
    with pytest.raises(InputError) as caught:
        run(init, weight((16, 40)), rank=17)
    assert (caught.value.kind, caught.value.key) == ("conflict", "adapter.rank")


def test_an_unknown_init_is_refused_with_the_nearest_one() -> None:
    with raises("unknown", key="adapter.init", fix="did you mean 'pissa'?"):
        get_init("pisa")


def test_a_name_can_be_registered_once() -> None:
    before = dict(INITS)
    with pytest.raises(ValueError, match="pissa"):
        register_init("pissa", INITS["lora"].function)
    assert before == INITS

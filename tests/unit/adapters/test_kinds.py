"""Every kind of adapter: what holds for all of them, and what each computes against a dense weight and against PEFT."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pe_rlhf.adapters.kind import KINDS, AdapterKind, LayerContext, find_kind, register_kind
from pe_rlhf.adapters.layer import AdapterLayer
from pe_rlhf.config import OptimizerConfig
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer
from pe_rlhf.runs.saved_roles import load_role, save_role
from tests.failures import raises
from tests.tiny import (
    IDS_BT,
    perturb,
    role_logits,
    statistics_for,
    tiny_model,
)

# Settings that fit the tiny models, whose sides are multiples of 4.
SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "adalora": {"rank": 4, "target_rank": 2, "every": 1, "warmup_share": 0.2, "final_share": 0.3},
    "bat": {"rank": 4},
    "dora": {"rank": 4},
    "loha": {"rank": 3},
    "miss": {"rank": 5},
    "tinylora": {"rank": 4, "size": 9, "vectors": 3},
    "vera": {"rank": 16},
}
# What PEFT loads a role as.
PEFT_TYPES = {"bat": "MISS", "loha": "LOHA", "miss": "MISS", "tinylora": "TINYLORA", "vera": "VERA"}
FAMILIES = ("llama", "gpt2")
STEPS = 10


def backbone_with(kind: str, model: PreTrainedModel, role: str = "policy", **settings: Any) -> Backbone:
    backbone = load_backbone(model)
    add(backbone, role, kind, **settings)
    return backbone


def add(backbone: Backbone, role: str, kind: str, **settings: Any) -> None:
    statistics = statistics_for(backbone)
    backbone.add_adapter(role, kind=kind, statistics=statistics, **SMALL.get(kind, {}) | settings)


def loss_of(logits_BTV: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), IDS_BT[:, 1:].flatten())


def optimizer_of(backbone: Backbone, rate: float = 5e-3, **settings: Any) -> RoleOptimizer:
    config = OptimizerConfig(max_grad_norm=1e9, **settings)
    return RoleOptimizer([RoleGroup.of(backbone, "policy", rate)], config, STEPS)


def train(backbone: Backbone, optimizer: RoleOptimizer, steps: int) -> None:
    for _ in range(steps):
        with backbone.role("policy"):
            optimizer.backward(loss_of(backbone(IDS_BT).logits))
        optimizer.step()


def trained(kind: str, family: str, **settings: Any) -> Backbone:
    backbone = backbone_with(kind, tiny_model(family), **settings)
    train(backbone, optimizer_of(backbone), STEPS)
    return backbone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_new_adapter_changes_not_one_bit(kind: str, family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    with torch.no_grad():
        original = model(input_ids=IDS_BT).logits
    backbone = backbone_with(kind, model)
    assert torch.equal(role_logits(backbone, "policy"), original)
    assert torch.equal(role_logits(backbone, "anchor"), original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_training_moves_the_role_and_leaves_the_base(kind: str, family: str, dtype: torch.dtype) -> None:
    backbone = backbone_with(kind, tiny_model(family, dtype))
    before, anchor = digest(backbone), role_logits(backbone, "anchor")
    train(backbone, optimizer_of(backbone), STEPS)
    assert digest(backbone) == before
    assert torch.equal(role_logits(backbone, "anchor"), anchor)
    assert loss_of(role_logits(backbone, "policy")) < loss_of(anchor) - 1e-3


def digest(backbone: Backbone) -> str:
    tensors = {n: t for n, t in backbone.model.state_dict().items() if ".adapters." not in n}
    return hashlib.sha256(
        b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors.values())
    ).hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_merged_model_computes_the_role(kind: str, family: str) -> None:
    backbone = trained(kind, family)
    plain = tiny_model(family)
    plain.load_state_dict(dict(backbone.merged_tensors("policy")), strict=False)
    with torch.no_grad():
        found = plain(input_ids=IDS_BT).logits
    torch.testing.assert_close(found, role_logits(backbone, "policy"), atol=2e-5, rtol=1e-5)
    with torch.no_grad(), backbone.merged_role("policy"):
        torch.testing.assert_close(backbone(IDS_BT).logits, found, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_plain_lora_factors_are_the_change_of_the_weight(kind: str, family: str) -> None:
    backbone = trained(kind, family)
    if not backbone.is_lora("policy"):
        return
    for name, layer in backbone.role_layers("policy").items():
        factors = layer.lora_factors()
        change_OI = layer.delta_weight(backbone.base_weight(name).float())
        assert factors is not None
        assert change_OI is not None
        torch.testing.assert_close(factors.scale * factors.B_OR @ factors.A_RI, change_OI, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_a_stage_leaves_loads_here_and_in_peft(kind: str, family: str, tmp_path: Path) -> None:
    backbone = trained(kind, family)
    save_role(backbone, "policy", tmp_path / "policy")
    again = load_backbone(tiny_model(family))
    load_role(again, "policy", tmp_path / "policy")
    assert torch.equal(role_logits(again, "policy"), role_logits(backbone, "policy"))
    if isinstance(backbone.peft_form("policy"), str):
        assert not (tmp_path / "policy" / "adapter_config.json").exists()
        assert not backbone.is_lora("policy")
        return
    loaded = PeftModel.from_pretrained(tiny_model(family), str(tmp_path / "policy"))
    with torch.no_grad():
        found = loaded(input_ids=IDS_BT).logits
    torch.testing.assert_close(found, role_logits(backbone, "policy"), atol=2e-5, rtol=1e-5)
    config: Any = loaded.peft_config["default"]
    if family == "llama":  # of PEFT's MiSS, LoHa and TinyLoRA, none takes Conv1D: they leave as LoRA there, or not
        assert config.peft_type.value == PEFT_TYPES.get(kind, "LORA")
    if config.peft_type.value == "LORA":
        assert config.use_dora == (kind == "dora")
        layers = backbone.role_layers("policy").items() if kind == "adalora" else []
        assert config.rank_pattern == {name: max(1, int(layer.get_buffer("alive").sum())) for name, layer in layers}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_exports_from_a_bf16_base_are_the_role_but_for_rounding(kind: str, family: str, tmp_path: Path) -> None:
    """PEFT's files on that base and, in fp32, the merged model; measured by what the adapter does to the logits."""
    backbone = backbone_with(kind, tiny_model(family, torch.bfloat16))
    perturb(backbone, "policy", 3.0 if kind == "vera" else 0.3)
    expected, anchor = (role_logits(backbone, role).float() for role in ("policy", "anchor"))
    merged: Any = tiny_model(family, torch.bfloat16).float()
    merged.load_state_dict(dict(backbone.merged_tensors("policy", torch.float32)), strict=False)
    models = [merged]
    save_role(backbone, "policy", tmp_path / "policy")
    if not isinstance(backbone.peft_form("policy"), str):
        models.append(PeftModel.from_pretrained(tiny_model(family, torch.bfloat16), str(tmp_path / "policy")))
    for model in models:
        with torch.no_grad():
            found = model(input_ids=IDS_BT).logits.float()
        assert (found - expected).norm() < 0.1 * (expected - anchor).norm()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_run_that_goes_on_comes_to_the_same(kind: str) -> None:
    """Cut after the fourth of ten steps, amid AdaLoRA's falling budget."""
    whole = trained(kind, "llama")
    first = backbone_with(kind, tiny_model("llama"))
    optimizer = optimizer_of(first)
    train(first, optimizer, 4)
    second = backbone_with(kind, tiny_model("llama"))
    second.set_role_state("policy", first.role_state("policy"))
    later = optimizer_of(second)
    later.load_state(optimizer.state())
    train(second, later, STEPS - 4)
    for name, tensor in whole.role_state("policy").items():
        assert torch.equal(tensor, second.role_state("policy")[name]), name


# ---- against a dense weight ------------------------------------------------------------------------------------------

Tensors = dict[str, Tensor]


def lora(t: Tensors, W: Tensor, scale: float = 8.0) -> Tensor:
    return W + scale * (t["lora_B"] @ t["lora_A"])


def dora(t: Tensors, W: Tensor) -> Tensor:
    moved = lora(t, W)
    return t["magnitude"][:, None] * moved / moved.norm(dim=1, keepdim=True).detach()


def adalora(t: Tensors, W: Tensor) -> Tensor:
    return W + 8.0 * (t["lora_B"] @ torch.diag(t["lora_E"][:, 0]) @ t["lora_A"])


def loha(t: Tensors, W: Tensor) -> Tensor:
    return W + 8 / 3 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def miss(t: Tensors, W: Tensor) -> Tensor:
    D = t["miss_block"]
    return W + torch.stack([D[i % len(D)] for i in range(W.shape[1])], dim=1)


def bat(t: Tensors, W: Tensor) -> Tensor:
    rows = []
    for k, D in enumerate(t["miss_block"]):
        blocks = W[4 * k : 4 * k + 4].split(4, dim=1)
        rows.append(torch.cat([block + block @ D + D for block in blocks], dim=1))
    return torch.cat(rows)


def vera(t: Tensors, W: Tensor) -> Tensor:
    out_features, in_features = W.shape
    A = (2 * torch.rand(in_features, 16, generator=torch.Generator().manual_seed(0)) - 1).T / in_features**0.5
    B = (2 * torch.rand(out_features, 16, generator=torch.Generator().manual_seed(1)) - 1) / 4
    return W + t["vera_lambda_b"][:, None] * (B.to(W.dtype) @ (t["vera_lambda_d"][:, None] * A))


def additive(t: Tensors, W: Tensor) -> Tensor:
    A, B = t["additive_A"], t["additive_B"]
    columns = torch.stack([A[:, i % len(B)] for i in range(W.shape[1])], dim=1)
    return W + columns + torch.stack([B[o % len(B)] for o in range(len(W))])


def redrawn(t: Tensors, W: Tensor) -> Tensor:
    return W + t["change_OI"] + t["learned"] @ t["drawn"]


def lora_dash(t: Tensors, W: Tensor) -> Tensor:
    return W + 8.0 * t["lora_B"] @ t["lora_A"] + t["dash_U_OS"] @ t["delta_sigma"].diag() @ t["dash_Vh_SI"]


def shira(t: Tensors, W: Tensor) -> Tensor:
    rows = torch.arange(len(W)).repeat_interleave(t["row_starts"].diff())
    return W + torch.zeros_like(W).index_put((rows, t["columns"]), t["values"])


def rosa(t: Tensors, W: Tensor) -> Tensor:
    return shira(t, W) + 8.0 * t["lora_B"] @ t["lora_A"]


def spectral_a(t: Tensors, W: Tensor) -> Tensor:
    U, S, Vh = t["U_OR"], t["S_R"].diag(), t["Vh_RI"]
    return W - U @ S @ Vh + (U + t["move_U"]) @ S @ (Vh + t["move_V"])


def spectral_r(t: Tensors, W: Tensor) -> Tensor:
    U, S, Vh = t["U_OR"], t["S_R"].diag(), t["Vh_RI"]
    eye, below = torch.eye(len(S), dtype=W.dtype), tuple(torch.tril_indices(len(S), len(S), -1))
    lowers = (torch.zeros_like(S).index_put(below, t[name]) for name in ("skew_U", "skew_V"))
    turn_U, turn_V = ((eye - K) @ torch.linalg.inv(eye + K) for K in (lower - lower.T for lower in lowers))
    return W - U @ S @ Vh + U @ turn_U @ S @ turn_V.T @ Vh


def tinylora(t: Tensors, W: Tensor) -> Tensor:
    root = t["S_R"].sqrt().diag()
    mixed = torch.einsum("k,krs->rs", t["tinylora_v"], t["projections_KRR"])
    return W + t["U_OR"] @ root @ mixed @ root @ t["Vh_RI"]


LOW_RANK = (lora, dora, adalora, loha, vera, tinylora, lora_dash, rosa, redrawn, spectral_a, spectral_r)
OTHERS = (additive, bat, miss, shira)
ORACLES: dict[str, Callable[[Tensors, Tensor], Tensor]] = {f.__name__: f for f in (*LOW_RANK, *OTHERS)}
OF_RANK_4: dict[str, dict[str, Any]] = {
    **SMALL,
    **{kind: {"rank": 4} for kind in ("additive", "lora_dash", "redrawn", "rosa", "spectral_a", "spectral_r")},
    "shira": {"density": 0.05},
    "tinylora": {"rank": 4, "size": 9},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", sorted(ORACLES))
def test_ten_steps_equal_those_of_a_dense_weight_under_autograd(kind: str, family: str) -> None:
    """What changes over time does not within them: `test_kinds_over_time.py` has that."""
    settings = {"adalora": {"orthogonality": 0.0, "target_rank": 4}, "tinylora": {"vectors": None}}.get(kind, {})
    backbone = backbone_with(kind, tiny_model(family), **OF_RANK_4.get(kind, {}) | settings)
    kept = {n: t for n, t in backbone.role_state("policy").items() if n not in backbone.role_parameters("policy")}
    with torch.no_grad():  # where the gradient of no tensor is zero
        for parameter in backbone.role_parameters("policy").values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    plain = tiny_model(family).requires_grad_(False)
    own = {n: p.detach().clone().requires_grad_() for n, p in backbone.role_parameters("policy").items()}
    adamw = torch.optim.AdamW(own.values(), lr=1e-3, eps=1e-5, weight_decay=0.0)
    # Small steps: rounding, which the two have of their own, must not grow with them.
    optimizer = optimizer_of(backbone, rate=1e-3)
    for _ in range(STEPS):
        weights = {}
        for name in backbone.adapter_spec("policy").modules:
            module = plain.get_submodule(name)
            turned = isinstance(module, Conv1D)
            assert isinstance(module.weight, Tensor)
            W = module.weight.T if turned else module.weight
            tensors = {k.rpartition(".")[2]: t for k, t in (kept | own).items() if k.startswith(f"{name}.")}
            dense = ORACLES[kind](tensors, W)
            weights[f"{name}.weight"] = dense.T if turned else dense
        logits = functional_call(plain, weights, kwargs={"input_ids": IDS_BT}).logits
        adamw.zero_grad()
        loss_of(logits).backward()
        with backbone.role("policy"):
            found = backbone(IDS_BT).logits
            torch.testing.assert_close(found, logits, atol=2e-5, rtol=1e-4)
            optimizer.backward(loss_of(found))
        for name, parameter in backbone.role_parameters("policy").items():
            expected = own[name].grad
            assert parameter.grad is not None
            assert expected is not None
            assert (parameter.grad - expected).norm() <= 1e-3 * expected.norm(), name
        adamw.step()
        optimizer.step()


# ---- adding one ------------------------------------------------------------------------------------------------------


class Shift(AdapterLayer):
    trained = ("shift",)

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        return base(x) + self.shift


@pytest.fixture
def shift_kind() -> None:
    @register_kind("shift")
    class ShiftKind(AdapterKind[Any]):
        layer = Shift

        def tensors(self, context: LayerContext) -> Tensors:
            return {"shift": torch.zeros(len(context.weight_OI))}


@pytest.mark.usefixtures("shift_kind")
def test_a_kind_from_outside_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    backbone = trained("shift", "llama")
    assert loss_of(role_logits(backbone, "policy")) < loss_of(role_logits(backbone, "anchor"))
    save_role(backbone, "policy", tmp_path / "policy")
    again = load_backbone(tiny_model("llama"))
    load_role(again, "policy", tmp_path / "policy")
    assert torch.equal(role_logits(again, "policy"), role_logits(backbone, "policy"))
    # It has no matrix: neither merged nor written for PEFT.
    assert not backbone.can_merge("policy")
    assert not (tmp_path / "policy" / "adapter_config.json").exists()
    with raises("conflict", key="format"):
        list(backbone.merged_tensors("policy"))


def test_a_kind_that_does_not_exist_names_the_nearest() -> None:
    with raises("unknown", key="kind"):
        find_kind("dorra")
    with pytest.raises(ValueError, match="dora"):
        register_kind("dora")(find_kind("dora"))

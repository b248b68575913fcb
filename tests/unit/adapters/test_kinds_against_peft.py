"""Ten steps of every kind that PEFT has too, against PEFT's own layers: same start, data and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, ShiraConfig, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

from pe_rlhf.adapters.kind import Time
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.runs.saved_roles import save_role
from tests.tiny import IDS_BT, role_logits, tiny_model
from tests.unit.adapters.test_kinds import STEPS, backbone_with, loss_of, optimizer_of

ON_BOTH = ("lora", "dora", "vera")  # of PEFT's, those that take GPT-2's Conv1D
SAME_WIDTH = {"llama": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}
CASES = [
    *((kind, "llama") for kind in (*ON_BOTH, "bat", "loha", "miss", "tinylora")),
    *((kind, "gpt2") for kind in ON_BOTH),
]


def moved(kind: str, family: str, **settings: Any) -> Backbone:
    """A policy somewhat off its start, where the gradient of no tensor is zero."""
    backbone = backbone_with(kind, tiny_model(family), **settings)
    with torch.no_grad():
        for parameter in backbone.role_parameters("policy").values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return backbone


def check_steps(
    backbone: Backbone,
    theirs: nn.Module,
    rate: float = 1e-3,
    after_backward: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Ten steps on both sides: the same logits before each and at the end, which are others than at the start."""
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    # A larger ε: AdamW divides rounding by it where a gradient is next to nothing.
    own = optimizer_of(backbone, rate=rate, eps=1e-3)
    adamw = torch.optim.AdamW(trained, lr=rate, eps=1e-3, weight_decay=0.0)
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in backbone.role_parameters("policy").values())
    start = role_logits(backbone, "policy")
    for step in range(1, STEPS + 1):
        expected = theirs(input_ids=IDS_BT).logits
        adamw.zero_grad()
        loss_of(expected).backward()
        after_backward(step)
        adamw.step()
        after_step(step)
        with backbone.role("policy"):
            found = backbone(IDS_BT).logits
            assert apart(found, expected) < 2e-6, step
            own.backward(loss_of(found))
        own.step()
    with torch.no_grad():
        expected = theirs(input_ids=IDS_BT).logits
    assert apart(role_logits(backbone, "policy"), expected) < 2e-6
    assert apart(start, expected) > 2e-3


def apart(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_ten_steps_are_those_of_pefts_layers(kind: str, family: str, tmp_path: Path) -> None:
    """PEFT goes on from the files that are written of the start.

    Of VeRA on layers with as many inputs each: of others PEFT has λ_d in another unit, and so other steps of AdamW.
    """
    backbone = moved(kind, family, **({"targets": SAME_WIDTH[family]} if kind == "vera" else {}))
    save_role(backbone, "policy", tmp_path / "policy")
    check_steps(
        backbone,
        PeftModel.from_pretrained(tiny_model(family), str(tmp_path / "policy"), is_trainable=True),
        0.02 if kind == "vera" else 1e-3,
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ten_steps_of_adalora_with_a_falling_budget_are_pefts(family: str) -> None:
    """PEFT's layers and its allocator, with the budget that the schedule gives here after each step."""
    backbone = moved("adalora", family, orthogonality=0.0)
    kind, layers = backbone.adapter_spec("policy").kind, backbone.role_layers("policy")
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=32,
        tinit=2,
        tfinal=3,
        deltaT=1,
        total_step=STEPS,
        target_modules=sorted(layers),
    )
    config.orth_reg_weight = 1e-30  # what they add to a loss of labels; there are none here
    theirs: Any = get_peft_model(tiny_model(family), config)  # type: ignore[arg-type]
    for name, layer in layers.items():
        twin = theirs.base_model.model.get_submodule(name)
        with torch.no_grad():
            for part, value in layer.named_parameters():
                twin.get_parameter(f"{part}.default").copy_(value)
            twin.ranknum["default"].fill_(4.0)
        twin.scaling["default"] = 32.0
    allocator = RankAllocator(theirs, config, "default")
    budgets: list[int] = []

    def note(step: int) -> None:
        if step <= STEPS - 3:
            allocator.update_ipt(theirs)

    def mask(step: int) -> None:
        budgets.append(kind.budget(len(layers), Time(step, STEPS)))  # type: ignore[attr-defined]
        if step > 2:
            allocator.mask_to_budget(theirs, budgets[-1])

    check_steps(backbone, theirs, after_backward=note, after_step=mask)
    alive = sum(int(layer.get_buffer("alive").sum()) for layer in layers.values())
    assert alive == budgets[-1] == 2 * len(layers) < budgets[0]


def test_ten_steps_of_shira_are_pefts_with_the_same_mask() -> None:
    """Of 32×32 weights a density of 1/8 are PEFT's r·(32 + 32) entries of r = 2."""
    backbone = moved("shira", "llama", density=0.125, targets=["q_proj", "o_proj"])
    layers: dict[str, Any] = dict(backbone.role_layers("policy"))
    plain = tiny_model("llama")
    theirs_of = dict(plain.named_modules())
    masks = {id(theirs_of[name]): layer.sparse_change() != 0 for name, layer in layers.items()}
    config = ShiraConfig(r=2, target_modules=sorted(layers))
    config.mask_fn = lambda base_layer, r, random_seed=None, **_: masks[id(base_layer)].float()
    theirs: Any = get_peft_model(plain, config)  # type: ignore[arg-type]
    for name, layer in layers.items():
        twin = theirs.base_model.model.get_submodule(name)
        with torch.no_grad():
            twin.shira_weight["default"].copy_(layer.get_parameter("values"))
    check_steps(backbone, theirs)

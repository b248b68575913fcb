"""Every kind of adapter on a base in 4 and 8 bit, by bitsandbytes on the CPU: QDoRA and its like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from pe_rlhf.adapters.kind import KINDS
from pe_rlhf.config import BackboneConfig
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.runs.export import write_merged
from pe_rlhf.runs.saved_roles import check_peft_files, read_role, save_role
from tests.failures import raises
from tests.tiny import IDS_BT, role_logits
from tests.unit.adapters.test_kinds import add, loss_of, optimizer_of, train

pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

# Of the kinds that leave for PEFT, those that its own type takes no such base for, and that are no LoRA either.
MERGED_ONLY = {("4bit", "loha")}
NO_PEFT = ("redrawn", "rosa", "shira")


def base_bytes(backbone: Backbone) -> dict[str, Tensor]:
    own = {n: p for n, p in backbone.model.named_parameters() if ".adapters." not in n}
    return {name.replace(".base.", "."): parameter.detach().clone() for name, parameter in own.items()}


def pass_with_gradient(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of all parameters; without a gradient bitsandbytes computes in another precision."""
    parameters = list(backbone.role_parameters("policy").values())
    with backbone.role("policy"):
        logits = backbone(IDS_BT).logits
    gradients = torch.autograd.grad(loss_of(logits), parameters)
    return logits.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def by_hand(base: Any) -> Tensor:
    """What a quantised weight stands for: one of NF4's 16 values for each half byte times its block's greatest, or an
    int8 times its row's greatest over 127.
    """
    packed = base.weight
    if packed.dtype == torch.int8:
        return packed.data.float() * base.state.SCB[:, None] / 127
    about = packed.quant_state
    numbers = torch.stack([packed.data.flatten() >> 4, packed.data.flatten() & 15], dim=1).flatten().long()
    return (about.code[numbers].view(-1, about.blocksize) * about.absmax[:, None]).view(about.shape)


def on_dense_weights(backbone: Backbone, quantisable_model: Path, kind: str) -> Backbone:
    """The same role on a plain model whose weights are what the quantised ones stand for."""
    plain = AutoModelForCausalLM.from_pretrained(quantisable_model, dtype=torch.float32)
    with torch.no_grad():
        for name in backbone.adapter_spec("policy").modules:
            plain.get_submodule(name).get_parameter("weight").copy_(by_hand(backbone.base_layer(name)))
    twin = load_backbone(plain)
    add(twin, "policy", kind)
    twin.set_role_state("policy", backbone.role_state("policy"))
    return twin


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_role_on_a_quantised_base_starts_as_it_and_learns(
    quantisable_model: Path, tmp_path: Path, kind: str, bits: Any
) -> None:
    backbone = load_backbone(str(quantisable_model), quantization=bits)
    anchor, before = role_logits(backbone, "anchor"), base_bytes(backbone)
    add(backbone, "policy", kind)
    assert torch.equal(role_logits(backbone, "policy"), anchor)
    train(backbone, optimizer_of(backbone), 4)
    assert loss_of(role_logits(backbone, "policy")) < loss_of(anchor) - 1e-3
    assert torch.equal(role_logits(backbone, "anchor"), anchor)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_bytes(backbone).items())

    logits, gradient = pass_with_gradient(backbone)
    dense = on_dense_weights(backbone, quantisable_model, kind)
    expected = pass_with_gradient(dense)
    close = 1e-5 if bits == "4bit" else 0.2  # 8 bits round the inputs, too
    assert apart(logits, expected[0]) < close
    assert apart(gradient, expected[1]) < close

    write_merged(backbone, "policy", BackboneConfig(quantization=bits), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        found = merged(input_ids=IDS_BT).logits
    assert apart(found, logits) < close
    assert apart(found, expected[0]) < 1e-5

    folder = tmp_path / "policy"
    save_role(backbone, "policy", folder)
    if kind in NO_PEFT or (bits, kind) in MERGED_ONLY:
        with raises("conflict", key="format"):
            check_peft_files(read_role(folder))
        return
    config = backbone.model.config.quantization_config
    fresh = AutoModelForCausalLM.from_pretrained(quantisable_model, quantization_config=config, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, str(folder))
    found = loaded.train(bits == "4bit")(input_ids=IDS_BT).logits  # else bitsandbytes computes in another precision
    # Bat's product is one with its dense weight there, which rounds no inputs.
    assert apart(found.detach(), logits) < (0.2 if (bits, kind) == ("8bit", "bat") else 1e-5)

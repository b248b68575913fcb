"""Every kind of adapter on a base in 4 bit, by bitsandbytes on the CPU: QDoRA and its like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pe_rlhf.adapters.kind import KINDS
from pe_rlhf.model.backbone import load_backbone
from tests.tiny import role_logits
from tests.unit.adapters.test_kinds import STEPS, add, loss_of, optimizer_of, train

pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_role_on_a_quantised_base_starts_as_it_and_learns(quantisable_model: Path, kind: str) -> None:
    backbone = load_backbone(str(quantisable_model), quantization="4bit")
    anchor = role_logits(backbone, "anchor")
    before = {n: p.detach().clone() for n, p in backbone.model.named_parameters() if ".adapters." not in n}
    add(backbone, "policy", kind)
    assert torch.equal(role_logits(backbone, "policy"), anchor)
    train(backbone, optimizer_of(backbone), STEPS)
    assert loss_of(role_logits(backbone, "policy")) < loss_of(anchor) - 1e-3
    assert torch.equal(role_logits(backbone, "anchor"), anchor)
    bases = {n.replace(".base.", "."): p for n, p in backbone.model.named_parameters() if ".adapters." not in n}
    for name, tensor in before.items():
        assert torch.equal(bases[name.replace(".base.", ".")], tensor), name

"""What an update of the weights is like, against numpy's decompositions of the dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pe_rlhf.adapters.kind import KINDS
from pe_rlhf.comparison.drift import policy_drift
from pe_rlhf.model.backbone import load_backbone
from tests.tiny import add_role, perturb, tiny_model
from tests.unit.adapters.test_kinds import add

CASES = [(family, name) for family in ("llama", "gpt2") for name in ("lora", "pissa", "full")]


@pytest.mark.parametrize(("family", "name"), [*CASES, *(("llama", kind) for kind in sorted({*KINDS} - {"lora"}))])
def test_drift_is_that_of_the_dense_matrices(family: str, name: str) -> None:
    """Of inits, kinds and full tuning, against numpy's SVD of W and of what the merged model's weights are off by."""
    backbone = load_backbone(tiny_model(family))
    if name == "full":
        backbone.add_own_weights("policy")
    elif name in KINDS and name != "lora":
        add(backbone, "policy", name)
    else:
        add_role(backbone, "policy", name, rank=3)
    perturb(backbone, "policy", 0.02)
    found = policy_drift(backbone, rank=3)
    merged = dict(backbone.merged_tensors("policy"))
    plain = tiny_model(family)
    change = total = principal = minor = 0.0
    ranks = []
    for key, before in plain.state_dict().items():
        linear = before.dim() == 2 and "embed" not in key and key.split(".")[-2] not in ("wte", "wpe", "lm_head")
        if not linear:
            continue
        w, d = before.double().numpy(), (merged[key] - before).double().numpy()
        u, _, vh = np.linalg.svd(w, full_matrices=False)
        change, total = change + (d**2).sum(), total + (w**2).sum()
        principal += ((u[:, :3].T @ d @ vh[:3].T) ** 2).sum()
        minor += ((u[:, -3:].T @ d @ vh[-3:].T) ** 2).sum()
        ranks.append((d**2).sum() / np.linalg.norm(d, 2) ** 2)
    assert found["update_norm"] == pytest.approx((change / total) ** 0.5, rel=1e-3)
    assert found["principal_share"] == pytest.approx(principal / change, rel=1e-2)
    assert found["minor_share"] == pytest.approx(minor / change, rel=1e-2)
    assert found["stable_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-3)
    assert found["spectrum"][0] == 1.0
    if name == "lora":
        assert max(found["spectrum"][3:]) < 1e-4  # an update of rank 3


def test_a_policy_that_has_not_moved_has_no_drift() -> None:
    backbone = load_backbone(tiny_model("llama"))
    add_role(backbone, "policy", "pissa", rank=3)
    assert policy_drift(backbone, rank=3) == {"update_norm": 0.0}
    assert torch.is_grad_enabled()

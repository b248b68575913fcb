"""Ranks share the layers of an init: each decomposes its own, and all end with the bits of one process."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.integration.distributed.launching import script_on_ranks

MAKES = """
import json, os, sys
import torch
from safetensors.torch import save_file
from pe_rlhf.adapters.lora.inits import svd
from pe_rlhf.system.distributed import rank
from tests.tiny import add_role, tiny_model
from pe_rlhf.model.backbone import load_backbone

if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
calls, whole = [], svd.full_svd
svd.full_svd = lambda matrix: calls.append(tuple(matrix.shape)) or whole(matrix)
backbone = load_backbone(tiny_model("llama", num_hidden_layers=3))
state = {}
for init in ("pissa", "milora", "lora", "lora_ga"):
    add_role(backbone, init, init, rank=3, alpha=6)
    state |= {f"{init}/{name}": tensor for name, tensor in backbone.role_state(init).items()}
    if init == "milora":
        print(json.dumps({"calls": len(calls), "layers": len(backbone.role_layers(init))}))
save_file(state, f"{sys.argv[1]}-{rank()}.safetensors")
"""


def test_two_ranks_share_the_layers_and_have_the_bits_of_one(tmp_path: Path) -> None:
    (single,) = script_on_ranks(MAKES, tmp_path, "single", ranks=1)  # how many decompositions it has made
    shares = script_on_ranks(MAKES, tmp_path, "shared")
    assert single["calls"] == 2 * single["layers"]
    assert sum(share["calls"] for share in shares) == single["calls"]
    assert abs(shares[0]["calls"] - shares[1]["calls"]) <= 2
    wanted = load_file(tmp_path / "single-0.safetensors")
    for rank in range(2):
        found = load_file(tmp_path / f"shared-{rank}.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

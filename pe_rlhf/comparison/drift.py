"""What an update of the weights is like: how large, of which rank, and in which part of the base weights' spectrum.

An init puts the adapter somewhere in W's spectrum; whether training stays there is seen from the trained change ΔW.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from pe_rlhf.adapters.lora.inits.svd import Directions, bottom_directions, top_directions
from pe_rlhf.comparison.run_result import Row
from pe_rlhf.config import Recipe
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.saved_roles import load_base, load_role, starting_model
from pe_rlhf.system.files import read_json, write_json
from pe_rlhf.system.progress import say
from reward.errors import InputError

SPECTRUM = 64


def drift_of_run(run: Path, recipe: Recipe, rank: int) -> Row:
    """The drift of a finished run's policy, worked out once and kept beside its adapter; empty where it cannot be."""
    path = RunFiles(run).stage("ppo").drift
    with suppress(InputError):  # one that is not there or cannot be read is worked out anew
        if (kept := read_json(path)).get("rank") == rank:
            return dict(kept)
    try:
        backbone = load_base(recipe, starting_model(recipe, run), device="cpu")
        load_role(backbone, "policy", RunFiles(run).role("policy").folder)
        row = {"rank": rank, **policy_drift(backbone, rank)}
    except InputError as error:
        say(f"{run}: the drift of its weights is left out: {error}")
        return {}
    write_json(path, row)
    return row


@torch.no_grad()
def policy_drift(backbone: Backbone, rank: int, role: str = "policy") -> Row:
    """Over all layers that the role has changed, with ΔW = W_role − W0:

    - `update_norm`: ‖ΔW‖ / ‖W0‖;
    - `principal_share`, `minor_share`: ‖Uᵀ·ΔW·V‖² / ‖ΔW‖² with U and V the first or last `rank` singular vectors of W0;
    - `stable_rank`: ‖ΔW‖²_F / ‖ΔW‖²_2, mean over layers;
    - `spectrum`: singular values of ΔW over the first one, mean over layers.
    """
    change = total = principal = minor = 0.0
    ranks: list[float] = []
    spectra: list[Tensor] = []
    for weight_OI, delta_OI in backbone.weight_changes(role):
        squared = delta_OI.square().sum().item()
        total += weight_OI.float().square().sum().item()
        if squared == 0:
            continue
        count = min(rank, *weight_OI.shape)
        change += squared
        principal += _inside(delta_OI, top_directions(weight_OI, count, cache=True))
        minor += _inside(delta_OI, bottom_directions(weight_OI, count, cache=True))
        values_K = torch.linalg.svdvals(delta_OI)
        ranks.append(squared / values_K[0].square().item())
        spectra.append(
            torch.nn.functional.pad(values_K[:SPECTRUM] / values_K[0], (0, max(0, SPECTRUM - len(values_K))))
        )
    if not spectra:
        return {"update_norm": 0.0}
    spectrum_K = torch.stack(spectra).mean(dim=0)
    return {
        "update_norm": (change / total) ** 0.5,
        "principal_share": principal / change,
        "minor_share": minor / change,
        "stable_rank": sum(ranks) / len(ranks),
        "spectrum": [round(value, 6) for value in spectrum_K.tolist()],
    }


def _inside(delta_OI: Tensor, directions: Directions) -> float:
    """‖Uᵀ·ΔW·V‖²: what of a change lies inside the span of some singular vectors on both sides."""
    return (directions.U_OK.T @ delta_OI @ directions.Vh_KI.T).square().sum().item()

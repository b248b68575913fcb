"""Several reward adapters on the shared backbone as one source of scores, or as one adapter of their mean weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pe_rlhf.adapters.specs import AdapterSpec, adapter_settings, saved_adapter
from pe_rlhf.algo.ensembles import COMBINE, disagreement
from pe_rlhf.config.reward_source import OWN_STAGE
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.passes import for_each_row
from pe_rlhf.model.tensors import without_prefix
from pe_rlhf.runs.saved_roles import SavedRole, checked_state, find_role
from pe_rlhf.types import Sequences
from reward.errors import InputError
from reward.records import NO_COLUMNS, Columns, Prompt

KEY = "ppo.reward.ensemble"


class EnsembleScorer:
    """Reward roles that each score the very tokens that were sampled, one role after the other.

    metrics: of the last batch, how far the members are apart.
    """

    def __init__(self, backbone: Backbone, roles: list[str], combine: str, k: float, micro_batch_tokens: int) -> None:
        self._backbone, self._roles, self._budget = backbone, roles, micro_batch_tokens
        self._combine, self._k = COMBINE[combine], k
        self.metrics: dict[str, float] = {}

    def score(
        self, prompts: list[Prompt], responses: list[str], sequences: Sequences, columns: Columns = NO_COLUMNS
    ) -> Tensor:
        compute = self._backbone.response_scores
        scores_MB = torch.stack(
            [for_each_row(self._backbone, role, sequences, self._budget, compute) for role in self._roles]
        )
        self.metrics = {"disagreement": disagreement(scores_MB)}
        return self._combine(scores_MB, self._k)


def find_ensemble(name: str, run_dir: Path) -> list[SavedRole]:
    """The members of the ensemble that a recipe names: this run's own, or that of another run or stage.

    Raises `InputError` where there is none, or where one of its members is missing.
    """
    place = run_dir if name in OWN_STAGE else Path(name).expanduser()
    try:
        first = find_role(place, "reward")
        recipe = first.recipe
        trained = None if recipe is None or recipe.reward is None else recipe.reward.ensemble
        count = 1 if trained is None else trained.members
        if count < 2:
            raise InputError(
                f"{place} holds one reward adapter, not an ensemble",
                kind="missing",
                file=place,
                fix="train one with reward.ensemble: {members: 5}, or name it as adapter",
            )
        members = [first]
        for number in range(2, count + 1):
            folder = first.files.stage.role(f"reward_{number}").folder
            if not folder.is_dir():
                message = f"member {number} of the ensemble of {count} is not there: {folder}"
                raise InputError(message, kind="missing", file=folder)
            members.append(find_role(folder, "reward"))
        return members
    except InputError as error:
        raise InputError(f"{KEY}: {error}", kind=error.kind, key=KEY, file=error.file) from error


@torch.no_grad()
def load_average(backbone: Backbone, role: str, members: list[SavedRole]) -> None:
    """Put one role on the backbone whose change of each weight, and whose head, is the mean of the members' (WARM,
    arXiv 2401.12187).

    The mean of products is not the product of means: ΔW = Σ s_m/M · B_m·A_m is one LoRA with the factors of all
    members side by side, of the sum of their ranks.
    """
    found = [checked_state(backbone, member.folder) for member in members]
    specs = [spec for spec, _ in found if isinstance(spec, AdapterSpec)]
    if len(specs) < len(found) or len({spec.modules for spec in specs}) > 1:
        raise _no_mean("only adapters on the same layers have a mean")
    states = [state for _, state in found]
    merged = {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in ("head.weight", "head.bias")}
    for layer in specs[0].modules:
        weight_OI = backbone.base_weight(layer)
        adapters: list[Any] = [
            saved_adapter(spec, weight_OI, without_prefix(f"{layer}.", state))
            for spec, state in zip(specs, states, strict=True)
        ]
        factors = [found for adapter in adapters if (found := adapter.lora_factors()) is not None]
        if len(factors) < len(adapters):
            raise _no_mean("only adapters that are plain LoRA factors have a mean")
        merged[f"{layer}.lora_A"] = torch.cat([f.A_RI for f in factors]).cpu()
        merged[f"{layer}.lora_B"] = torch.cat([f.scale / len(factors) * f.B_OR for f in factors], dim=1).cpu()
    rank = max(len(tensor) for name, tensor in merged.items() if name.endswith("lora_A"))
    own = specs[0].settings
    places = {"targets": own.targets, "exclude": own.exclude, "last_layers": own.last_layers}
    settings = adapter_settings(rank=rank, alpha=float(rank), **places)  # a scale of 1
    backbone.load_role(role, AdapterSpec(settings, specs[0].modules), merged)


def _no_mean(why: str) -> InputError:
    return InputError(
        f"{KEY}: {why}", kind="conflict", key="ppo.reward.combine", fix="use combine: mean, or plain LoRA members"
    )

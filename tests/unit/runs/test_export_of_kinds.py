"""`pe-rlhf export` of a policy of every kind: the files, and what the model card says they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from pe_rlhf.adapters.kind import KINDS
from pe_rlhf.config.load import make_recipe, save_recipe
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.names import resolve_model
from pe_rlhf.runs.export import export_role
from pe_rlhf.runs.layout import StageFiles
from pe_rlhf.runs.saved_roles import save_role
from tests.failures import raises
from tests.runs import recipe
from tests.tiny import IDS_BT, perturb, role_logits
from tests.unit.adapters.test_kinds import SMALL, add

LEAVES_AS = {
    **dict.fromkeys(
        ("adalora", "additive", "lora", "lora_dash", "routed", "spectral_a", "spectral_r", "stacked"), "A LoRA"
    ),
    "dora": "A DoRA",
    **{kind: f"An adapter of PEFT's type `{kind.upper()}`" for kind in ("loha", "miss", "tinylora", "vera")},
    "bat": "An adapter of PEFT's type `MISS`",
}
# What the card says of sizes, by hand: AdaLoRA's layers have 4 each, of 4; additive has 2·3, Dash 3 + 2.
RANKS = {"adalora": 4, "additive": 6, "lora_dash": 5, "spectral_a": 6, "spectral_r": 3, "lora": 4, "dora": 4, "miss": 5}
RANK_3 = {"rank": 3}
SETTINGS = {
    "additive": RANK_3,
    "lora_dash": {"rank": 3, "directions": 2},
    **dict.fromkeys(("spectral_a", "spectral_r"), RANK_3),
}


def run_with(
    kind: str, place: Path, last: Callable[[Backbone], None] = lambda _: None, **changes: object
) -> torch.Tensor:
    """A finished PPO stage with a policy of a kind that has moved; its logits."""
    given = SMALL.get(kind, {}) | SETTINGS.get(kind, {}) | changes
    stage = StageFiles(place / "ppo")
    stage.folder.mkdir(parents=True)
    save_recipe(make_recipe(recipe("ppo", adapter={"kind": kind, **given}), place / "recipe.yaml"), stage.recipe)
    backbone = load_backbone("random:tiny-llama")
    add(backbone, "policy", kind, **given)
    perturb(backbone, "policy")
    last(backbone)
    save_role(backbone, "policy", stage.role("policy").folder)
    return role_logits(backbone, "policy")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_policy_of_every_kind_is_exported_with_a_card_that_says_as_what(kind: str, tmp_path: Path) -> None:
    expected = run_with(kind, tmp_path)
    base = resolve_model("random:tiny-llama")

    def check(model: PreTrainedModel | PeftModel) -> None:
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=IDS_BT).logits, expected, atol=5e-5, rtol=1e-4)

    merged = export_role(tmp_path, "merged")
    check(AutoModelForCausalLM.from_pretrained(merged))
    card = (merged / "README.md").read_text(encoding="utf-8")
    assert "\nA full checkpoint: " in card
    assert f"| kind of adapter | `{kind}` |" in card

    if kind not in LEAVES_AS:
        with raises("conflict", key="format"):
            export_role(tmp_path, "lora")
        return
    folder = export_role(tmp_path, "lora")
    check(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)))
    card = (folder / "README.md").read_text(encoding="utf-8")
    sentence = re.search(r"^An? .* for the unmodified base model", card, re.MULTILINE)
    assert sentence is not None
    assert sentence[0].startswith(LEAVES_AS[kind])
    if kind in RANKS:
        assert f" of rank {RANKS[kind]} for" in sentence[0]
    assert f"| kind of adapter | `{kind}` |" in card
    assert ("The adapter that was trained is of the kind" in card) == (LEAVES_AS[kind] == "A LoRA" and kind != "lora")
    assert "B0·A0 is not zero" not in card


def test_the_card_of_an_adalora_has_the_ranks_that_are_left(tmp_path: Path) -> None:
    def shrink(backbone: Backbone) -> None:
        first, second, *_ = backbone.role_layers("policy").values()
        for layer, out in ((first, 3), (second, 4)):  # a LoRA has no rank 0
            layer.get_buffer("alive")[:out] = False
            with torch.no_grad():
                layer.get_parameter("lora_E")[:out] = 0

    run_with("adalora", tmp_path, shrink)
    folder = export_role(tmp_path, "lora")
    ranks = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    assert sorted(ranks.values()) == [1, 1] + [4] * (len(ranks) - 2)
    assert "\nA LoRA of rank 1 to 4 for the unmodified" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_card_says_why_an_export_has_twice_the_rank(kind: str, tmp_path: Path) -> None:
    run_with(kind, tmp_path, init="pissa")
    card = (export_role(tmp_path, "lora") / "README.md").read_text(encoding="utf-8")
    assert " of rank 8 for the unmodified" in card
    assert "B0·A0 is not zero" in card
    assert "| init | `pissa` |" in card

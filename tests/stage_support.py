"""What the tests of several stages share: plain models to compare with, byte models on disk, files, stage runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pe_rlhf.config import LoRAConfig, Recipe
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.stages.pipeline import run_recipe
from tests.runs import Tree, write_jsonl
from tests.tiny import tiny_model


@dataclass
class PlainRole:
    """A role as an ordinary model: the original weights plus s·(B·A − B0·A0), dense; no wrapper, no micro-batches.

    `factors` are leaves of autograd by the names that `Backbone.role_parameters` gives them.
    """

    model: PreTrainedModel
    scale: float
    modules: tuple[str, ...]
    factors: dict[str, Tensor]
    initial: dict[str, Tensor]

    def outputs(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Logits _TV and last hidden states _TH of one sequence that stands by itself."""
        weights: dict[str, Tensor] = {}
        for name in self.modules:
            delta = self.factors[f"{name}.lora_B"] @ self.factors[f"{name}.lora_A"]
            if f"{name}.initial_B_OR" in self.initial:
                delta = delta - self.initial[f"{name}.initial_B_OR"] @ self.initial[f"{name}.initial_A_RI"]
            weights[f"{name}.weight"] = self.model.get_parameter(f"{name}.weight").detach() + self.scale * delta
        arguments = {"input_ids": torch.tensor([ids]), "output_hidden_states": True, "use_cache": False}
        output = functional_call(self.model, weights, (), arguments)
        return output.logits[0], output.hidden_states[-1][0]

    def numbers(self, ids: list[int]) -> Tensor:
        """The scalar head _T at every token."""
        _, hidden_TH = self.outputs(ids)
        return hidden_TH @ self.factors["head.weight"] + self.factors["head.bias"]


def plain_role(backbone: Backbone, role: str) -> PlainRole:
    """A role of a tiny Llama backbone as an ordinary model of its own; `anchor` too."""
    model = tiny_model("llama").requires_grad_(False)
    if role == "anchor":
        return PlainRole(model, 0.0, (), {}, {})
    state = backbone.role_state(role)
    spec = backbone.adapter_spec(role)
    initial = {name: tensor for name, tensor in state.items() if "initial" in name}
    factors = {name: tensor.requires_grad_() for name, tensor in state.items() if name not in initial}
    assert isinstance(spec.settings, LoRAConfig)
    return PlainRole(model, spec.settings.alpha / spec.settings.rank, spec.modules, factors, initial)


def byte_model(folder: Path, *, pad_is_eos: bool, **changes: Any) -> Path:
    """A tiny random Llama that reads bytes, saved in a folder."""
    words = ["<|end|>", "<|pad|>", *sorted(ByteLevel.alphabet())]
    bytewise = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()  # type: ignore[assignment]
    pad = "<|end|>" if pad_is_eos else "<|pad|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|end|>", pad_token=pad)
    heads: Tree = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sizes: Tree = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": len(words)}
    ids: Tree = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**heads | sizes | ids | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gpt2_of_bytes(folder: Path) -> str:
    """A tiny random GPT-2 that reads bytes, saved in a folder."""
    byte_model(folder, pad_is_eos=True)  # for its tokenizer
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    tiny_model("gpt2", vocab_size=258, n_positions=256, **ids).save_pretrained(folder)
    return str(folder)


def write_prompts(path: Path, prompts: list[Any]) -> str:
    return str(write_jsonl(path, [{"prompt": prompt} for prompt in prompts]))


def run(tree: Tree, run_dir: Path, *stages: str) -> dict[str, Any]:
    """Run stages of a recipe given as a mapping; all of them by default. Returns their summaries."""
    recipe = Recipe.model_validate(tree)
    return run_recipe(recipe, run_dir, list(stages) or recipe.stages)


@pytest.fixture(autouse=True)
def caches_apart(data_cache: Path, model_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PE_RLHF_CACHE", str(model_cache))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)

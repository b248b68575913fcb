"""How much memory the phases of a run need, from the model's config and before a weight is loaded.

Arithmetic, within about 15 %: weights and optimizer states are counted on a model without memory, the activations of a
training pass are what a packed pass of a Llama-like block keeps. Seen for a 7B shape on an H200: 36 and 55 GiB at 4,096
and 8,192 tokens, where this gives 34 and 53.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from pe_rlhf.adapters.kind import kind_of
from pe_rlhf.adapters.specs import AdapterSpec, layer_sizes
from pe_rlhf.adapters.targets import plain_weight
from pe_rlhf.config import AdapterConfig, BackboneConfig
from pe_rlhf.model.names import model_at_hand, resolve_model

GIB = 2**30
WIDTH = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.1, "4bit": 0.6}  # bytes of a weight
ADAPTER_STATES = 16 + 8  # bytes of a trained adapter's weight: itself, gradient, two moments; A0 and B0 beside them
CONTEXT = 1.5 * GIB  # CUDA's context, libraries' workspaces
ENGINE = 2 * CONTEXT  # of vLLM: its context, a prefill's activations, CUDA graphs, adapters
HEAD_CHUNK = 1.0 * GIB  # logits of a chunk of tokens and what their backward pass keeps
SLACK = 0.9  # of a card's memory: the allocator's gaps take the rest


@dataclass(frozen=True)
class ModelShape:
    """What the memory of a model depends on.

    Attributes:
        parameters: of the whole model.
        largest_layer: parameters of its largest layer, which ZeRO-3 gathers at a time.
        linears: (inputs, outputs) of each layer that gets an adapter; of fused experts their number before them.
        layers, hidden, inner, keys, vocabulary: blocks, and widths of states, MLPs, keys (all key heads), logits.
        family: transformers' name of its architecture.
    """

    parameters: int
    largest_layer: int
    linears: tuple[tuple[int, ...], ...]
    layers: int
    hidden: int
    inner: int
    keys: int
    vocabulary: int
    family: str = ""

    def adapter(self, settings: AdapterConfig) -> int:
        """Parameters of an adapter."""
        kind = kind_of(settings)
        return sum(math.prod(size) for layer in self.linears for size in layer_sizes(kind, layer).values())

    def cache_of_a_token(self, width: float) -> float:
        """Bytes of the keys and values of a token."""
        return 2 * self.layers * self.keys * width

    def kept_of_a_token(self, width: float, *, checkpointing: bool = False) -> float:
        """Bytes that a training pass keeps of a token for its backward pass.

        A block keeps eight tensors as wide as the states (around the norms, queries, attention, residuals), keys and
        values, and three as wide as the MLP. With checkpointing a block keeps what goes into it, and one is whole.
        """
        block = (8 * self.hidden + 2 * self.keys + 3 * self.inner) * width
        return block + self.layers * self.hidden * width if checkpointing else self.layers * block


@dataclass(frozen=True)
class Phase:
    """What is in a device's memory at the same time, by name, bytes."""

    stage: str
    name: str
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def model_shape(
    name: str, settings: BackboneConfig, adapter: AdapterConfig, *, fetch: bool = False
) -> ModelShape | None:
    """The shape of a model by its config, or None where transformers cannot make it from that.

    Without `fetch` also where the model is not on this machine yet.
    """
    common = {"trust_remote_code": settings.trust_remote_code, "revision": settings.revision}
    try:
        if (path := resolve_model(name) if fetch else model_at_hand(name)) is None:
            return None
        config = AutoConfig.from_pretrained(path, **common)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
    except Exception:  # the plan is an extra: what is wrong with the model is said where it is loaded
        return None
    return shape_of(model, config, adapter)


def shape_of(model: nn.Module, config: PretrainedConfig, adapter: AdapterConfig) -> ModelShape:
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", 1) or 1
    hidden = text.hidden_size
    head_size = getattr(text, "head_dim", None) or hidden // heads
    targets = AdapterSpec.on(model, adapter).modules  # type: ignore[arg-type]
    weights = [plain_weight(model, name) for name in targets]
    sizes = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        largest_layer=max(sizes),
        linears=tuple(tuple(weight.shape) for weight in weights),  # type: ignore[misc]
        layers=text.num_hidden_layers,
        hidden=hidden,
        inner=getattr(text, "intermediate_size", None) or 4 * hidden,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        vocabulary=text.vocab_size,
        family=text.model_type,
    )


def weight_bytes(shape: ModelShape, settings: BackboneConfig, ranks_of_zero3: int = 1) -> float:
    """Bytes of the frozen base on one device; split by ZeRO-3 it is a share and the layer that is gathered."""
    width = WIDTH[settings.dtype if settings.quantization == "none" else settings.quantization]
    if ranks_of_zero3 > 1:
        return (shape.parameters / ranks_of_zero3 + shape.largest_layer) * width
    return shape.parameters * width


def tokens_that_fit(shape: ModelShape, settings: BackboneConfig, room: float) -> int:
    """The tokens of a training pass whose activations fit into that many bytes: a multiple of 1,024, at most 32,768.

    Beyond that a pass of a small model is as fast as it gets; below 1,024 packing has nothing to pack.
    """
    kept = shape.kept_of_a_token(WIDTH[settings.dtype], checkpointing=settings.gradient_checkpointing)
    return min(32_768, max(0, int(room / kept)) // 1024 * 1024)

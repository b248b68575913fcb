"""The table of docs/gpus.md: what fits on which card by the memory plan. Arithmetic; needs no GPU and no download.

    python -m tests.benchmarks.memory_table

A cell is the largest micro_batch_tokens of a PPO update with LoRA of rank 16 on all linear layers, bf16, sampling by
transformers or by servers; with 4 bit or gradient checkpointing where bf16 does not fit as it is.
"""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from pe_rlhf.config import BackboneConfig, LoRAConfig
from pe_rlhf.model.memory_plan import (
    ADAPTER_STATES,
    CONTEXT,
    GIB,
    HEAD_CHUNK,
    SLACK,
    ModelShape,
    shape_of,
    tokens_that_fit,
    weight_bytes,
)

# Layers, hidden, MLP, heads, key heads: Qwen2.5's, Qwen3's 8B, and Llama 3's 70B.
MODELS = {
    "0.5B": (24, 896, 4864, 14, 2),
    "1.5B": (28, 1536, 8960, 12, 2),
    "3B": (36, 2048, 11008, 16, 2),
    "7B": (28, 3584, 18944, 28, 4),
    "8B": (36, 4096, 12288, 32, 8),
    "14B": (48, 5120, 13824, 40, 8),
    "32B": (64, 5120, 27648, 40, 8),
    "70B": (80, 8192, 28672, 64, 8),
}
CARDS = {"24 GB": (24e9, 1), "40 GB": (40e9, 1), "80 GB": (80e9, 1), "8 × 80 GB, zero3": (80e9, 8)}
WAYS = {
    "": BackboneConfig(dtype="bfloat16"),
    " gc": BackboneConfig(dtype="bfloat16", gradient_checkpointing=True),
    " 4bit": BackboneConfig(dtype="bfloat16", quantization="4bit"),
    " 4bit gc": BackboneConfig(dtype="bfloat16", quantization="4bit", gradient_checkpointing=True),
}


def shape(layers: int, hidden: int, inner: int, heads: int, key_heads: int) -> ModelShape:
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=152_064,
        tie_word_embeddings=hidden < 3000,
    )
    with torch.device("meta"):
        return shape_of(Qwen2ForCausalLM(config), config, LoRAConfig())


def cell(model: ModelShape, card: float, ranks: int) -> str:
    """The first way in which at least 1,024 tokens fit."""
    roles = (2 * ADAPTER_STATES + 4) * model.adapter(LoRAConfig(rank=16))  # policy, value; the reward adapter
    for name, settings in WAYS.items():
        if ranks > 1 and settings.quantization != "none":
            continue
        room = SLACK * card - CONTEXT - HEAD_CHUNK - roles - weight_bytes(model, settings, ranks)
        if tokens := tokens_that_fit(model, settings, room):
            return f"{tokens:,}{name}"
    return "–"


def main() -> None:
    shapes = {name: shape(*sizes) for name, sizes in MODELS.items()}
    print(f"| model | bf16 base, GiB | policy and value with states, GiB | {' | '.join(CARDS)} |")
    print(f"|---|---|---|{'---|' * len(CARDS)}")
    for name, model in shapes.items():
        base, roles = 2 * model.parameters / GIB, 2 * ADAPTER_STATES * model.adapter(LoRAConfig(rank=16)) / GIB
        cells = " | ".join(cell(model, card, ranks) for card, ranks in CARDS.values())
        print(f"| {name} | {base:.1f} | {roles:.1f} | {cells} |")


if __name__ == "__main__":
    main()

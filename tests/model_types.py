"""A tiny random model of each architecture that transformers has and that people may bring."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Settings = dict[str, Any]

# What most configs call these things; each takes what it knows.
COMMON: Settings = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
EXPERTS: Settings = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: Settings = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
INDEXED: Settings = EXPERTS | LATENT | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 32}
DELTA_NET: Settings = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA_2: Settings = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
}
FULL: Settings = {"layer_types": ["full_attention", "full_attention"]}
SLIDING: Settings = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
# Only the text part of these is tiny by `COMMON`; each part is a config of its own.
VISION: Settings = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION: Settings = {"depth": 3, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
# Decoders of models with an encoder.
SEQ2SEQ: Settings = {"d_model": 32, "decoder_layers": 2, "encoder_layers": 1, "num_hidden_layers": 1}
SEQ2SEQ |= {"decoder_ffn_dim": 48, "decoder_attention_heads": 4, "encoder_attention_heads": 4}


def _rope(kind: str, **more: Any) -> Settings:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


ROPE: Settings = {"rope_type": "default", "rope_theta": 10000.0}

# By name: the model type, or `type:variant`; with what its config needs beyond `COMMON`.
MODELS: dict[str, Settings] = {
    "afmoe": EXPERTS | FULL,
    "apertus": {},
    "arcee": {},
    "aria_text": EXPERTS | {"moe_num_experts": 4, "moe_topk": 2},
    "bamba": MAMBA_2 | {"attn_layer_indices": [1]},
    "bart": {"d_model": 32, "decoder_layers": 2, "encoder_layers": 1, "num_hidden_layers": 1, "decoder_ffn_dim": 48}
    | {"decoder_attention_heads": 4, "encoder_attention_heads": 4, "eos_token_id": 2, "forced_eos_token_id": 2},
    "bert": {},
    "bert-generation": {"is_decoder": True},
    "biogpt": {},
    "bitnet": {},
    "blenderbot": SEQ2SEQ,
    "blenderbot-small": SEQ2SEQ,
    "bloom": {},
    "camembert": {"is_decoder": True},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere:qk_norm": {"use_qk_norm": True},
    "cohere2": SLIDING,
    "cohere2_moe": EXPERTS | SLIDING,
    "cohere_compass_text": SLIDING
    | {
        "rope_parameters": {
            key: {**ROPE, "mrope_section": [1, 1, 2]} for key in ("full_attention", "sliding_attention")
        }
    },
    "ctrl": {"dff": 48},
    "cwm": SLIDING,
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": EXPERTS | LATENT | {"first_k_dense_replace": 1},
    "deepseek_v3": EXPERTS | LATENT | {"first_k_dense_replace": 1},
    "deepseek_v32": INDEXED | {"first_k_dense_replace": 1},
    "diffllama": {},
    "doge": {},
    "dots1": EXPERTS | FULL | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "electra": {},
    "ernie4_5": {},
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone4": SLIDING,
    "exaone_moe": EXPERTS | SLIDING,
    "falcon": {"head_dim": None, "num_kv_heads": 2},
    "falcon:alibi": {"head_dim": None, "num_kv_heads": 2, "alibi": True, "new_decoder_architecture": True},
    "falcon_h1": MAMBA_2 | {"lm_head_multiplier": 0.5},
    "falcon_mamba": {"state_size": 8},
    "flex_olmo": EXPERTS,
    "gemma": {},
    "gemma2": SLIDING | {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0},
    "gemma3": {
        "text_config": COMMON | SLIDING,
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    },
    "gemma3_text": SLIDING,
    "gemma3n_text": SLIDING
    | {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": SLIDING
    | {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 0,
        "global_head_dim": 8,
    },
    # The last two layers take the keys and values of earlier ones, of their type.
    "gemma4_text:shared_kv": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 2,
        "global_head_dim": 8,
    },
    "gemma4_unified_text": SLIDING,
    "glm": {},
    "glm4": {},
    "glm4_moe": EXPERTS | {"first_k_dense_replace": 1},
    "glm4_moe_lite": EXPERTS | LATENT,
    "glm_moe_dsa": INDEXED | {"first_k_dense_replace": 1},
    "gpt-sw3": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": EXPERTS | SLIDING,
    "gptj": {"rotary_dim": 4},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    "granite_swa": {},
    "granitemoe": EXPERTS,
    "granitemoe_swa": EXPERTS,
    "granitemoehybrid": EXPERTS | MAMBA_2 | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "granitemoeshared": EXPERTS | {"shared_intermediate_size": 16},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": EXPERTS,
    "hy_v3": EXPERTS,
    "hyperclovax": {},
    "jais2": {},
    "jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    "jetmoe": EXPERTS | {"kv_channels": 8},
    "kimi_linear": EXPERTS
    | LATENT
    | {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8, "linear_num_heads": 4},
    "laguna": EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "llama:tied": {"tie_word_embeddings": True},
    "llama:llama3_rope": _rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "llama:yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "llama:dynamic": _rope("dynamic", factor=4.0),
    "llama4_text": EXPERTS | {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 32},
    "longcat_flash": EXPERTS | LATENT | {"ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "num_layers": 1},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "marian": SEQ2SEQ | {"decoder_start_token_id": 0},
    "mbart": SEQ2SEQ,
    "mellum": EXPERTS | FULL,
    "mimo_v2_flash": EXPERTS,
    "minicpm3": LATENT,
    "minimax": EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "minimax_m2": EXPERTS,
    "ministral": SLIDING,
    "ministral3": {},
    "mistral": {"sliding_window": 4},
    "mistral:no_window": {"sliding_window": None},
    "mixtral": EXPERTS,
    "modernbert-decoder": {},
    "mpt": {},
    "mvp": SEQ2SEQ,
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": EXPERTS
    | {
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
        "num_hidden_layers": 3,
    },
    "olmo": {"clip_qkv": 8.0},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmo_hybrid": DELTA_NET,
    "olmoe": EXPERTS,
    "openai-gpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "pegasus": SEQ2SEQ,
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phi3:longrope": _rope(
        "longrope",
        short_factor=[1.0] * 4,
        long_factor=[8.0] * 4,
        original_max_position_embeddings=32,
        factor=2.0,
    )
    | {"original_max_position_embeddings": 32},
    "phimoe": EXPERTS,
    "plbart": SEQ2SEQ,
    "prophetnet": {"num_encoder_layers": 1, "num_decoder_layers": 2, "num_encoder_attention_heads": 4}
    | {"num_decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    | {"num_hidden_layers": None, "num_attention_heads": None},
    "qwen2": {},
    "qwen2:window": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4},
    "qwen2_moe": EXPERTS,
    "qwen3": {},
    "qwen3_5": {"text_config": COMMON | DELTA_NET, "vision_config": QWEN_VISION},
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": EXPERTS | DELTA_NET,
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | DELTA_NET,
    "qwen4_exp_text": EXPERTS
    | DELTA_NET
    | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 32}
    | {"indexer_compress_ratio": 4},
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "lru_width": 32,
        "logits_soft_cap": 3.0,
        "attention_window_size": 16,
    },
    "roberta": {"is_decoder": True},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": EXPERTS,
    "stablelm": {},
    "starcoder2": {},
    "trocr": {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4},
    "vaultgemma": SLIDING | {"attn_logit_softcapping": 1.0},
    "whisper": {"d_model": 32, "decoder_layers": 2, "encoder_layers": 1, "num_hidden_layers": 1, "decoder_ffn_dim": 48}
    | {"decoder_attention_heads": 4, "encoder_attention_heads": 4, "max_target_positions": 64},
    "xglm": {"ffn_dim": 48, "attention_heads": 4},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "d_head": 8, "max_position_embeddings": None}
    | {"hidden_size": None, "num_hidden_layers": None, "num_attention_heads": None},
    "youtu": LATENT,
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 2,
        "attention_head_dim": 16,
        "use_mamba_kernels": False,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "num_mem_blocks": 1,
        "chunk_size": 8,
        "use_mem_rope": True,
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
}


def build(name: str, **changes: Any) -> PreTrainedModel:
    """The model of that name with every parameter random, biases and norms too: none is left where errors hide."""
    settings = {**COMMON, **MODELS[name], **changes}
    if "text_config" in settings:  # the parts have the sizes, the whole only the ids
        settings = {key: value for key, value in settings.items() if key not in COMMON or key.endswith("_id")}
    settings = {
        k: v for k, v in settings.items() if v is not None or k not in COMMON
    }  # None: the config has no such key
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition(":")[0], **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            random = 0.18 * noise if parameter.dim() > 1 and "A_log" not in key else parameter + 0.1 * noise
            parameter.copy_(random)
    return model

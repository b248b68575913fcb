"""Packed batches in transformers' models: attention that puts the tokens side by side in rows again.

It is registered as an attention implementation, and a pass is packed where it is called with a `Packing`; any other
pass is the model's own, to the bit.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward, use_gqa_in_sdpa
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from pe_rlhf.model.fast.packing import Packing
from pe_rlhf.model.fast.varlen import attend_segments, takes_segments
from pe_rlhf.model.probes import decoder_of
from pe_rlhf.types import Sequences

ATTENTION = "pe_rlhf_packed"
UNUSED = (1, 1, 1, 1)  # shape of the mask that says nothing
REACHES = {"full_attention", "sliding_attention"}  # kinds of layers that columns and a window say all of


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention by `scaled_dot_product_attention`, of a packed batch where one is given.

    Args:
        query, key, value: _1HLD; key and value may have fewer heads.

    Returns:
        `(output, None)`, output _1LHD.

    Raises:
        TypeError: the model has put something of its own into the mask, which rows of a packed batch have no place for.
    """
    scale, window = arguments.get("scaling"), arguments.get("sliding_window")
    has_bias = arguments.get("position_bias") is not None
    if packing is None:
        if attention_mask is None or has_bias or query.device.type != "cpu":
            return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
        # Transformers would copy all keys and values for each head of a group, at every token that is sampled.
        return _attend(query, key, value, attention_mask, scale), None
    if attention_mask is None or attention_mask.shape != UNUSED or has_bias:
        raise TypeError(f"{type(module).__name__} attends by more than which tokens are in reach")
    packing.windows.add(window)
    if takes_segments(query, value):
        query, key, value = (values.squeeze(0).transpose(0, 1) for values in (query, key, value))
        return attend_segments(query, key, value, packing.segments, window, scale)[None], None
    rest, prefixes = packing.rest, packing.prefixes
    lengths = [len(rest)] if prefixes is None else [len(prefixes), len(rest)]
    split = (values.squeeze(0).transpose(0, 1).split(lengths) for values in (query, key, value))
    *of_prefixes, of_rest = zip(*split, strict=True)
    query, key, value = map(rest.unpack, of_rest)
    parts = []
    if prefixes is not None:
        starts, keys, values = map(prefixes.unpack, of_prefixes[0])
        parts.append(prefixes.pack(_attend(starts, keys, values, packing.prefix_mask(window), scale)))
        key = torch.cat([keys.index_select(0, packing.prefix_B), key], dim=2)
        value = torch.cat([values.index_select(0, packing.prefix_B), value], dim=2)
    parts.append(rest.pack(_attend(query, key, value, packing.rest_mask(window), scale)))
    return torch.cat(parts).unsqueeze(0), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask_B1QK: Tensor | None, scale: float | None) -> Tensor:
    """_BQHD from _BHQD and _BHKD; without a mask causal."""
    groups = query.shape[1] // key.shape[1]
    takes_groups = query.device.type == "cpu" or use_gqa_in_sdpa(mask_B1QK, key, value)
    if groups > 1 and not takes_groups:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    causal, grouped = mask_B1QK is None, groups > 1 and takes_groups
    out = scaled_dot_product_attention(query, key, value, mask_B1QK, scale=scale, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for passes that are not packed


def packed_hidden(decoder: nn.Module, ids_BT: Tensor, packing: Packing) -> Tensor:
    """Last hidden states _LH of the packed tokens."""
    # A mask with four axes is handed on as it is, here to no use: otherwise one of all pairs of tokens is made.
    unused = torch.ones(UNUSED, dtype=torch.bool, device=ids_BT.device)
    position_ids = packing.column_L.to(ids_BT.device)[None]
    output = decoder(
        input_ids=packing.take(ids_BT)[None],
        attention_mask=unused,
        position_ids=position_ids,
        use_cache=False,
        packing=packing,
    )
    return output.last_hidden_state[0]


def enable_packing(model: PreTrainedModel, precision: torch.dtype) -> bool:
    """Let a model take packed batches. False for one that cannot, which is then as it was.

    It has to attend by `sdpa` through transformers' interface, in all layers, and to look at nothing but the tokens in
    a row's reach: no recurrent state. A small batch shows that packed and padded rows give the same, up to `precision`.
    """
    layers = set(getattr(_text_config(model), "layer_types", None) or [])
    if model.config._attn_implementation not in ("sdpa", ATTENTION) or not layers <= REACHES:
        return False
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [module.config._attn_implementation for module in parts]
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of models that do not use the interface
    try:
        model.set_attn_implementation(ATTENTION)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if is_packing_enabled(model) and _gives_the_same(model, precision):
        return True
    for module, implementation in zip(parts, before, strict=True):
        module.config._attn_implementation = "sdpa" if implementation == ATTENTION else implementation
    return False


def is_packing_enabled(model: PreTrainedModel) -> bool:
    """Whether the model attends as packed batches need it; somebody may have set its attention to another kind."""
    return _text_config(model)._attn_implementation == ATTENTION


def _text_config(model: PreTrainedModel) -> PretrainedConfig:
    return model.config.get_text_config(decoder=True)


@torch.no_grad()
def _gives_the_same(model: PreTrainedModel, precision: torch.dtype) -> bool:
    """Whether packed rows, two of which share a prefix, have the hidden states of padded ones."""
    vocabulary, device = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0], model.device
    sequences = Sequences.pack([[2, 3, 4, 5]] * 2 + [[6, 5]], [[7, 8, 9], [8], [9, 10]], pad_id=0)
    ids_BT = sequences.ids_BT.remainder(vocabulary).to(device)
    packing = Packing.of(sequences, device)
    assert packing.prefixes is not None
    decoder = decoder_of(model)
    expected_LH = packing.take(decoder(input_ids=ids_BT, use_cache=False).last_hidden_state)
    try:
        found_LH = packed_hidden(decoder, ids_BT, packing)
    except (TypeError, ValueError, RuntimeError, IndexError):  # what models do with arguments they do not expect
        return False
    config = _text_config(model)
    has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if has_window and packing.windows == {None}:  # its attention knows of the window only by the mask
        return False
    tolerance = 1e-4 if precision == torch.float32 else 0.05
    return bool((found_LH - expected_LH).norm() <= tolerance * expected_LH.norm())

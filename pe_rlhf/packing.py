"""Packed batches: real tokens alone are computed, and what several rows start with is computed once.

The tokens of a batch stand one after the other: the prefixes that rows share, each once, then what follows them, row
after row. What a model does token by token, which is nearly everything, sees neither padding nor a token twice. In
attention alone they are rows again, where each row attends to its prefix and to itself. Positions say where in its row
a token stands. A chat template's system prompt is such a prefix, and so is the prompt of a preference pair. Results
differ from those of padded rows by rounding only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward, use_gqa_in_sdpa
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from pe_rlhf.types import Sequences

ATTENTION = "pe_rlhf_packed"
WORTHWHILE = 0.9  # attending to a shared prefix has to leave at most this share of the tokens to compute
# Each row keeps its prefix's keys and values, an eighth or less of what a computed token keeps for the backward pass.
KEPT_TOKENS_PER_TOKEN = 8
NEVER = 2**40  # a column that no token comes up to
UNUSED = (1, 1, 1, 1)  # shape of the mask that says nothing
REACHES = {"full_attention", "sliding_attention"}  # kinds of layers that columns and a window say all of


@dataclass(frozen=True)
class Rows:
    """Packed tokens as rows, padded on the right.

    Attributes:
        place_BQ: where each token stands among the packed ones; past a row's end, any.
        real_BQ: False past a row's end.
        column_BQ: each token's position in its row.
        index_L: where each packed token stands among all B × Q.
    """

    place_BQ: Tensor
    real_BQ: Tensor
    column_BQ: Tensor
    index_L: Tensor

    @classmethod
    def of(cls, starts_B: Tensor, lengths_B: Tensor) -> Rows:
        """Rows of those lengths whose first tokens have those positions."""
        step_Q = torch.arange(int(lengths_B.max()))
        real_BQ = step_Q < lengths_B[:, None]
        place_BQ = torch.where(real_BQ, (lengths_B.cumsum(0) - lengths_B)[:, None] + step_Q, 0)
        return cls(place_BQ, real_BQ, starts_B[:, None] + step_Q, real_BQ.flatten().nonzero()[:, 0])

    def __len__(self) -> int:
        """How many tokens there are."""
        return len(self.index_L)

    def places(self, row_B: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column _L of each packed token in a batch that has those rows."""
        return row_B[:, None].expand_as(self.place_BQ)[self.real_BQ], self.column_BQ[self.real_BQ]

    def unpack(self, values_HLD: Tensor) -> Tensor:
        """_BHQD from values _HLD of the packed tokens."""
        return _Unpack.apply(values_HLD, self).transpose(0, 1)

    def pack(self, values_BQHD: Tensor) -> Tensor:
        """Values _LHD of the packed tokens."""
        return _Pack.apply(values_BQHD, self)

    def to(self, device: torch.device) -> Rows:
        return Rows(*(tensor.to(device) for tensor in vars(self).values()))


class _Unpack(torch.autograd.Function):
    """Indexing whose gradient is indexing, too, since each token has one place; autograd would add up, one by one."""

    @staticmethod
    def forward(ctx: Any, values_HLD: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return values_HLD[:, rows.place_BQ]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradients[0].flatten(1, 2)[:, ctx.rows.index_L], None


class _Pack(torch.autograd.Function):
    """As `_Unpack`, the other way round; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, values_BQHD: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return values_BQHD.flatten(0, 1)[rows.index_L]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        found_BQHD = gradients[0][ctx.rows.place_BQ]
        return found_BQHD.masked_fill_(~ctx.rows.real_BQ[..., None, None], 0), None


@dataclass(frozen=True)
class Packing:
    """How a batch is packed.

    Attributes:
        row_L, column_L: where in the batch each packed token stands.
        prefixes: the shared prefixes, or None.
        prefix_B: which of them each row starts with.
        rest: what is left of the rows.
    """

    row_L: Tensor
    column_L: Tensor
    prefixes: Rows | None
    prefix_B: Tensor
    rest: Rows
    _masks: dict[tuple[str, int | None], Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, sequences: Sequences, device: torch.device) -> Packing:
        """The packing that computes the fewest tokens."""
        prefix_B, lengths_U = find_prefixes(sequences)
        starts_B, prefixes = lengths_U[prefix_B], None
        rest = Rows.of(starts_B, sequences.lengths_B - starts_B)
        parts = [rest.places(torch.arange(len(sequences)))]
        if lengths_U.any():
            prefixes = Rows.of(torch.zeros_like(lengths_U), lengths_U)
            first_U = torch.stack([(prefix_B == u).nonzero()[0, 0] for u in range(len(lengths_U))])
            parts.insert(0, prefixes.places(first_U))
            prefixes = prefixes.to(device)
        row_L, column_L = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(row_L, column_L, prefixes, prefix_B.to(device), rest.to(device))

    def take(self, values: Tensor) -> Tensor:
        """Values _L… of the packed tokens from those of a batch, _BT…."""
        return values[self.row_L.to(values.device), self.column_L.to(values.device)]

    def prefix_mask(self, window: int | None) -> Tensor | None:
        """Which keys each token of a prefix attends to; None: those up to its own."""
        assert self.prefixes is not None
        key = "prefixes", window
        if key not in self._masks:
            self._masks[key] = _mask(self.prefixes.column_BQ, self.prefixes.column_BQ, window)
        return self._masks[key]

    def rest_mask(self, window: int | None) -> Tensor | None:
        """Which keys each token after a prefix attends to, the prefix's first; None: those up to its own."""
        key = "rest", window
        if key not in self._masks:
            if self.prefixes is None:
                self._masks[key] = _mask(self.rest.column_BQ, self.rest.column_BQ, window)
            else:
                # What pads a shorter prefix is attended to by none.
                column_UP = torch.where(self.prefixes.real_BQ, self.prefixes.column_BQ, NEVER)
                column_BK = torch.cat([column_UP[self.prefix_B], self.rest.column_BQ], dim=1)
                self._masks[key] = _mask(self.rest.column_BQ, column_BK, window)
        return self._masks[key]

    @property
    def windows(self) -> set[int | None]:
        """The attention windows that were asked for."""
        return {window for _, window in self._masks}


def _mask(column_BQ: Tensor, column_BK: Tensor, window: int | None) -> Tensor | None:
    """_B1QK, or None where it would be plainly causal.

    What pads a row stands right of its tokens, which so never attend to it, and attends to itself: to attend to nothing
    would be NaN.
    """
    if column_BQ.shape == column_BK.shape and (window is None or window >= int(column_BK.max()) + 1):
        return None
    query_BQ1, key_B1K = column_BQ[:, :, None], column_BK[:, None, :]
    mask_BQK = key_B1K <= query_BQ1
    if window is not None:
        mask_BQK &= key_B1K > query_BQ1 - window
    return mask_BQK[:, None]


# ---- attention ------------------------------------------------------------------------------------------------------


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
    if packing is None:
        if attention_mask is None or query.device.type != "cpu":
            return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
        # Transformers would copy all keys and values for each head of a group, at every token that is sampled.
        return _attend(query, key, value, attention_mask, scale), None
    if attention_mask is None or attention_mask.shape != UNUSED or arguments.get("position_bias") is not None:
        raise TypeError(f"{type(module).__name__} attends by more than which tokens are in reach")
    rest, prefixes = packing.rest, packing.prefixes
    lengths = [len(rest)] if prefixes is None else [len(prefixes), len(rest)]
    split = (values.squeeze(0).split(lengths, dim=1) for values in (query, key, value))
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
    # A mask with four axes is handed on as it is, here to be left alone: otherwise one of all pairs of tokens is made.
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
    decoder = cast(nn.Module, model.base_model)
    expected_LH = packing.take(decoder(input_ids=ids_BT, use_cache=False).last_hidden_state)
    try:
        found_LH = packed_hidden(decoder, ids_BT, packing)
    except (TypeError, ValueError, RuntimeError, IndexError):  # what models do with arguments they do not expect
        return False
    config = _text_config(model)
    has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if has_window and packing.windows == {None}:  # its attention knows of the window by the mask alone
        return False
    tolerance = 1e-4 if precision == torch.float32 else 0.05
    return bool((found_LH - expected_LH).norm() <= tolerance * expected_LH.norm())


# ---- shared prefixes ------------------------------------------------------------------------------------------------


def find_prefixes(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """What is best computed once: the start that all rows have in common, or the prompts, where rows have equal ones.

    A prompt's last token is never part of its prefix: it predicts the first response token, and so belongs to what is
    asked for.

    Returns:
        `(prefix_B, lengths_U)`: which prefix each row starts with, and how long each is; of length 0 where none is
        worth it.
    """
    none = torch.zeros(len(sequences), dtype=torch.long), torch.zeros(1, dtype=torch.long)
    whole = int(sequences.lengths_B.sum())
    plans = (_common_start(sequences), _equal_prompts(sequences))
    prefix_B, lengths_U = min(plans, key=lambda plan: _computed(whole, *plan))
    return (prefix_B, lengths_U) if _computed(whole, prefix_B, lengths_U) <= WORTHWHILE * whole else none


def common_length(sequences: Sequences) -> int:
    """How many tokens all rows start with, up to the last but one of the shortest prompt; 0 of a row alone."""
    if len(sequences) < 2:
        return 0
    same_T = (sequences.ids_BT == sequences.ids_BT[:1]).all(dim=0)
    return min(int(same_T.cumprod(0).sum()), int(sequences.prompt_lengths_B.min()) - 1)


def kept_tokens(prefix_length: int) -> int:
    """As how many tokens of a budget a row's copy of its prefix's keys and values counts."""
    return -(-prefix_length // KEPT_TOKENS_PER_TOKEN)


def _computed(tokens: int, prefix_B: Tensor, lengths_U: Tensor) -> int:
    """How many tokens are left to compute."""
    return tokens - int(lengths_U[prefix_B].sum()) + int(lengths_U.sum())


def _common_start(sequences: Sequences) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(sequences), dtype=torch.long), torch.tensor([common_length(sequences)])


def _equal_prompts(sequences: Sequences) -> tuple[Tensor, Tensor]:
    lengths = sequences.prompt_lengths_B.tolist()
    prompts = [tuple(row[:length]) for row, length in zip(sequences.ids_BT.tolist(), lengths, strict=True)]
    number = {prompt: u for u, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([number[prompt] for prompt in prompts]), torch.tensor([len(prompt) - 1 for prompt in number])

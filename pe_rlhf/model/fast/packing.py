"""Packed batches: only real tokens are computed, and what several rows start with is computed once.

The tokens of a batch stand one after the other: the prefixes that rows share, each once, then what follows them, row
after row. What a model does token by token, which is nearly everything, sees neither padding nor a token twice. Only in
attention they are rows again, where each row attends to its prefix and to itself. Positions say where in its row a
token stands. A chat template's system prompt is such a prefix, and so is the prompt of a preference pair. Results
differ from those of padded rows by rounding only. How a model takes them is in `packed_attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pe_rlhf.model.fast.varlen import Segments
from pe_rlhf.types import Sequences

WORTHWHILE = 0.9  # attending to a shared prefix has to leave at most this share of the tokens to compute
NEVER = 2**40  # a column that no token comes up to


@dataclass(frozen=True)
class PackedRows:
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
    def of(cls, starts_B: Tensor, lengths_B: Tensor) -> PackedRows:
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

    def unpack(self, values_LHD: Tensor) -> Tensor:
        """_BHQD from values _LHD of the packed tokens."""
        return _Unpack.apply(values_LHD, self).transpose(1, 2)

    def pack(self, values_BQHD: Tensor) -> Tensor:
        """Values _LHD of the packed tokens."""
        return _Pack.apply(values_BQHD, self)

    def to(self, device: torch.device) -> PackedRows:
        return PackedRows(*(tensor.to(device) for tensor in vars(self).values()))


class _Unpack(torch.autograd.Function):
    """Indexing whose gradient is indexing, too, since each token has one place; autograd would add up, one by one."""

    @staticmethod
    def forward(ctx: Any, values_LHD: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows
        return _rows_of(values_LHD, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradients[0].flatten(0, 1).index_select(0, ctx.rows.index_L), None


class _Pack(torch.autograd.Function):
    """As `_Unpack`, the other way round; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, values_BQHD: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows
        return values_BQHD.flatten(0, 1).index_select(0, rows.index_L)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        found_BQHD = _rows_of(gradients[0], ctx.rows)
        return found_BQHD.masked_fill_(~ctx.rows.real_BQ[..., None, None], 0), None


def _rows_of(values_LHD: Tensor, rows: PackedRows) -> Tensor:
    """_BQHD; whole tokens are copied, which is faster than to pick out each head's part."""
    return values_LHD.index_select(0, rows.place_BQ.flatten()).unflatten(0, rows.place_BQ.shape)


@dataclass(frozen=True)
class Packing:
    """How a batch is packed.

    Attributes:
        row_L, column_L: where in the batch each packed token stands.
        prefixes: the shared prefixes, or None.
        prefix_B: which of them each row starts with.
        rest: what is left of the rows.
        segments: the same for a kernel that needs no rows.
        windows: the attention windows that layers have asked for.
    """

    row_L: Tensor
    column_L: Tensor
    prefixes: PackedRows | None
    prefix_B: Tensor
    rest: PackedRows
    segments: Segments
    windows: set[int | None] = field(default_factory=set)
    _masks: dict[tuple[str, int | None], Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, sequences: Sequences, device: torch.device) -> Packing:
        """The packing that computes the fewest tokens."""
        prefix_B, lengths_U = find_prefixes(sequences)
        starts_B, prefixes = lengths_U[prefix_B], None
        rest = PackedRows.of(starts_B, sequences.lengths_B - starts_B)
        parts = [rest.places(torch.arange(len(sequences)))]
        if lengths_U.any():
            prefixes = PackedRows.of(torch.zeros_like(lengths_U), lengths_U)
            first_U = torch.stack([(prefix_B == u).nonzero()[0, 0] for u in range(len(lengths_U))])
            parts.insert(0, prefixes.places(first_U))
            prefixes = prefixes.to(device)
        row_L, column_L = (torch.cat(part) for part in zip(*parts, strict=True))
        segments = Segments.of(prefix_B, lengths_U, sequences.lengths_B - starts_B).to(device)
        return cls(row_L, column_L, prefixes, prefix_B.to(device), rest.to(device), segments)

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


# ---- shared prefixes ------------------------------------------------------------------------------------------------


def find_prefixes(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """What is best computed once: the start that all rows have in common, or the prompts, where rows have equal ones.

    A prompt's last token is never part of its prefix: it predicts the first response token, and so belongs to what is
    asked for. Rows of different tasks share nothing: a routed policy computes another function of the same tokens.

    Returns:
        `(prefix_B, lengths_U)`: which prefix each row starts with, and how long each is; of length 0 where none is
        worth it.
    """
    none = torch.zeros(len(sequences), dtype=torch.long), torch.zeros(1, dtype=torch.long)
    whole = int(sequences.lengths_B.sum())
    plans = (common_starts(sequences), _equal_prompts(sequences))
    prefix_B, lengths_U = min(plans, key=lambda plan: _computed(whole, *plan))
    return (prefix_B, lengths_U) if _computed(whole, prefix_B, lengths_U) <= WORTHWHILE * whole else none


def common_length(sequences: Sequences) -> int:
    """How many tokens all rows start with, up to the last but one of the shortest prompt; 0 for a single row."""
    if len(sequences) < 2:
        return 0
    same_T = (sequences.ids_BT == sequences.ids_BT[:1]).all(dim=0)
    return min(int(same_T.cumprod(0).sum()), int(sequences.prompt_lengths_B.min()) - 1)


def common_starts(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """What all rows start with, or all of each task: `(prefix_B, lengths_U)`."""
    if sequences.tasks_B is None:
        return torch.zeros(len(sequences), dtype=torch.long), torch.tensor([common_length(sequences)])
    tasks_U, prefix_B = sequences.tasks_B.unique(return_inverse=True)
    own = (sequences.take((prefix_B == u).nonzero()[:, 0]) for u in range(len(tasks_U)))
    return prefix_B, torch.tensor([common_length(rows) for rows in own])


def _computed(tokens: int, prefix_B: Tensor, lengths_U: Tensor) -> int:
    """How many tokens are left to compute."""
    return tokens - int(lengths_U[prefix_B].sum()) + int(lengths_U.sum())


def _equal_prompts(sequences: Sequences) -> tuple[Tensor, Tensor]:
    lengths = sequences.prompt_lengths_B.tolist()
    tasks = [0] * len(lengths) if sequences.tasks_B is None else sequences.tasks_B.tolist()
    rows = zip(sequences.ids_BT.tolist(), lengths, tasks, strict=True)
    prompts = [(task, *row[:length]) for row, length, task in rows]
    number = {prompt: u for u, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([number[prompt] for prompt in prompts]), torch.tensor([len(prompt) - 2 for prompt in number])

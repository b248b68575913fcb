"""Attention over packed tokens as they are, on a GPU: no rows, no padding, no masks, no repeated heads.

Flash attention's kernel for sequences of different lengths takes the tokens one after the other and where each sequence
ends. A prefix that rows share is a sequence of its own; a row after it has its own tokens as queries, and the prefix's
tokens and its own as keys. Where there are more keys than queries, the kernel's causal mask ends at the last of both,
which is just that. It exists for bf16 and fp16; the rest of the cases are `packed_attention`'s.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

WIDEST_HEAD = 256


@dataclass(frozen=True)
class Segments:
    """Packed tokens as sequences that attend causally.

    Attributes:
        query_ends, key_ends: where each sequence ends among the queries and the keys, int32, 0 in front.
        longest_query, longest_key: tokens of the longest one.
        key_L: which packed token each key is; None where keys are the packed tokens as they are.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int
    key_L: Tensor | None

    @classmethod
    def of(cls, prefix_B: Tensor, lengths_U: Tensor, rest_B: Tensor) -> Segments:
        """From the prefix of each row, the prefixes' lengths (all 0: there are none), and what is left of each row."""
        if not lengths_U.any():
            ends, longest = _ends(rest_B), int(rest_B.max())
            return cls(ends, ends, longest, longest, None)
        queries, keys = torch.cat([lengths_U, rest_B]), torch.cat([lengths_U, lengths_U[prefix_B] + rest_B])
        own = torch.arange(int(queries.sum())).split(queries.tolist())
        prefixes, rests = own[: len(lengths_U)], own[len(lengths_U) :]
        rows = [part for u, rest in zip(prefix_B.tolist(), rests, strict=True) for part in (prefixes[u], rest)]
        key_L = torch.cat([*prefixes, *rows])
        return cls(_ends(queries), _ends(keys), int(queries.max()), int(keys.max()), key_L)

    def to(self, device: torch.device) -> Segments:
        ends = self.query_ends.to(device), self.key_ends.to(device)
        key_L = None if self.key_L is None else self.key_L.to(device)
        return Segments(*ends, self.longest_query, self.longest_key, key_L)


def _ends(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def takes_segments(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel is there for attention with these queries and values, whose last axis is a head's width."""
    narrow = query.dtype in (torch.bfloat16, torch.float16)
    fits = query.shape[-1] == value.shape[-1] <= WIDEST_HEAD
    return query.device.type == "cuda" and narrow and fits and _kernel() is not None


def attend_segments(
    query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, segments: Segments, window: int | None, scale: float | None
) -> Tensor:
    """Attention _LHD of the packed tokens; keys and values may have fewer heads. `window` counts the token itself."""
    if segments.key_L is not None:
        key_LHD, value_LHD = key_LHD.index_select(0, segments.key_L), value_LHD.index_select(0, segments.key_L)
    kernel, takes_groups = _kernel() or (None, False)
    assert kernel is not None
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if (groups := query_LHD.shape[1] // key_LHD.shape[1]) > 1:
        if takes_groups:
            options["enable_gqa"] = True
        else:
            key_LHD, value_LHD = (part.repeat_interleave(groups, dim=1) for part in (key_LHD, value_LHD))
    ends, longest = (segments.query_ends, segments.key_ends), (segments.longest_query, segments.longest_key)
    return kernel(query_LHD, key_LHD, value_LHD, *ends, *longest, **options)


@cache
def _kernel() -> tuple[Any, bool] | None:
    """torch's `varlen_attn` where it has windows (torch 2.11), and whether it takes grouped heads (2.12)."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    has = inspect.signature(varlen_attn).parameters
    return (varlen_attn, "enable_gqa" in has) if "window_size" in has else None

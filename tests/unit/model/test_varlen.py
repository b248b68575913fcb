"""The sequences that a packed batch is for a kernel of variable lengths, against plain attention row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pe_rlhf.model.fast.packing import Packing
from pe_rlhf.model.fast.varlen import Segments
from pe_rlhf.types import Sequences
from tests.tiny import pairs, ragged_sequences, with_system_prompt

HEADS, WIDTH = 2, 4


def plain(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Causal attention of one sequence, _QHD with _KHD, whose last query and last key are the same token."""
    behind = torch.arange(len(key)) - torch.arange(len(key) - len(query), len(key))[:, None]
    hidden = (behind > 0) | (behind <= -(window or 10**6))
    scores_HQK = torch.einsum("qhd,khd->hqk", query, key).masked_fill(hidden, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores_HQK.softmax(dim=-1), value)


def by_segments(values_LHD: list[Tensor], segments: Segments, window: int | None) -> Tensor:
    """What the kernel is documented to compute, sequence by sequence."""
    query, key, value = values_LHD
    if segments.key_L is not None:
        key, value = key[segments.key_L], value[segments.key_L]
    bounds = zip(segments.query_ends.tolist(), segments.query_ends.tolist()[1:], strict=False)
    reach = zip(segments.key_ends.tolist(), segments.key_ends.tolist()[1:], strict=False)
    parts = [
        plain(query[a:b], key[c:d], value[c:d], window) for (a, b), (c, d) in zip(bounds, reach, strict=True) if b > a
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("batch", [ragged_sequences, with_system_prompt, pairs], ids=lambda batch: batch.__name__)
def test_segments_attend_as_whole_rows_do(batch: object, window: int | None) -> None:
    sequences = batch()  # type: ignore[operator]
    assert isinstance(sequences, Sequences)
    packing = Packing.of(sequences, torch.device("cpu"))
    # Tokens of a shared prefix have the same values in every row: they follow from token and position.
    T = sequences.ids_BT.shape[1]
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, 64, T, HEADS, WIDTH, generator=generator)
    whole = [part[sequences.ids_BT, torch.arange(T)] for part in table]
    query, key, value = whole
    lengths = sequences.lengths_B.tolist()
    rows = [plain(query[b, :n], key[b, :n], value[b, :n], window) for b, n in enumerate(lengths)]
    expected_BTHD = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    packed = [packing.take(part) for part in whole]
    found_LHD = by_segments(packed, packing.segments, window)
    torch.testing.assert_close(found_LHD, packing.take(expected_BTHD))
    sizes = packing.segments.query_ends.diff(), packing.segments.key_ends.diff()
    assert [int(part.max()) for part in sizes] == [packing.segments.longest_query, packing.segments.longest_key]
    assert packing.segments.query_ends.dtype == torch.int32

"""Which tokens of a batch are computed, and where each of them stands."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pe_rlhf.model.fast.packing import Packing, common_length, find_prefixes
from pe_rlhf.types import Sequences
from tests.tiny import (
    PAD,
    SYSTEM,
    pairs,
    rows_of,
    with_system_prompt,
)


def rows_again(sequences: Sequences, packing: Packing) -> list[list[int]]:
    """The rows put together again from the packed tokens, through what attention does to put them side by side."""
    ids_L = packing.take(sequences.ids_BT)
    rest_L = ids_L[len(ids_L) - len(packing.rest) :]
    rests = [
        rest_L[place][real].tolist() for place, real in zip(packing.rest.place_BQ, packing.rest.real_BQ, strict=True)
    ]
    if (prefixes := packing.prefixes) is None:
        return rests
    starts = [ids_L[place][real].tolist() for place, real in zip(prefixes.place_BQ, prefixes.real_BQ, strict=True)]
    return [starts[u] + rest for u, rest in zip(packing.prefix_B.tolist(), rests, strict=True)]


def packed(sequences: Sequences) -> Packing:
    return Packing.of(sequences, torch.device("cpu"))


def test_the_common_start_by_hand() -> None:
    sequences = with_system_prompt()
    assert common_length(sequences) == 6
    packing = packed(sequences)
    assert packing.prefix_B.tolist() == [0, 0, 0]
    assert packing.row_L.tolist() == [0] * (6 + 7) + [1] * 8 + [2] * 5
    assert packing.column_L.tolist() == [*range(6), *range(6, 13), *range(6, 14), *range(6, 11)]
    assert packing.take(sequences.ids_BT).tolist() == [
        *SYSTEM, 5, 6, 7, 20, 21, PAD, 1, 8, 22, 23, 24, 25, 26, 27, 28, 9, 10, 11, 12, PAD
    ]  # fmt: skip
    assert rows_again(sequences, packing) == [prompt + response for prompt, response in rows_of(sequences)]


def test_equal_prompts_by_hand() -> None:
    sequences = pairs()
    prefix_B, lengths_U = find_prefixes(sequences)
    assert prefix_B.tolist() == [0, 1, 0, 1]
    assert lengths_U.tolist() == [7, 4]  # all of a prompt but its last token
    packing = packed(sequences)
    # The first token after the shorter prefix sees that and itself, not the three columns the longer one has more.
    mask_B1QK = packing.rest_mask(None)
    assert mask_B1QK is not None
    assert mask_B1QK[1, 0, 0].tolist() == [True] * 4 + [False] * 3 + [True] + [False] * 5
    assert rows_again(sequences, packing) == [prompt + response for prompt, response in rows_of(sequences)]


def test_the_last_prompt_token_is_never_in_a_prefix() -> None:
    same = Sequences.pack([[5, 6, 7, 8]] * 3, [[9, 9, 9]] * 3, PAD)
    assert common_length(same) == 3
    one_token = Sequences.pack([[5], [5]], [[9, 9], [9, 8]], PAD)
    assert common_length(one_token) == 0
    assert packed(one_token).prefixes is None


@pytest.mark.parametrize(("length", "shares"), [(1, False), (2, True)])
def test_a_prefix_has_to_be_worth_it(length: int, shares: bool) -> None:
    """Two rows of ten tokens: one token less to compute of 20 is not worth it, two are."""
    start = [7] * length
    sequences = Sequences.pack([[*start, 5], [*start, 6]], [[9] * (9 - length)] * 2, PAD)
    assert common_length(sequences) == length
    assert (packed(sequences).prefixes is not None) is shares


def test_a_row_alone_has_nothing_to_share() -> None:
    assert packed(with_system_prompt().take(torch.tensor([0]))).prefixes is None


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6), st.lists(st.integers(0, 2), max_size=8))
def test_rows_are_what_their_prefix_and_the_rest_say(rows: list[tuple[list[int], list[int]]], start: list[int]) -> None:
    sequences = Sequences.pack([start + prompt for prompt, _ in rows], [response for _, response in rows], pad_id=0)
    packing = packed(sequences)
    assert rows_again(sequences, packing) == [prompt + response for prompt, response in rows_of(sequences)]
    whole, tokens = int(sequences.lengths_B.sum()), len(packing.row_L)
    assert tokens == whole if packing.prefixes is None else tokens <= 0.9 * whole
    # What is asked for lies in the rest, in the batch's order.
    wanted_L = packing.take(sequences.predicts_BT)
    assert not wanted_L[: tokens - len(packing.rest)].any()
    places = list(zip(packing.row_L[wanted_L].tolist(), packing.column_L[wanted_L].tolist(), strict=True))
    assert places == [tuple(place) for place in sequences.predicts_BT.nonzero().tolist()]

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pe_rlhf.model.micro_batches import micro_batches
from pe_rlhf.types import Rollout, Sequences

PROMPTS = [[5, 6, 7], [8], [9, 10]]
RESPONSES = [[20, 21], [22, 23, 24, 0], [25]]  # 0 is also the pad id below: a real token may look like padding


def test_pack_puts_prompt_and_response_in_one_row_padded_on_the_right() -> None:
    sequences = Sequences.pack(PROMPTS, RESPONSES, pad_id=0)
    assert sequences.ids_BT.tolist() == [[5, 6, 7, 20, 21], [8, 22, 23, 24, 0], [9, 10, 25, 0, 0]]
    assert sequences.prompt_lengths_B.tolist() == [3, 1, 2]
    assert sequences.response_lengths_B.tolist() == [2, 4, 1]
    assert sequences.lengths_B.tolist() == [5, 5, 3]
    assert len(sequences) == 3


def test_masks_follow_from_lengths_not_from_the_pad_id() -> None:
    sequences = Sequences.pack(PROMPTS, RESPONSES, pad_id=0)
    assert sequences.mask_BR.tolist() == [
        [True, True, False, False],
        [True, True, True, True],
        [True, False, False, False],
    ]
    # The position before each response token predicts it.
    assert sequences.predicts_BT.tolist() == [
        [False, False, True, True, False],
        [True, True, True, True, False],
        [False, True, False, False, False],
    ]


def test_targets_are_the_response_tokens_row_after_row() -> None:
    assert Sequences.pack(PROMPTS, RESPONSES, pad_id=0).targets_N.tolist() == [20, 21, 22, 23, 24, 0, 25]


def test_take_picks_rows_in_that_order_and_cuts_to_the_longest() -> None:
    taken = Sequences.pack(PROMPTS, RESPONSES, pad_id=0).take(torch.tensor([2]))
    assert taken.ids_BT.tolist() == [[9, 10, 25]]
    assert taken.targets_N.tolist() == [25]
    taken = Sequences.pack(PROMPTS, RESPONSES, pad_id=0).take(torch.tensor([2, 0]))
    assert taken.ids_BT.tolist() == [[9, 10, 25, 0, 0], [5, 6, 7, 20, 21]]
    assert taken.targets_N.tolist() == [25, 20, 21]


ragged_lists = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), min_size=1, max_size=6),
        st.lists(st.integers(0, 9), min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=6,
)


@given(ragged_lists)
def test_everything_can_be_read_back(pairs: list[tuple[list[int], list[int]]]) -> None:
    prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
    sequences = Sequences.pack(prompts, responses, pad_id=0)
    assert sequences.targets_N.tolist() == [token for response in responses for token in response]
    for row, (prompt, response) in enumerate(pairs):
        predicting = sequences.predicts_BT[row].nonzero()[:, 0].tolist()
        assert predicting == [len(prompt) - 1 + t for t in range(len(response))]
        assert sequences.mask_BR[row].sum() == len(response)


def test_rollout_counts_tokens_and_knows_what_was_cut() -> None:
    rollout = Rollout(PROMPTS, RESPONSES, [[-1.0] * len(r) for r in RESPONSES], ["eos", "length", "eos"], version=3)
    assert rollout.tokens() == 7
    assert rollout.truncated_B.tolist() == [False, True, False]


def test_micro_batches_by_hand() -> None:
    # sorted: 7 (row 2), 5 (row 0), 5 (row 3), 2 (row 1), 1 (row 4); budget 10: 2 rows × 5 fit, 2 rows × 7 do not
    groups = micro_batches(torch.tensor([5, 2, 7, 5, 1]), token_budget=10, padded=True)
    assert [group.tolist() for group in groups] == [[2], [0, 3], [1, 4]]
    # Packed, 7, 5 + 5 and 2 + 1 fit; with a budget of 8 there are three groups as well: 7, 5 and 5 + 2 + 1.
    groups = micro_batches(torch.tensor([5, 2, 7, 5, 1]), token_budget=10, padded=False)
    assert [group.tolist() for group in groups] == [[2], [0], [3, 1, 4]]
    groups = micro_batches(torch.tensor([6, 2, 2]), token_budget=10, padded=False)
    assert [group.tolist() for group in groups] == [[0, 1, 2]]  # 3 × 6 with padding


@pytest.mark.parametrize("padded", [True, False])
def test_a_row_over_the_budget_is_a_group_of_its_own(padded: bool) -> None:
    groups = micro_batches(torch.tensor([30, 3, 40]), token_budget=10, padded=padded)
    assert [group.tolist() for group in groups] == [[2], [0], [1]]


def cost(lengths: list[int], padded: bool) -> float:
    """Tokens of a group; packed ones have half as much again of padding for free, in attention."""
    rectangle = len(lengths) * max(lengths)
    return rectangle if padded else max(sum(lengths), rectangle / 2)


def test_many_short_rows_do_not_pad_one_long_one_in_attention() -> None:
    groups = micro_batches(torch.tensor([600] + [20] * 21), token_budget=1024, padded=False)
    assert [len(group) for group in groups] == [1, 21]  # 1,020 tokens in all, but 22 × 600 in attention


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200), st.booleans())
def test_micro_batches_are_an_ordered_partition_within_the_budget(
    lengths: list[int], budget: int, padded: bool
) -> None:
    groups = [group.tolist() for group in micro_batches(torch.tensor(lengths), budget, padded=padded)]
    rows = [row for group in groups for row in group]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    costs = [cost([lengths[row] for row in group], padded) for group in groups]
    assert all(tokens <= budget or len(group) == 1 for tokens, group in zip(costs, groups, strict=True))
    # As few groups as where each takes in what it can, and the largest of them as small as that many groups can be.
    assert len(groups) == greedy(lengths, budget, padded)
    assert max(costs) <= max(lengths) or greedy(lengths, max(costs) - 1, padded) > len(groups)


def greedy(lengths: list[int], budget: float, padded: bool) -> int:
    """Into how many groups rows fall that are taken from the longest on and put together while they fit."""
    groups: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        if groups and cost([*groups[-1], length], padded) <= budget:
            groups[-1].append(length)
        else:
            groups.append([length])
    return len(groups)


@pytest.mark.parametrize("padded", [True, False])
def test_groups_are_of_like_size(padded: bool) -> None:
    # Ten rows of 10 fit into two groups of at most 90 tokens, nine and one; five and five do as well.
    groups = micro_batches(torch.full((10,), 10), token_budget=90, padded=padded)
    assert [len(group) for group in groups] == [5, 5]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.integers(1, 30), st.booleans())
def test_rows_of_one_length_keep_their_order(lengths: list[int], budget: int, padded: bool) -> None:
    groups = micro_batches(torch.tensor(lengths), budget, padded=padded)
    assert torch.cat(groups).tolist() == sorted(range(len(lengths)), key=lambda row: -lengths[row])

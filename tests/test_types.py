import torch
from hypothesis import given
from hypothesis import strategies as st

from pe_rlhf.types import Rollout, Sequences, micro_batches

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
    groups = micro_batches(torch.tensor([5, 2, 7, 5, 1]), token_budget=10)
    assert [group.tolist() for group in groups] == [[2], [0, 3], [1, 4]]


def test_a_row_over_the_budget_is_a_group_of_its_own() -> None:
    groups = micro_batches(torch.tensor([30, 3, 40]), token_budget=10)
    assert [group.tolist() for group in groups] == [[2], [0], [1]]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_micro_batches_are_an_ordered_partition_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = [group.tolist() for group in micro_batches(torch.tensor(lengths), budget)]
    rows = [row for group in groups for row in group]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    for group in groups:
        assert len(group) * max(lengths[row] for row in group) <= budget or len(group) == 1
    # As few groups as where each takes in what it can, and the largest of them as small as that many groups can be.
    assert len(groups) == greedy(lengths, budget)
    largest = max(len(group) * lengths[group[0]] for group in groups)
    assert largest <= max(lengths) or greedy(lengths, largest - 1) > len(groups)


def greedy(lengths: list[int], budget: int) -> int:
    """Into how many groups rows fall that are taken from the longest on and put together while they fit."""
    groups, size, longest = 0, 0, 0
    for length in sorted(lengths, reverse=True):
        size += 1
        if groups == 0 or size * longest > budget:
            groups, size, longest = groups + 1, 1, length
    return groups


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=20), st.integers(1, 120))
def test_rows_of_two_parts_are_padded_part_by_part(parts: list[tuple[int, int]], budget: int) -> None:
    groups = [group.tolist() for group in micro_batches(torch.tensor(parts), budget)]
    assert sorted(row for group in groups for row in group) == list(range(len(parts)))
    for group in groups:
        padded = max(parts[row][0] for row in group) + max(parts[row][1] for row in group)
        assert len(group) * padded <= budget or len(group) == 1


def test_groups_are_of_like_size() -> None:
    # Ten rows of 10 fit into two groups of at most 90 tokens, nine and one; five and five do as well.
    assert [len(group) for group in micro_batches(torch.full((10,), 10), token_budget=90)] == [5, 5]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.integers(1, 30))
def test_rows_of_one_length_keep_their_order(lengths: list[int], budget: int) -> None:
    rows = [row for group in micro_batches(torch.tensor(lengths), budget) for row in group.tolist()]
    assert rows == sorted(range(len(lengths)), key=lambda row: -lengths[row])

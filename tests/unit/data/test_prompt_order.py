"""The order of prompts: passes, and that a step's batch follows from its number only."""

from __future__ import annotations

from collections import Counter

from pe_rlhf.data.prompt_order import PromptOrder, PromptSet

PROMPTS = [f"prompt {i}" for i in range(10)]
IDS = [[100 + i] for i in range(10)]


def order(batch_size: int, samples: int = 1, seed: int = 0) -> PromptOrder:
    return PromptOrder(PromptSet(list(PROMPTS), IDS, {"number": list(range(len(PROMPTS)))}), batch_size, samples, seed)


def drawn(prompts: PromptOrder, steps: int) -> list[str]:
    return [str(prompt) for step in range(steps) for prompt in prompts.batch(step).prompts]


def test_each_prompt_comes_once_in_a_pass() -> None:
    """Batches of 4 run over the end of a pass of 10: the passes count, not the batches."""
    sequence = drawn(order(4), steps=15)
    assert len(sequence) == 60
    passes = [sequence[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(one) == PROMPTS for one in passes)
    assert len({tuple(one) for one in passes}) == 6  # each pass is shuffled anew
    assert PROMPTS not in passes


def test_a_batch_follows_from_its_step_alone() -> None:
    one_after_the_other = order(3)
    batches = [one_after_the_other.batch(step) for step in range(9)]
    assert order(3).batch(7) == batches[7]
    assert [one_after_the_other.batch(step) for step in (8, 2, 7)] == [batches[8], batches[2], batches[7]]


def test_the_seed_decides_the_order() -> None:
    assert drawn(order(5), 4) == drawn(order(5), 4)
    assert drawn(order(5), 4) != drawn(order(5, seed=1), 4)


def test_samples_of_a_prompt_stand_together() -> None:
    one, three = order(4), order(4, samples=3)
    for step in range(4):
        assert three.batch(step).prompts == [prompt for prompt in one.batch(step).prompts for _ in range(3)]


def test_a_batch_larger_than_the_data_takes_some_prompts_again() -> None:
    batch = order(25).batch(0)
    assert Counter(Counter(map(str, batch.prompts)).values()) == {3: 5, 2: 5}
    assert Counter(Counter(drawn(order(25), 2)).values()) == {5: 10}


def test_text_and_ids_belong_together() -> None:
    for step in range(5):
        batch = order(7, samples=2).batch(step)
        assert [PROMPTS[number] for number in batch.columns["number"]] == batch.prompts
        assert batch.ids == [IDS[PROMPTS.index(str(prompt))] for prompt in batch.prompts]

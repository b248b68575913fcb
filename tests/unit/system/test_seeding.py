import contextlib
import hashlib
import random

import torch

from pe_rlhf.system.seeding import derive_seed, permutation, seeded


def test_derived_seed_is_a_fixed_function_of_its_text() -> None:
    # 63 bits of SHA-256("7/rollout/3"): the same in every process and in every release, or runs could not be resumed.
    expected = int(hashlib.sha256(b"7/rollout/3").hexdigest()[:16], 16) // 2
    assert derive_seed(7, "rollout", 3) == expected
    assert derive_seed(0) == 3456079177858693020  # SHA-256("0")


def test_every_purpose_has_its_own_seed() -> None:
    purposes = [
        (seed, name, step) for seed in range(5) for name in ("rollout", "order", "policy") for step in range(20)
    ]
    assert len({derive_seed(*purpose) for purpose in purposes}) == len(purposes)
    assert all(0 <= derive_seed(*purpose) < 2**63 for purpose in purposes)


def test_a_seeded_block_repeats_and_leaves_the_generator_outside_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    with seeded(1, "rollout", 5):
        one = torch.rand(3)
    with seeded(1, "rollout", 5):
        two = torch.rand(3)
    with seeded(1, "rollout", 6):
        other = torch.rand(3)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)


def test_the_generator_is_put_back_after_an_exception() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with contextlib.suppress(RuntimeError), seeded(1, "rollout"):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.rand(1), expected)


def test_permutation_is_a_repeatable_order_of_its_own_per_purpose() -> None:
    order = permutation(50, 3, "order", 1)
    assert sorted(order) == list(range(50))
    assert order != list(range(50))
    torch.rand(5)
    random.seed(1)
    assert permutation(50, 3, "order", 1) == order
    assert permutation(50, 3, "order", 2) != order
    assert permutation(50, 4, "order", 1) != order

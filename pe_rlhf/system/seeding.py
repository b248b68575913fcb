"""Seeds derived from a recipe's seed and what they are for.

Nothing keeps a generator's state from step to step: whatever is random at step n follows from (seed, purpose, n). So a
run resumed at step n draws what the uninterrupted run drew, on any number of processes.

Seeds and the reading of data need no torch, so it is imported by what does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for a purpose, independent of every other purpose's."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Run a block with torch's global generators seeded for a purpose; they are put back afterwards."""
    import torch

    with torch.random.fork_rng(current_gpu()):
        torch.manual_seed(derive_seed(seed, *purpose))
        yield


def current_gpu() -> list[int]:
    """The GPU of this process, for `fork_rng`, which would otherwise keep the states of all that are visible."""
    import torch

    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def permutation(n: int, seed: int, *purpose: str | int) -> list[int]:
    """A random order of n things for a purpose."""
    import torch

    generator = torch.Generator().manual_seed(derive_seed(seed, *purpose))
    return torch.randperm(n, generator=generator).tolist()

"""Which of several training processes this is, from what the launcher has set; without torch."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def accelerator_environment() -> dict[str, str]:
    """DeepSpeed guesses the accelerator from what is installed; without a GPU it is to be the CPU."""
    import torch

    return {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}


def openmp_environment() -> dict[str, str]:
    """How OpenMP's threads wait for each other; to be set before torch is imported.

    A thread that spins for about a millisecond and then sleeps makes a PPO step on two cores a tenth faster than one
    that sleeps at once. Beside other ranks on the machine it would take their time, and make all of them slower.
    """
    return {"OMP_WAIT_POLICY": "passive"} if launched() else {"GOMP_SPINCOUNT": "20000"}


def is_main() -> bool:
    """Whether this process is the one that writes files and talks to people: rank 0, or the only one."""
    return not launched() or os.environ["RANK"] == "0"

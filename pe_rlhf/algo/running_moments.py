"""Mean and deviation of all numbers so far, exact in any cut into batches up to fp64's rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-8  # a deviation below this share of the mean is rounding: numbers that are all the same


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean, and the sum of squared distances from the mean (Chan et al. 1979, eq. 2.1)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_batch(self, values_B: Tensor) -> RunningMoments:
        """The moments of the numbers so far and these."""
        own = values_B.double()
        n = own.numel()
        if n == 0:
            return self
        count, mean = self.count + n, own.mean().item()
        apart = mean - self.mean
        squares = self.squares + (own - mean).square().sum().item() + apart**2 * self.count * n / count
        return RunningMoments(count, self.mean + apart * n / count, squares)

    @property
    def deviation(self) -> float:
        """The population's; 1 where all numbers are the same, so that nothing is divided by rounding."""
        found = math.sqrt(self.squares / self.count) if self.count else 0.0
        return found if found > SMALLEST * max(1.0, abs(self.mean)) else 1.0

    def normalise(self, values_B: Tensor) -> Tensor:
        """(x − mean) / deviation _B, fp32."""
        return ((values_B.double() - self.mean) / self.deviation).to(torch.float32)

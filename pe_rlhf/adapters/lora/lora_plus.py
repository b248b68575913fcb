"""LoRA+ (arXiv 2402.12354): B learns faster than A, by a ratio, whatever the init."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def learning_rate_groups(
    parameters: Mapping[str, nn.Parameter], ratio: float
) -> list[tuple[float, dict[str, nn.Parameter]]]:
    """The parameters of a role, by the factor of their learning rate: `ratio` for every B, 1 for the rest.

    Where the ratio is 1 there is one group, in the order given.
    """
    if ratio == 1:
        return [(1.0, dict(parameters))]
    fast = {name: parameter for name, parameter in parameters.items() if _is_b(name)}
    rest = {name: parameter for name, parameter in parameters.items() if name not in fast}
    return [(factor, group) for factor, group in ((1.0, rest), (ratio, fast)) if group]


def _is_b(name: str) -> bool:
    """The factor behind the bottleneck, by its name in `Backbone.role_parameters`."""
    return name.endswith(".lora_B")

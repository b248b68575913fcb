"""The tensors of modules by name: as a saved state has them, and back into place."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the prefix in front of each name."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def unique_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module's state by name; one that has two names (tied embeddings) is there under the first."""
    seen: set[int] = set()
    return {n: t for n, t in module.state_dict().items() if not (t.data_ptr() in seen or seen.add(t.data_ptr()))}


def refuse_others(state: dict[str, Tensor], modules: Iterable[str]) -> None:
    """Raise ValueError where a saved state has a tensor that no module has."""
    known = tuple(f"{module}." for module in modules)
    if strangers := [name for name in state if not name.startswith(known)]:
        raise ValueError(f"there is no place for {strangers[0]}")


def set_tensors(own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copy a saved state into the tensors that it was saved from. Raises ValueError where they are others."""
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in state.items()}:
        raise ValueError("the names or shapes of the tensors differ")
    for name, tensor in own.items():
        tensor.copy_(state[name])

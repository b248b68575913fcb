"""What a process knows of the others. Without torch.distributed there is one, and every sum is its own.

All processes call these functions in the same order. Rows of a batch are dealt out like cards: rank k has k, k + N, …
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pe_rlhf.system.failures import ElsewhereError, TrainingError
from pe_rlhf.system.processes import is_main, launched

T = TypeVar("T")


def world_size() -> int:
    """The number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def leave_group() -> None:
    """End this rank's part in the group: its threads can abort an interpreter that ends with them still there."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def late_rank(error: BaseException) -> TrainingError | None:
    """The failure that another rank has not come within `rank_timeout`, where that is what an error says."""
    # gloo has no class for it; the store of the first contact has, for all that can go wrong there.
    late = isinstance(error, dist.DistStoreError) or "Timed out waiting" in str(error)
    if not (late and isinstance(error, RuntimeError) and launched()):
        return None
    return TrainingError(
        f"another process did not come within rank_timeout: {' '.join(str(error).split())}",
        kind="process",
        key="rank_timeout",
        fix="see what the other processes said; raise rank_timeout if they only need longer, and go on with --resume",
    )


def own_rows(count: int) -> list[int]:
    """This rank's rows of a batch of that many."""
    return list(range(count))[rank() :: world_size()]


def all_rows(own: Sequence[T], count: int) -> list[T]:
    """The whole batch, in order, from what each rank has of it; the inverse of `own_rows`."""
    shares = from_each_rank(list(own))
    return [shares[row % world_size()][row // world_size()] for row in range(count)]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, the same on each."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def sum_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Each metric summed over all ranks, which have the same names in the same order."""
    totals = sum_over_ranks(torch.tensor(list(metrics.values()), dtype=torch.float64))
    return dict(zip(metrics, totals.tolist(), strict=True))


def concat_over_ranks(tensor_N: Tensor) -> Tensor:
    """The ranks' tensors one after the other; each may have its own length."""
    return tensor_N if world_size() == 1 else torch.cat(from_each_rank(tensor_N.detach().cpu()))


def on_main(function: Callable[[], T]) -> T:
    """What a function gives on rank 0, on every rank; where it raises there, the others raise `ElsewhereError`."""
    if world_size() == 1:
        return function()
    if not is_main():
        result, failed = from_main((None, ""))
        if failed:
            raise ElsewhereError(failed)
        return result  # type: ignore[return-value]  # rank 0 has sent what its function gave
    try:
        result = function()
    except Exception as error:
        from_main((None, str(error) or type(error).__name__))  # not the error itself: not every one can be sent
        raise
    return from_main((result, ""))[0]


def max_over_ranks(value: int) -> int:
    """The largest of the ranks' numbers."""
    if world_size() == 1:
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)


def from_main(value: T) -> T:
    """What rank 0 has."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_each_rank(value: T) -> list[T]:
    """What each rank has, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def is_sharded(module: nn.Module) -> bool:
    """Whether ZeRO-3 has split the module's own parameters over the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def make_whole(module: nn.Module) -> list[Any]:
    """Gather the parameters of a module that ZeRO-3 has split; every rank calls it. Returns those that were not whole.

    `split_again` undoes it.
    """
    every: list[Any] = list(module.parameters())
    parts = [p for p in every if hasattr(p, "ds_id") and p.ds_status.name != "AVAILABLE"]
    for part in parts:
        if part.ds_status.name == "INFLIGHT":  # fetched ahead by a pass that did not come to it
            part.in_flight.pop(part).wait()
    if parts:
        parts[0].all_gather(param_list=parts)  # methods that DeepSpeed gives the parameters it splits
    return parts


def split_again(parts: list[Any]) -> None:
    """Leave each rank its part of the parameters that `make_whole` has gathered."""
    if parts:
        parts[0].partition(param_list=parts, has_been_updated=False)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within it the parameters of a module that ZeRO-3 has split are whole, to be read; every rank enters it.

    Those that are whole already, in an outer block or a pass, stay so after it.
    """
    parts = make_whole(module)
    try:
        yield
    finally:
        split_again(parts)

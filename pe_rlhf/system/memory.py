"""Memory that a stage needed."""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import suppress
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """Start measuring a stage: give back what the one before freed, and forget its peak where the system can."""
    gc.collect()
    give_memory_back()
    with suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what torch keeps for itself is missing to a vLLM engine on the same card
        torch.cuda.reset_peak_memory_stats()


def give_memory_back() -> None:
    """Return what was freed to the system, where glibc holds it in pieces that are too small for the next pass."""
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory() -> dict[str, float]:
    """`peak_rss_mib`, the process's largest resident memory, and `peak_cuda_mib` where there is a GPU."""
    peak = {"peak_rss_mib": round(_peak_rss_mib(), 1)}
    if torch.cuda.is_available():
        peak["peak_cuda_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU, or the machine, has no memory left."""
    # torch has no class of its own for the CPU's allocator.
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _peak_rss_mib() -> float:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

"""Memory of a device and of its host: what is taken, what is free."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HOST_SHARE = 0.25
"""Of the host's memory, what may hold what blocks save: pinned, nobody else can have it."""
GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much of it a container may take."""


def resident_bytes(parameters: Sequence[Tensor], buffers: Iterable[Tensor], device: torch.device) -> int:
    """Bytes taken now: on a GPU what its allocator has given out, elsewhere the model and its gradients."""
    if device.type == "cuda":
        return _stats(device)("allocated_bytes")
    held = [*parameters, *buffers, *(p.grad for p in parameters if p.grad is not None)]
    storages = [here(t).untyped_storage() for t in held]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def here(tensor: Tensor) -> Tensor:
    """This process' part of a sharded tensor; else itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: free on the device, or held by torch's allocator and not given out."""
    if device.type != "cuda":
        return 2**62
    free, _ = torch.cuda.mem_get_info(device)
    stats = _stats(device)
    return free + stats("reserved_bytes") - stats("allocated_bytes")


def peak_bytes(device: torch.device) -> int | None:
    """The most that torch's allocator has given out since its statistics began; None where there are none."""
    return _stats(device)("allocated_bytes", "peak") if device.type == "cuda" else None


def _stats(device: torch.device) -> Callable[..., int]:
    """Figures of torch's allocator, by what they are of and when. ``torch.cuda.memory_allocated`` sorts all of them first,
    while a step waits."""
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    return lambda what, when="current": stats[what]["all"][when] if stats else 0


@cache
def host_memory() -> int:
    """Bytes of the host's memory that may be pinned for what blocks save."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *map(_limit, GROUP_LIMITS)]
    return int(HOST_SHARE * min(n for n in limits if n is not None))


def _limit(path: str) -> int | None:
    """What a file of a control group says; None where it is absent, or sets no limit."""
    file = Path(path)
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None

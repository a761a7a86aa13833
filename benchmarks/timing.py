"""Times a call: by events on a CUDA device, by the clock on a CPU. Medians, after a warm-up, over rotating inputs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

FEW, MANY = 5, 64
"""Calls that are queued at a time: few enough for the driver's queue to hold all their launches."""

LONG_ENOUGH = 2000.0
"""Microseconds of a batch in which the microsecond or two of its events no longer counts."""

BATCHES = 5
"""At least, for a median."""

CYCLES_PER_SECOND = 2e9
"""At least the clock of today's devices: a wait of so many cycles lasts a second or longer."""

LONGEST_LEAD = 0.1
"""Seconds of waiting in front of a batch, beyond which the call is taken to synchronize by itself."""


@dataclass(frozen=True)
class Timing:
    """Medians of one call.

    ``us``: time on the device; ``host_us``: time for which the host was busy with it; ``host_bound``: the device waited
    for the host, so that ``us`` holds time in which nothing ran.
    """

    us: float
    host_us: float
    host_bound: bool


def size_of(values: Any) -> int:
    """Bytes of all tensors in a nest of containers."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))


MOST_SETS = 64
"""Tiny inputs, such as those of an empty launch, need not fill the cache."""


def rotation(one: Any, device: torch.device) -> int:
    """How many sets of inputs as large as ``one`` to use in turn, so that none is still in the cache when it is due."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_SETS, max(2, math.ceil(2 * cache / max(size_of(one), 1)) + 1))


def measure(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 20, warmup: int = 3) -> Timing:
    """Times ``calls`` in turn, ``repeats`` in all; they do the same thing on different inputs."""
    for i in range(max(warmup, len(calls))):
        calls[i % len(calls)]()
    return _on_cuda(calls, repeats) if device.type == "cuda" else _on_cpu(calls, repeats)


def _on_cpu(calls: Sequence[Callable[[], Any]], repeats: int) -> Timing:
    samples = []
    for i in range(repeats):
        started = time.perf_counter()
        calls[i % len(calls)]()
        samples.append(time.perf_counter() - started)
    microseconds = statistics.median(samples) * 1e6
    return Timing(microseconds, microseconds, host_bound=False)


def _on_cuda(calls: Sequence[Callable[[], Any]], repeats: int) -> Timing:
    """Each batch is queued behind a wait, so that the host is ahead and no event waits for a launch. A sample is the mean of a
    batch, whose calls follow each other as they do in a model: events around every single one would add to its time."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    calls[0]()
    once = time.perf_counter() - started
    roughly, *_ = _batch(calls, 0, FEW, _lead(FEW, once))
    size = max(FEW, min(MANY, int(LONG_ENOUGH / max(roughly, 1.0))))
    lead = _lead(size, once)
    device_us: list[float] = []
    host_us: list[float] = []
    host_bound = False
    while len(device_us) < max(BATCHES, math.ceil(repeats / size)):
        sample, host, ahead = _batch(calls, len(device_us) * size, size, lead)
        if not ahead and lead < LONGEST_LEAD:
            lead *= 2
            continue
        device_us.append(sample)
        host_us.append(host)
        host_bound |= not ahead
    return Timing(statistics.median(device_us), statistics.median(host_us), host_bound)


def _lead(size: int, once: float) -> float:
    """Seconds in which the host is done with so many calls, of which one took it ``once``."""
    return 2e-3 + 2 * size * once


def _batch(calls: Sequence[Callable[[], Any]], first: int, size: int, lead: float) -> tuple[float, float, bool]:
    """Microseconds a call on the device, and on the host, and whether all was queued before the first call began."""
    waited, start, end = torch.cuda.Event(), torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(lead * CYCLES_PER_SECOND))
    waited.record()
    started = time.perf_counter()
    start.record()
    for i in range(first, first + size):
        calls[i % len(calls)]()
    end.record()
    host = (time.perf_counter() - started) / size
    ahead = not waited.query()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / size, host * 1e6, ahead

"""What a device does in a second, measured once a process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

_CALLS = 10


@dataclass(frozen=True)
class Rates:
    """Bytes a second that a copy reads and writes, floating-point operations a second of a matrix product, bytes a second
    to the host's pinned memory (0: there is no other memory to go to), and seconds that a call takes at least."""

    copy: float
    product: float
    host: float
    call: float


@cache
def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Of ``device`` for products of ``dtype``; takes some 50 ms."""
    cuda = device.type == "cuda"
    size, side = (2**27, 4096) if cuda else (2**24, 512)
    with torch.no_grad():
        source = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
        target = torch.empty_like(source)
        factor = torch.randn(side, side, dtype=torch.float32, device=device).to(dtype)
        copy = 2 * size / _seconds(lambda: target.copy_(source), device)
        product = 2 * side**3 / _seconds(lambda: factor @ factor, device)
        small = source[:16]
        # at its best: others may be busy on the host for a moment
        call = min(_seconds(lambda: small.neg(), device) for _ in range(5))
        host = 0.0
        if cuda:
            pinned = torch.empty(size // dtype.itemsize, dtype=dtype, pin_memory=True)
            host = size / _seconds(lambda: pinned.copy_(source, non_blocking=True), device)
    return Rates(copy, product, host, call)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, the median of three rounds."""
    call()
    rounds = []
    for _ in range(3):
        _wait(device)
        started = time.perf_counter()
        for _ in range(_CALLS):
            call()
        _wait(device)
        rounds.append((time.perf_counter() - started) / _CALLS)
    return sorted(rounds)[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

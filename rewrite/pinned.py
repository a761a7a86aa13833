"""Page-locked memory of the host, as copies need it that run beside the computation."""

from __future__ import annotations

import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from mmap import PAGESIZE
from typing import Any

import torch
from torch import Tensor

LARGE = 2**25
"""Bytes from which it takes longer to find pages than to call the driver once more."""

SLAB = 2**29
"""Bytes that are locked ahead at a time: in some 70 ms, for several tensors of a block."""

ALIGNMENT = 512
"""Bytes; where torch's allocators begin a tensor, too."""


class PinnedPool:
    """Locked memory for tensors that come and go, to be used again by others of as many bytes.

    It is the pool's for as long as there is a pool: who holds one of its tensors must hold the pool.

    Args:
        device: that copies go to and come from.
    """

    def __init__(self, device: torch.device) -> None:
        self._free: dict[int, list[Tensor]] = {}
        self._owned: list[Tensor] = []
        self._open: list[Tensor] = []
        """What is left of slabs."""
        self._coming: deque[Future[Tensor]] = deque()
        self._reserved = 0
        self._worker = ThreadPoolExecutor(1, "weft-pinned", _begin, (device,))

    def reserve(self, size: int, largest: int) -> None:
        """So many bytes will be taken in all, no more than ``largest`` for one tensor: they are locked by a thread of their own,
        while the first step is traced."""
        slab = max(SLAB, largest)
        while size - self._reserved >= LARGE:
            part = min(slab, max(size - self._reserved, largest))
            self._coming.append(self._worker.submit(pinned, part))
            self._reserved += part

    def take(self, like: Tensor) -> Tensor:
        """A tensor of the shape, dtype and strides of ``like`` in the host's memory, locked there. What it holds is undefined.

        Raises:
            torch.cuda.CudaError: the system does not lock as much.
        """
        form = torch.empty_like(like, device="meta")
        free = self._free.get(form.nbytes)
        place = _bytes(free.pop()) if free else self._new(form.nbytes)
        return place.view(form.dtype).as_strided(form.shape, form.stride())

    def give(self, tensor: Tensor) -> None:
        """``tensor``, which was taken, may be written by others."""
        self._free.setdefault(tensor.nbytes, []).append(tensor)

    def _new(self, size: int) -> Tensor:
        while True:
            for i, slab in enumerate(self._open):
                if size <= len(slab):
                    self._open[i] = slab[-(-size // ALIGNMENT) * ALIGNMENT :]
                    return slab[:size]
            if not self._coming:
                self._owned.append(pinned(size))
                return self._owned[-1]
            self._owned.append(self._coming.popleft().result())
            self._open.append(self._owned[-1])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def pinned(size: int) -> Tensor:
    """So many bytes of the host's memory, locked there for as long as this very tensor lives.

    The driver, asked for locked memory as ``torch.empty(pin_memory=True)`` does, has the system find page after page, at some
    2 GB/s, and torch asks for the next power of two. Here all cores have found the pages of a large tensor before they are
    locked.

    Raises:
        torch.cuda.CudaError: the system does not lock as much.
    """
    if size < LARGE:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    whole = -(-size // PAGESIZE) * PAGESIZE
    pages = torch.empty(whole + PAGESIZE, dtype=torch.uint8).zero_()
    start = -pages.data_ptr() % PAGESIZE  # whole pages: no other tensor shares one
    made = pages[start : start + size]
    address = made.data_ptr()
    torch.cuda.check_error(_runtime().cudaHostRegister(address, whole, 0))
    # not when Python ends: the driver has let go of all by then
    weakref.finalize(made, _unlock, address, pages).atexit = False
    return made


def _begin(device: torch.device) -> None:
    """A thread begins on the first device, and would start that."""
    torch.cuda.set_device(device)


def _runtime() -> Any:
    return torch.cuda.cudart()


def _unlock(address: int, pages: Tensor) -> None:
    """``pages`` are there until then, and until the copies that are under way are over."""
    torch.cuda.synchronize()
    torch.cuda.check_error(_runtime().cudaHostUnregister(address))

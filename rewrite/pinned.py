"""Page-locked memory of the host, as copies need it that run beside the computation."""

from __future__ import annotations

import weakref
from mmap import PAGESIZE
from typing import Any

import torch
from torch import Tensor

LARGE = 2**25
"""Bytes from which it takes longer to find pages than to call the driver once more."""


def pinned_like(like: Tensor) -> Tensor:
    """A tensor of the shape, dtype and strides of ``like`` in the host's memory, locked there. What it holds is undefined.

    The driver, asked for locked memory as ``torch.empty(pin_memory=True)`` does, has the system find page after page, at some
    2 GB/s, and torch asks for the next power of two. Here all cores have found the pages of a large tensor before they are
    locked.

    Raises:
        torch.cuda.CudaError: the system does not lock as much.
    """
    if like.nbytes < LARGE:
        return torch.empty_like(like, device="cpu", pin_memory=True)
    form = torch.empty_like(like, device="meta")
    size = -(-form.untyped_storage().nbytes() // PAGESIZE) * PAGESIZE
    pages = torch.empty(size + PAGESIZE, dtype=torch.uint8).zero_()
    start = -pages.data_ptr() % PAGESIZE  # whole pages: no other tensor shares one
    made = pages[start : start + size].view(like.dtype).as_strided(form.shape, form.stride())
    address = made.data_ptr()
    torch.cuda.check_error(_runtime().cudaHostRegister(address, size, 0))
    # not when Python ends: the driver has let go of all by then
    weakref.finalize(made, _unlock, address, pages).atexit = False
    return made


def _runtime() -> Any:
    return torch.cuda.cudart()


def _unlock(address: int, pages: Tensor) -> None:
    """``pages`` are there until then, and until the copies that are under way are over."""
    torch.cuda.synchronize()
    torch.cuda.check_error(_runtime().cudaHostUnregister(address))

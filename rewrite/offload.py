"""Keeps an activation in the host's memory between forward and backward.

Copies go over a stream of their own, beside the computation. No tensor is marked as used by that stream: the allocator would
hold it until it sees the copy done, and since the host runs ahead of the device by many blocks, all would be held. Instead the
computation waits, two blocks later, for the copy to be over, and what it then frees is free at once. The backward of one block
begins the copy for the block that comes after it. All copies are in order on their stream: a pinned buffer may be written again
as soon as the copy out of it has been queued.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

IN_FLIGHT = 2
"""Copies to the host that the computation may be ahead of."""


class HostStore:
    """The offloaded activations of one model, in the order of its blocks."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._free: dict[tuple[Any, ...], list[Tensor]] = {}
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._waiting: list[weakref.ref[Offloaded]] = []

    def offloading(self, activation: Tensor) -> AbstractContextManager[Any]:
        """While entered, ``activation`` is saved for a backward in the host's memory; what else is saved stays."""
        # what is saved holds on to the hooks, which must not hold on to the activation
        address, shape = activation.data_ptr(), activation.shape

        def pack(saved: Tensor) -> Any:
            return self._out(saved) if (saved.data_ptr(), saved.shape) == (address, shape) else saved

        return saved_tensors_hooks(pack, lambda kept: kept.back() if isinstance(kept, Offloaded) else kept)

    def _out(self, saved: Tensor) -> Offloaded:
        free = self._free.setdefault((saved.shape, saved.dtype), [])
        buffer = free.pop() if free else torch.empty(saved.shape, dtype=saved.dtype, pin_memory=True)
        current = torch.cuda.current_stream(saved.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            buffer.copy_(saved, non_blocking=True)
            gone = self._stream.record_event()
        self._leaving.append((saved.detach(), gone))
        self._let_go(current, IN_FLIGHT)
        kept = Offloaded(self, buffer, saved.device)
        self._waiting.append(weakref.ref(kept))
        return kept

    def _let_go(self, current: torch.cuda.Stream, ahead: int) -> None:
        """Free what has been copied, but for the last ``ahead``."""
        while len(self._leaving) > ahead:
            _, gone = self._leaving.popleft()
            current.wait_event(gone)

    def fetch(self, kept: Offloaded) -> Tensor:
        """``kept`` on the device again, and the copy of the one before it begun."""
        current = torch.cuda.current_stream(kept.device)
        self._let_go(current, 0)
        tensor, arrived = kept.start(self._stream)
        current.wait_event(arrived)
        self._waiting = [r for r in self._waiting if r() is not None and r() is not kept]
        before = self._waiting[-1]() if self._waiting else None
        if before is not None:
            before.start(self._stream)
        return tensor

    def release(self, buffer: Tensor) -> None:
        """``buffer`` may be written again."""
        self._free[buffer.shape, buffer.dtype].append(buffer)


class Offloaded:
    """One activation in the host's memory."""

    def __init__(self, store: HostStore, buffer: Tensor, device: torch.device) -> None:
        self.buffer = buffer
        self.device = device
        self._store = store
        self._arriving: tuple[Tensor, Any] | None = None

    def start(self, stream: torch.cuda.Stream) -> tuple[Tensor, Any]:
        """The tensor that the copy back goes to, and its end; begun unless it has been."""
        if self._arriving is None:
            # of the computation's own memory, so that freeing it is in its order
            tensor = torch.empty(self.buffer.shape, dtype=self.buffer.dtype, device=self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                tensor.copy_(self.buffer, non_blocking=True)
                self._arriving = tensor, stream.record_event()
        return self._arriving

    def back(self) -> Tensor:
        """On the device, for the backward."""
        tensor = self._store.fetch(self)
        self._arriving = None
        return tensor

    def __del__(self) -> None:
        self._store.release(self.buffer)

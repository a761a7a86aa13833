"""Keeps what blocks save in the host's memory between forward and backward: their inputs, or all that is large.

Copies go over a stream of their own, beside the computation. No tensor is marked as used by that stream: the allocator would
hold it until it sees the copy done, and since the host runs ahead of the device by many blocks, all would be held. Instead the
computation waits, when the next block has something to copy, for these copies to be over, and what it then frees is free at
once. The backward of one block begins the copies for those that come after it. All copies are in order on their stream: a
pinned buffer may be written again as soon as the copy out of it has been queued.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .pinned import PinnedPool

LARGE = 2**20
"""Bytes below which a tensor stays: it frees little, and launching its copies takes as long as a large one's."""


class Group:
    """What one call of a block has in the host's memory.

    Attributes:
        going: what is still to be copied there, and where to.
    """

    def __init__(self) -> None:
        self.going: list[tuple[Tensor, Tensor]] = []
        self._items: list[weakref.ref[Offloaded]] = []

    def add(self, item: Offloaded) -> None:
        """It is saved."""
        self._items.append(weakref.ref(item))

    @property
    def items(self) -> list[Offloaded]:
        """Those that a backward may still ask for."""
        return [item for ref in self._items if (item := ref()) is not None]


class HostStore:
    """What one model has in the host's memory, in the order of its blocks.

    Attributes:
        ahead: blocks whose copies to the host the computation may be ahead of, and whose copies back are begun before they are
            needed.
    """

    def __init__(self, device: torch.device, ahead: int = 1) -> None:
        self.ahead = ahead
        self._stream = torch.cuda.Stream(device)
        self._pool = PinnedPool(device)
        self._leaving: deque[tuple[list[Tensor], Any]] = deque()
        self._waiting: list[Group] = []

    def expect(self, blocks: Iterable[int]) -> None:
        """The bytes that each block of a forward will have here."""
        sizes = list(blocks)
        self._pool.reserve(sum(sizes), max(sizes, default=0))

    @contextmanager
    def offloading(self, activation: Tensor, given: Iterable[Any] | None = None) -> Iterator[None]:
        """While entered, ``activation`` is saved for a backward in the host's memory; what else is saved stays.

        The copies begin when it is left.

        Args:
            given: the arguments of the call; all that is saved besides them, and is large, goes with ``activation``.
        """
        # what is saved holds on to the hooks, which must not hold on to the activation
        address, shape = activation.data_ptr(), activation.shape
        stay = None if given is None else {a.untyped_storage()._cdata for a in given if isinstance(a, Tensor)}
        group = Group()

        def pack(saved: Tensor) -> Any:
            if (saved.data_ptr(), saved.shape) != (address, shape) and (stay is None or not _may_go(saved, stay)):
                return saved
            kept = Offloaded(self, group, self._pool.take(saved), saved.device)
            group.add(kept)
            group.going.append((kept.buffer, saved.detach()))
            return kept

        with saved_tensors_hooks(pack, lambda kept: kept.back() if isinstance(kept, Offloaded) else kept):
            yield
        self._send(group)

    def _send(self, group: Group) -> None:
        """Begin to copy what one block saves: one wait for the computation, and one event, for all of it."""
        going, group.going = group.going, []
        if not going:
            return
        current = torch.cuda.current_stream(going[0][1].device)
        self._waiting = [*(g for g in self._waiting if g.items), group]
        self._let_go(current, self.ahead)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for buffer, saved in going:
                buffer.copy_(saved, non_blocking=True)
            gone = self._stream.record_event()
        self._leaving.append(([saved for _, saved in going], gone))

    def _let_go(self, current: torch.cuda.Stream, ahead: int) -> None:
        """Free what has been copied, but for the last ``ahead`` blocks."""
        while len(self._leaving) > ahead:
            _, gone = self._leaving.popleft()
            current.wait_event(gone)

    def fetch(self, kept: Offloaded) -> Tensor:
        """``kept`` on the device again, and the copies of its block and of those before it begun."""
        self._send(kept.group)
        current = torch.cuda.current_stream(kept.device)
        self._let_go(current, 0)
        tensor, arrived = kept.start(self._stream)
        if any(g is kept.group for g in self._waiting):
            self._begin(kept.group)
        current.wait_event(arrived)
        return tensor

    def before(self, tensor: Tensor) -> None:
        """``tensor`` comes from a block that sends nothing. No more than :attr:`ahead` blocks are on their way to the host beside
        what follows; and when its gradient is there, the copies back of the block that saved last begin: what computed
        ``tensor`` has nothing to fetch, which would begin them."""
        self._let_go(torch.cuda.current_stream(tensor.device), self.ahead)
        if self._waiting and tensor.requires_grad:
            tensor.register_hook(self._begin_last)

    def _begin_last(self, gradient: Tensor) -> None:
        self._waiting = [g for g in self._waiting if g.items]
        if self._waiting:
            self._let_go(torch.cuda.current_stream(gradient.device), 0)
        for each in self._next():
            self._start(each)

    def _begin(self, group: Group) -> None:
        """Once for each block: what has come back since must not be copied again."""
        self._waiting = [g for g in self._waiting if g.items and g is not group]
        for each in (group, *self._next()):
            self._start(each)

    def _next(self) -> list[Group]:
        """Whose copies back begin now."""
        return self._waiting[: -self.ahead - 1 : -1]

    def _start(self, group: Group) -> None:
        for item in group.items:
            item.start(self._stream)

    def release(self, buffer: Tensor) -> None:
        """``buffer`` may be written again."""
        self._pool.give(buffer)


def _may_go(saved: Tensor, stay: set[int]) -> bool:
    """Whether it is large, not somebody else's, and comes back as it was: a copy has no gaps."""
    if saved.nbytes < LARGE or saved.untyped_storage()._cdata in stay:
        return False
    return torch.empty_like(saved, device="meta").stride() == saved.stride()


class Offloaded:
    """One tensor in the host's memory."""

    def __init__(self, store: HostStore, group: Group, buffer: Tensor, device: torch.device) -> None:
        self.buffer = buffer
        self.device = device
        self.group = group
        self._store = store
        self._arriving: tuple[Tensor, Any] | None = None

    def start(self, stream: torch.cuda.Stream) -> tuple[Tensor, Any]:
        """The tensor that the copy back goes to, and its end; begun unless it has been."""
        if self._arriving is None:
            # of the computation's own memory, so that freeing it is in its order
            tensor = torch.empty_like(self.buffer, device=self.device)
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
        if self._arriving is not None:  # nobody asked for it, and its memory may be given to what is computed next
            torch.cuda.current_stream(self.device).wait_event(self._arriving[1])
        self._store.release(self.buffer)
